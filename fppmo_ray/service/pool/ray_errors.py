"""What Ray's errors say."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError

logger = logging.getLogger(__name__)


@contextmanager
def ray_errors_said() -> Iterator[None]:
    """Turn an error of Ray's that nobody can mend from here into a sentence.

    Raises:
        RuntimeError: in place of any ``RayError``.
    """
    try:
        yield
    except RayError as error:
        raise RuntimeError(
            f"Ray refused the driver: {last_line(error)}; if its cluster is gone, "
            "go on with --resume on another"
        ) from error


def end_actor(actor: Any) -> None:
    """Kill an actor. A cluster that is going away may refuse, and ends it by itself."""
    try:
        ray.kill(actor)
    except RayError as error:
        logger.info("an actor could not be ended: %s", last_line(error))


def last_line(error: RayError) -> str:
    """The reason: above it stand the remote traceback or the actor's ids."""
    return str(error).strip().splitlines()[-1]


def is_own_fault(error: RayError) -> bool:
    """Whether an actor's own code raised, in a call or while it was made."""
    return isinstance(error, RayTaskError) or (
        isinstance(error, RayActorError) and error.actor_init_failed
    )


def is_unreachable(error: RayError) -> bool:
    """Whether an actor's node has gone quiet.

    A worker's death is known at once, by its node. Of a node that has gone the cluster hears only
    later, so that its actors are unavailable for a while before they are dead.
    """
    return isinstance(error, ActorUnavailableError)
