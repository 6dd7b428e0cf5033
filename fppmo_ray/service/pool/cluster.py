"""The cluster: its resources, those that a worker needs, and sentences for Ray's errors."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import (
    ActorUnavailableError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    UnserializableException,
)

logger = logging.getLogger(__name__)

_ACCELERATOR = "accelerator_type"  # a node's resource accelerator_type:H100 says what it has
_RESOLUTION = 10_000  # Ray counts resources in units of 0.0001


@dataclass(frozen=True, kw_only=True)
class Demand:
    """The resources that each worker needs. As text, a phrase for messages."""

    cpus: float = 0.0
    """Number of CPUs; a fraction is a share of one."""
    gpus: float = 0.0
    """Number of GPUs; a fraction is a share of one."""
    memory: int = 0
    """Bytes of memory."""
    custom: Mapping[str, float] = field(default_factory=dict)
    """Amounts of custom resources of nodes, by name."""
    accelerator_type: str | None = None
    """Ray's name of a kind of GPU, such as ``H100``; None: any."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Ray's selector of nodes by their labels."""

    def __str__(self) -> str:
        parts = [f"{_plural(self.cpus, 'CPU')} and {_plural(self.gpus, 'GPU')}"]
        parts += [f"of type {self.accelerator_type}"] if self.accelerator_type else []
        parts += [f"{self.memory / 1024**3:g} GiB of memory"] if self.memory else []
        parts += [f"{amount:g} {name}" for name, amount in self.custom.items()]
        parts += [f"a node with {name}={value}" for name, value in self.labels.items()]
        return ", ".join(parts)

    def options(self) -> dict[str, Any]:
        """Return the options of ``ray.remote`` for an actor with these resources."""
        options: dict[str, Any] = {"num_cpus": self.cpus, "num_gpus": self.gpus}
        options |= {"memory": self.memory} if self.memory else {}
        options |= {"resources": dict(self.custom)} if self.custom else {}
        options |= {"accelerator_type": self.accelerator_type} if self.accelerator_type else {}
        return options | ({"label_selector": dict(self.labels)} if self.labels else {})

    def bundle(self) -> dict[str, float]:
        """Return the amounts of all resources by Ray's names, for a bundle of a placement group."""
        amounts = {"CPU": self.cpus, "GPU": self.gpus, "memory": float(self.memory), **self.custom}
        return {name: amount for name, amount in amounts.items() if amount}

    def count_on(self, node: Mapping[str, float]) -> float:
        """Number of workers that a node with these resources has room for when nothing else runs.

        Infinite for workers that need nothing.
        """
        if self.accelerator_type and f"{_ACCELERATOR}:{self.accelerator_type}" not in node:
            return 0
        room = [
            round(node.get(name, 0.0) * _RESOLUTION) // round(amount * _RESOLUTION)
            for name, amount in self.bundle().items()
        ]
        return min(room, default=math.inf)


def node_resources() -> list[dict[str, float]]:
    """The total resources of every living node, used and free ones together."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def is_node_alive(node_id: str) -> bool:
    """Whether Ray counts the node with this id, in hex, as alive."""
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return any(node["NodeID"] == node_id and node["Alive"] for node in nodes)


def describe_cluster() -> str:
    """A phrase with the cluster's total resources, those of its largest node, and the free ones."""
    nodes = node_resources()
    free = ray.available_resources()  # type: ignore[no-untyped-call]
    cpus = [node.get("CPU", 0.0) for node in nodes]
    gpus = [node.get("GPU", 0.0) for node in nodes]
    return (
        f"the cluster has {_describe(sum(cpus), sum(gpus))} on {_plural(len(nodes), 'node')} "
        f"(at most {_describe(max(cpus, default=0.0), max(gpus, default=0.0))} on one), "
        f"of which {_describe(free.get('CPU', 0.0), free.get('GPU', 0.0))} are free"
    )


@contextmanager
def explain_ray_errors() -> Iterator[None]:
    """Turn Ray's errors, which the driver cannot recover from, into one sentence.

    Raises:
        RuntimeError: in place of any ``RayError``.
    """
    try:
        yield
    except RayError as error:
        raise RuntimeError(
            f"Ray refused a request of the driver: {last_line(error)}; if the cluster is gone, "
            "continue on another one with --resume"
        ) from error


def end_actor(actor: Any) -> None:
    """Kill an actor.

    A cluster that is shutting down may refuse; it ends its actors by itself.
    """
    try:
        ray.kill(actor)
    except RayError as error:
        logger.info("an actor could not be killed: %s", last_line(error))


def last_line(error: RayError) -> str:
    """The reason of an error, without Ray's advice.

    The lines above it are the remote traceback or the actor's ids. Where Ray has ended a process
    for want of memory, the advice comes last.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, OutOfMemoryError):
        reason = next((line for line in lines if line.startswith("Memory on the node")), lines[0])
        return reason.partition(". Ray killed")[0]
    return lines[-1].partition(" Some common causes include:")[0]


def is_own_fault(error: RayError) -> bool:
    """Whether the actor's own code raised the error, in a method or in its constructor."""
    return isinstance(error, RayTaskError | UnserializableException) or (
        isinstance(error, RayActorError) and error.actor_init_failed
    )


def is_unreachable(error: RayError) -> bool:
    """Whether the actor's node does not answer, or is being taken back by its cloud.

    A node reports the death of a worker at once. When the node itself is gone, the cluster learns
    of it later, and until then its actors count as unavailable instead of dead.
    """
    if isinstance(error, RayActorError) and error.preempted:
        return True
    return isinstance(error, ActorUnavailableError)


def _describe(cpus: float, gpus: float) -> str:
    return f"{_plural(cpus, 'CPU')} and {_plural(gpus, 'GPU')}"


def _plural(count: float, noun: str) -> str:
    return f"{count:g} {noun}{'' if count == 1 else 's'}"
