"""Limits besides MACs: of parameters, latency and the activations' peak memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fppmo_ray.distribution.costs import Cost
from fppmo_ray.distribution.space import BoolArray, FloatArray, IntArray, PruningSpace

Resource = Literal["params", "latency", "memory"]
"""A resource that can be limited besides MACs."""

_UNITS: Mapping[Resource, str] = {"params": "parameters", "latency": "ns", "memory": "bytes"}

_NEEDED: Mapping[Resource, str] = {
    "params": "its tensors' sizes, as trace makes them",
    "latency": "a table of latencies, which a search measures on a worker",
    "memory": "its activations, as trace makes them",
}


@dataclass(frozen=True)
class Limit:
    """The most that a mask may cost of one resource."""

    resource: Resource
    """The resource."""
    cost: Cost
    """Its cost as a function of widths."""
    most: int
    """Upper bound of the cost, in parameters, nanoseconds or bytes."""

    def is_met(self, widths: IntArray) -> bool:
        """Return whether kept filters per group, ``(num_groups,)``, stay within the limit."""
        return self.cost.total(widths) <= self.most

    def is_expected(self, widths: FloatArray) -> bool:
        """Return whether fractional widths, ``(num_groups,)``, stay within the limit."""
        return self.cost.expected(widths) <= self.most

    def allows(self, widths: IntArray, steps: IntArray) -> BoolArray:
        """Return which groups could be widened, each alone, ``(num_groups,)``.

        Args:
            widths: Kept filters per group, ``(num_groups,)``.
            steps: Filters to add to each group, ``(num_groups,)``.
        """
        allowed: BoolArray = self.cost.widened(widths, steps) <= self.most
        return allowed


def cost_of(space: PruningSpace, resource: Resource) -> Cost:
    """Return the cost of a resource as a function of widths.

    Args:
        space: The space of the masks.
        resource: The resource.

    Raises:
        ValueError: the space does not know the resource.
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
    """Return the cost of the dense network; its latency is the measured one, not the table's.

    Args:
        space: The space of the masks.
        resource: The resource.

    Raises:
        ValueError: the space does not know the resource.
    """
    if resource == "latency" and space.latency is not None:
        return space.latency.dense_ns
    return cost_of(space, resource).total(space.dense_widths)


def limits_of(space: PruningSpace, cuts: Mapping[Resource, float]) -> tuple[Limit, ...]:
    """Return the limits that remove shares of the dense network's cost.

    Args:
        space: The space of the masks.
        cuts: For each resource the share to remove, in (0, 1).

    Raises:
        ValueError: a cut is out of range or out of reach, the space does not know its resource, or
            its latency table finds the dense network fast enough already.
    """
    return tuple(_limit(space, resource, cut) for resource, cut in cuts.items())


def _limit(space: PruningSpace, resource: Resource, cut: float) -> Limit:
    check_cut(resource, cut)
    dense = dense_cost(space, resource)
    limit = Limit(resource, cost_of(space, resource), math.floor((1 - cut) * dense))
    if not limit.is_met(space.min_widths):
        least = limit.cost.total(space.min_widths)
        # Rounded down, so that the number in the message is a legal cut.
        reachable = math.floor(max(0.0, 1 - least / dense) * 1e4) / 1e4
        raise ValueError(
            f"{resource}_cut must be at most {reachable}, got {cut}: the smallest legal widths "
            f"still cost {least:,} of {dense:,} {_UNITS[resource]}; lower {resource}_cut, or "
            "min_keep and multiple of the space"
        )
    if limit.is_met(space.dense_widths):  # by a table alone, of which the dense cost was measured
        by_table = limit.cost.total(space.dense_widths)
        raise ValueError(
            f"{resource}_cut must remove something, got {cut}: the table has {by_table:,} "
            f"{_UNITS[resource]} for the dense network, and {dense:,} were measured, so its times "
            "contradict each other; measure again, in another run directory, with nothing else "
            "running, and let a clock return the median of several passes"
        )
    return limit


def check_cut(resource: Resource, cut: float) -> None:
    """Refuse a share to remove that is not in (0, 1).

    Args:
        resource: The resource, for the message.
        cut: Share of the dense network's cost to remove.

    Raises:
        ValueError: the cut is out of its range.
    """
    if not 0 < cut < 1:
        raise ValueError(
            f"{resource}_cut must be in (0, 1), got {cut}; 0.3 removes 30 %, and without a limit "
            "it is left out"
        )
