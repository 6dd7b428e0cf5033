"""Workers in numbered slots: started when the cluster has room, replaced when they are lost."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from fppmo_ray.service.pool.cluster import (
    Demand,
    describe_cluster,
    end_actor,
    is_own_fault,
    last_line,
)

logger = logging.getLogger(__name__)

_MAX_START_FAILURES = 3  # per slot in a row, by an error of the worker itself
# Per slot in a row, by a lost process. More than failures, because nodes come and go; but not
# without end, because a library may end the process whenever a worker starts.
_MAX_START_LOSSES = 10
_PLACEMENT_WARNING_S = 45.0
_WARNING_INTERVAL_S = 600.0


@dataclass(frozen=True)
class WorkerInfo:
    """The process of a worker, as its ``ready`` reports it. As text, its name in the journal."""

    slot: int
    """Number of the worker in its group, from 0."""
    host: str
    """Name of the machine."""
    pid: int
    """Id of the process."""
    node_id: str
    """Ray's id of the node, in hex."""

    def __str__(self) -> str:
        return f"{self.slot}@{self.host}:{self.pid}"


def worker_info(slot: int) -> WorkerInfo:
    """Describe the process of the worker that calls this, which runs in ``slot``."""
    node_id: str = ray.get_runtime_context().get_node_id()
    return WorkerInfo(slot=slot, host=socket.gethostname(), pid=os.getpid(), node_id=node_id)


def worker_name(worker: object, slot: int, device_type: str) -> str:
    """Name of a worker for the Ray dashboard: ``PruningWorker(3, gpu=0)``.

    Args:
        worker: The worker itself, for the name of its class.
        slot: Its slot.
        device_type: ``"cpu"``, or the kind of GPU that it computes on.
    """
    gpus = None if device_type == "cpu" else os.environ.get("CUDA_VISIBLE_DEVICES")
    return f"{type(worker).__name__}({slot}, {f'gpu={gpus}' if gpus else 'cpu'})"


