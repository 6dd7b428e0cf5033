"""Workers in numbered slots: placed as the cluster has room, started anew when they are lost."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError

from fppmo_ray.service.pool.place import Place
from fppmo_ray.service.pool.ray_errors import end_actor, is_own_fault, last_line
from fppmo_ray.service.pool.resources import Demand, describe_cluster

logger = logging.getLogger(__name__)

_MAX_START_FAILURES = 3  # of one slot in a row, by an error of the worker itself
_MAX_START_LOSSES = 10  # in a row: nodes come and go, but a process may die of what it starts with
_PLACEMENT_WARNING_S = 45.0
_WARNING_INTERVAL_S = 600.0


class Slots:
    """Slots whose actors are starting or ready.

    An actor that the cluster has no room for stays pending, which is what an autoscaler acts on.

    Args:
        start_worker: Starts the actor of a slot; its ``ready`` tells its place. Actors must not
            restart by themselves.
        num_slots: How many workers are wanted.
        demand: What each asks of the cluster, for messages.
    """

    def __init__(self, start_worker: Callable[[int], Any], num_slots: int, demand: Demand) -> None:
        self._start_worker = start_worker
        self._num_slots = num_slots
        self._demand = demand
        self._actors: dict[int, Any] = {}
        self._since: dict[int, float] = {}
        """When the start of a slot that is not ready was asked for."""
        self._warned_of: set[int] = set()
        self._last_warning = float("-inf")
        self._failures: dict[int, int] = defaultdict(int)
        self._losses: dict[int, int] = defaultdict(int)
        self.places: dict[int, Place] = {}
        """Of the ready workers, by slot."""
        self.starting: dict[Any, int] = {}
        """Slots by the reference that resolves when their worker is ready."""
        for slot in range(num_slots):
            self._start(slot)

    def actor(self, slot: int) -> Any:
        """The actor of a ready slot."""
        return self._actors[slot]

    def restart(self, slot: int) -> None:
        """Kill the slot's worker, if it is still there, and start another.

        Ray ends a process that does not react (it hangs, it was suspended) after some seconds,
        and only then frees what it held.
        """
        del self.places[slot]
        end_actor(self._actors[slot])
        self._start(slot)

    def finish_start(self, reference: Any) -> int | None:
        """The slot that is ready now; None where the start failed and was tried again.

        Raises:
            RuntimeError: no worker can be started, by an error of its own.
        """
        slot = self.starting.pop(reference)
        try:
            self.places[slot] = ray.get(reference)
        except RayError as error:
            self._after_failure(slot, error)
            return None
        del self._since[slot]
        self._warned_of.discard(slot)
        self._failures[slot] = self._losses[slot] = 0
        return slot

    def close(self) -> None:
        """Stop all workers."""
        for actor in self._actors.values():
            end_actor(actor)

    def seconds_to_warning(self) -> float | None:
        """Seconds until ``warn_of_unplaced`` has something to say; None: never."""
        unsaid = [since for slot, since in self._since.items() if slot not in self._warned_of]
        if not unsaid:
            return None
        due = max(min(unsaid) + _PLACEMENT_WARNING_S, self._last_warning + _WARNING_INTERVAL_S)
        return max(0.0, due - time.monotonic())

    def warn_of_unplaced(self) -> None:
        """Say of workers that have no place for the better part of a minute what they ask for.

        Once for every time that a worker is lost or cannot be placed, at most every ten minutes.
        """
        if self.seconds_to_warning() != 0:
            return
        self._last_warning = time.monotonic()
        self._warned_of.update(self._since)
        logger.warning(
            "only %d of %d workers are up: each asks for %s; %s; the others join as room "
            "appears; if none will, ask for fewer workers or smaller ones",
            len(self.places),
            self._num_slots,
            self._demand,
            describe_cluster(),
        )

    def _start(self, slot: int) -> None:
        self._since[slot] = time.monotonic()
        self._actors[slot] = self._start_worker(slot)
        self.starting[self._actors[slot].ready.options(name="start").remote()] = slot

    def _after_failure(self, slot: int, error: RayError) -> None:
        """Try again a few times if the worker itself failed, more often if it was lost."""
        self._failures[slot] += is_own_fault(error)
        self._losses[slot] += not is_own_fault(error)
        is_hopeless = (
            self._failures[slot] >= _MAX_START_FAILURES or self._losses[slot] >= _MAX_START_LOSSES
        )
        if not is_hopeless:
            logger.warning("worker %d did not start and is tried again: %s", slot, last_line(error))
            end_actor(self._actors[slot])
            self._start(slot)
            return
        if not self.places and not self.starting:
            raise RuntimeError(f"no worker can be started: {last_line(error)}") from error
        del self._since[slot]
        logger.warning("worker %d cannot be started and is given up: %s", slot, last_line(error))
