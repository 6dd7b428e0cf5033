"""What a worker asks of the cluster, and what the cluster has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import ray


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What the cluster is asked for each worker."""

    cpus: float = 0.0
    gpus: float = 0.0

    def __str__(self) -> str:
        return _describe(self.cpus, self.gpus)

    def fits(self, node: Mapping[str, float]) -> bool:
        """Whether a node of these resources could hold a worker if nothing else ran on it."""
        return self.cpus <= node.get("CPU", 0.0) and self.gpus <= node.get("GPU", 0.0)


def node_resources() -> list[dict[str, float]]:
    """The resources of every living node, in use or not."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def describe_cluster() -> str:
    """A phrase: how large the cluster is, its largest node, and what nobody uses now."""
    nodes = node_resources()
    free = ray.available_resources()  # type: ignore[no-untyped-call]
    cpus = [node.get("CPU", 0.0) for node in nodes]
    gpus = [node.get("GPU", 0.0) for node in nodes]
    return (
        f"the cluster has {_describe(sum(cpus), sum(gpus))} on {_plural(len(nodes), 'node')} "
        f"(at most {_describe(max(cpus, default=0.0), max(gpus, default=0.0))} on one), "
        f"of which {_describe(free.get('CPU', 0.0), free.get('GPU', 0.0))} are free"
    )


def _describe(cpus: float, gpus: float) -> str:
    return f"{_plural(cpus, 'CPU')} and {_plural(gpus, 'GPU')}"


def _plural(count: float, noun: str) -> str:
    return f"{count:g} {noun}{'' if count == 1 else 's'}"
