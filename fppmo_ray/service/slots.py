"""Workers in numbered slots: placed as the cluster has room, started anew when they are lost."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

logger = logging.getLogger(__name__)

_MAX_START_FAILURES = 3  # of one slot in a row, by an error of the worker itself
_PLACEMENT_WARNING_S = 60.0


class Slots:
    """Slots whose actors are starting or ready.

    Args:
        start_worker: Starts the actor of a slot; its ``ready`` names it. Actors must not restart
            by themselves.
        num_slots: How many workers are wanted.
    """

    def __init__(self, start_worker: Callable[[int], Any], num_slots: int) -> None:
        self._start_worker = start_worker
        self._num_slots = num_slots
        self._actors: dict[int, Any] = {}
        self._since: dict[int, float] = {}
        """When the start of a slot that is not ready was asked for."""
        self._failures: dict[int, int] = defaultdict(int)
        self._has_warned = False
        self.names: dict[int, str] = {}
        """Of the ready workers, by slot."""
        self.starting: dict[Any, int] = {}
        """Slots by the reference that resolves when their worker is ready."""
        for slot in range(num_slots):
            self._start(slot)

    def actor(self, slot: int) -> Any:
        """The actor of a ready slot."""
        return self._actors[slot]

    def restart(self, slot: int) -> None:
        """Kill the slot's worker, if it is still there, and start another."""
        del self.names[slot]
        ray.kill(self._actors[slot])
        self._start(slot)

    def finish_start(self, reference: Any) -> int | None:
        """The slot that is ready now; None where the start failed and was tried again.

        Raises:
            RuntimeError: no worker can be started, by an error of its own.
        """
        slot = self.starting.pop(reference)
        try:
            self.names[slot] = str(ray.get(reference))
        except RayError as error:
            self._after_failure(slot, error)
            return None
        del self._since[slot]
        self._failures[slot] = 0
        return slot

    def close(self) -> None:
        """Stop all workers."""
        for actor in self._actors.values():
            ray.kill(actor)

    def seconds_to_warning(self) -> float | None:
        """Seconds until ``warn_of_unplaced`` has something to say; None: never."""
        if self._has_warned or not self._since:
            return None
        return max(0.0, min(self._since.values()) + _PLACEMENT_WARNING_S - time.monotonic())

    def warn_of_unplaced(self) -> None:
        """Say once, after a minute, that the cluster has no room for all workers."""
        if self.seconds_to_warning() != 0:
            return
        self._has_warned = True
        logger.warning(
            "only %d of %d workers could be placed within %.0f s; the cluster has %s, free are %s; "
            "the others join as room appears",
            len(self.names),
            self._num_slots,
            _PLACEMENT_WARNING_S,
            ray.cluster_resources(),  # type: ignore[no-untyped-call]
            ray.available_resources(),  # type: ignore[no-untyped-call]
        )

    def _start(self, slot: int) -> None:
        self._since[slot] = time.monotonic()
        self._actors[slot] = self._start_worker(slot)
        self.starting[self._actors[slot].ready.remote()] = slot

    def _after_failure(self, slot: int, error: RayError) -> None:
        """Try again: for ever if the node was lost, a few times if the worker itself failed."""
        own_fault = isinstance(error, RayTaskError) or (
            isinstance(error, RayActorError) and error.actor_init_failed
        )
        self._failures[slot] += own_fault
        if self._failures[slot] < _MAX_START_FAILURES:
            self._start(slot)
            return
        reason = str(error).strip().splitlines()[-1]  # above it stands the remote traceback
        if not self.names and not self.starting:
            raise RuntimeError(f"no worker can be started: {reason}") from error
        del self._since[slot]
        logger.warning("worker %d cannot be started and is given up: %s", slot, reason)