class WorkerGroup:
    """A fixed number of slots, each with an actor that is starting or ready.

    An actor without room in the cluster stays pending, which makes an autoscaler add nodes.

    Args:
        start_worker: Starts the actor of a slot, whose method ``ready`` returns a ``WorkerInfo``.
            Actors must not restart by themselves.
        num_slots: Number of workers.
        demand: Resources that each worker needs, for messages.
    """

    def __init__(self, start_worker: Callable[[int], Any], num_slots: int, demand: Demand) -> None:
        self._start_worker = start_worker
        self._num_slots = num_slots
        self._demand = demand
        self._actors: dict[int, Any] = {}
        self._since: dict[int, float] = {}
        """Since when each slot that is not ready has been starting, on the monotonic clock."""
        self._constructed: dict[int, Any] = {}
        """References that resolve once the worker of a slot has room and was constructed."""
        self._seen_constructed: dict[int, float] = {}
        """Since when each starting worker is known to be constructed, on the monotonic clock."""
        self._warned_of: set[int] = set()
        self._last_warning = float("-inf")
        self._failures: dict[int, int] = defaultdict(int)
        self._losses: dict[int, int] = defaultdict(int)
        self.ready: dict[int, WorkerInfo] = {}
        """The ready workers, by slot."""
        self.starting: dict[Any, int] = {}
        """Slots of the starting workers, by the reference that resolves when they are ready."""
        for slot in range(num_slots):
            self._start(slot)

    def actor(self, slot: int) -> Any:
        """The actor of a ready slot."""
        return self._actors[slot]

    def restart(self, slot: int) -> None:
        """Kill the worker of a ready slot, if it still runs, and start another.

        A process that does not react, because it hangs or was suspended, is ended by Ray after a
        few seconds; its resources are not free before.
        """
        del self.ready[slot]
        end_actor(self._actors[slot])
        self._start(slot)

    def finish_start(self, reference: Any) -> int | None:
        """Take in the end of a worker's start.

        Args:
            reference: A key of ``starting`` that has resolved.

        Returns:
            The slot that is ready now; None if the start failed and was tried again.

        Raises:
            RuntimeError: every worker failed to start too often.
        """
        slot = self.starting.pop(reference)
        try:
            self.ready[slot] = ray.get(reference)
        except RayError as error:
            self._after_failure(slot, last_line(error), is_own=is_own_fault(error))
            return None
        del self._since[slot]
        self._warned_of.discard(slot)
        self._failures[slot] = self._losses[slot] = 0
        return slot

    def end_hung_starts(self, limit: float) -> None:
        """Start workers anew whose ``ready`` does not return.

        A worker that waits for room in the cluster has no limit, so a worker's time counts from
        when it is first seen to be constructed, which is looked at after ``limit`` seconds.

        Args:
            limit: Seconds that ``ready`` may take.

        Raises:
            RuntimeError: every worker failed to start too often.
        """
        now = time.monotonic()
        for reference, slot in list(self.starting.items()):
            if now - self._since[slot] <= limit:
                continue
            if slot not in self._seen_constructed:
                if ray.wait([self._constructed[slot]], timeout=0)[0]:
                    self._seen_constructed[slot] = now
            elif now - self._seen_constructed[slot] > limit:
                del self.starting[reference]
                self._after_failure(slot, f"ready() took longer than {limit:g} s", is_own=True)

    def close(self) -> None:
        """Kill all workers."""
        for actor in self._actors.values():
            end_actor(actor)

    def seconds_to_warning(self) -> float | None:
        """Seconds until ``warn_of_unplaced`` would log a warning; None if it has no reason to."""
        unsaid = [since for slot, since in self._since.items() if slot not in self._warned_of]
        if not unsaid:
            return None
        due = max(min(unsaid) + _PLACEMENT_WARNING_S, self._last_warning + _WARNING_INTERVAL_S)
        return max(0.0, due - time.monotonic())

    def warn_of_unplaced(self) -> None:
        """Warn about workers that have been starting for 45 s, with the resources they need.

        Each start of a worker is warned about once, and warnings are at least 10 minutes apart.
        """
        if self.seconds_to_warning() != 0:
            return
        self._last_warning = time.monotonic()
        self._warned_of.update(self._since)
        logger.warning(
            "only %d of %d workers are ready: each needs %s; %s; the others start when there is "
            "room; if the cluster will not grow, ask for fewer or smaller workers",
            len(self.ready),
            self._num_slots,
            self._demand,
            describe_cluster(),
        )

    def _start(self, slot: int) -> None:
        self._since[slot] = time.monotonic()
        self._actors[slot] = self._start_worker(slot)
        self._constructed[slot] = self._actors[slot].__ray_ready__.remote()
        self._seen_constructed.pop(slot, None)
        self.starting[self._actors[slot].ready.options(name="start").remote()] = slot

    def _after_failure(self, slot: int, reason: str, *, is_own: bool) -> None:
        """Start the worker again, or give it up if it failed or was lost too often.

        Args:
            slot: Slot of the worker.
            reason: Why it did not start.
            is_own: Whether the worker's own code was the reason.

        Raises:
            RuntimeError: every worker was given up.
        """
        end_actor(self._actors[slot])
        self._failures[slot] += is_own
        self._losses[slot] += not is_own
        is_hopeless = (
            self._failures[slot] >= _MAX_START_FAILURES or self._losses[slot] >= _MAX_START_LOSSES
        )
        if not is_hopeless:
            logger.warning("worker %d did not start and is tried again: %s", slot, reason)
            self._start(slot)
            return
        if not self.ready and not self.starting:
            raise RuntimeError(f"no worker can be started: {reason}")
        del self._since[slot]
        logger.warning("worker %d cannot be started and is given up: %s", slot, reason)
