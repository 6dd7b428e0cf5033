"""What Ray's errors say."""

from __future__ import annotations

from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError


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
