"""What a mask may cost besides MACs: parameters, latency, peak memory of activations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from fppmo_ray.distribution.space import BoolArray, FloatArray, IntArray, PruningSpace

Resource = Literal["params", "latency", "memory"]
"""What can be limited besides MACs."""

_UNITS: Mapping[Resource, str] = {"params": "parameters", "latency": "ns", "memory": "bytes"}

_NEEDED: Mapping[Resource, str] = {
    "params": "its tensors' sizes, as trace makes them",
    "latency": "a table of latencies, which a search measures on a worker",
    "memory": "its activations, as trace makes them",
}


class Cost(Protocol):
    """What networks cost as a function of widths: whole numbers that never fall as widths rise."""

    def total(self, widths: IntArray) -> int:
        """At kept filters per group, ``(num_groups,)``."""
        ...

    def expected(self, widths: FloatArray) -> float:
        """About the same at fractional widths, ``(num_groups,)``."""
        ...

    def widened(self, widths: IntArray, steps: IntArray) -> IntArray:
        """With each group alone widened by its step, ``(num_groups,)``."""
        ...


@dataclass(frozen=True)
class Limit:
    """The most that a mask may cost of one resource."""

    resource: Resource
    cost: Cost
    most: int

    def is_met(self, widths: IntArray) -> bool:
        """Whether a network of these kept filters per group keeps to it."""
        return self.cost.total(widths) <= self.most

    def is_expected(self, widths: FloatArray) -> bool:
        """The same of expected widths."""
        return self.cost.expected(widths) <= self.most

    def allows(self, widths: IntArray, steps: IntArray) -> BoolArray:
        """Which groups could be widened by their steps, each alone, ``(num_groups,)``."""
        allowed: BoolArray = self.cost.widened(widths, steps) <= self.most
        return allowed


def cost_of(space: PruningSpace, resource: Resource) -> Cost:
    """What a space knows of a resource.

    Raises:
        ValueError: it knows nothing of it.
    """
    known: dict[Resource, Cost | None] = {
        "params": space.parameters_cost if space.tensor_sizes else None,
        "latency": space.latency,
        "memory": space.activations,
    }
    cost = known[resource]
    if cost is None:
        raise ValueError(
            f"{resource}_cut needs a space that tells {_NEEDED[resource]}, got one without"
        )
    return cost


def dense_cost(space: PruningSpace, resource: Resource) -> int:
    """What the dense network costs; of latency, what was measured, not what the table says."""
    if resource == "latency" and space.latency is not None:
        return space.latency.dense_ns
    return cost_of(space, resource).total(space.dense_widths)


def limits_of(space: PruningSpace, cuts: Mapping[Resource, float]) -> tuple[Limit, ...]:
    """The limits that remove these shares, each in (0, 1), of what the dense network costs.

    Raises:
        ValueError: a cut is out of range or of reach, or the space knows nothing of its resource.
    """
    return tuple(_limit(space, resource, cut) for resource, cut in cuts.items())


def _limit(space: PruningSpace, resource: Resource, cut: float) -> Limit:
    check_cut(resource, cut)
    dense = dense_cost(space, resource)
    limit = Limit(resource, cost_of(space, resource), math.floor((1 - cut) * dense))
    if not limit.is_met(space.min_widths):
        least = limit.cost.total(space.min_widths)
        reachable = math.floor(max(0.0, 1 - least / dense) * 1e4) / 1e4
        raise ValueError(
            f"{resource}_cut must be at most {reachable}, got {cut}: the smallest legal widths "
            f"still cost {least:,} of {dense:,} {_UNITS[resource]}; lower {resource}_cut, or "
            "min_keep and multiple of the space"
        )
    return limit


def check_cut(resource: Resource, cut: float) -> None:
    """Refuse a share of a resource that no network could lose.

    Raises:
        ValueError: the cut is not in (0, 1).
    """
    if not 0 < cut < 1:
        raise ValueError(
            f"{resource}_cut must be in (0, 1), got {cut}; 0.3 removes 30 %, and without a limit "
            "it is left out"
        )
