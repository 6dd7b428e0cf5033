"""The data that dependency rules work on: traced tensors and the operations between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fppmo_ray.distribution.space import IntArray
from fppmo_ray.pruning.dependency.disjoint_sets import DisjointSets

Channels = dict[int, IntArray]
"""For every tracked axis of a tensor, the positions ``(length of the axis,)`` along it."""


class UnsupportedForm(Exception):
    """A rule refuses an operation in a form that it does not cover.

    The operation is then treated as one without a rule. Any other exception in a rule is a bug.
    """


@dataclass(frozen=True, eq=False)
class TracedTensor:
    """The shape of a tensor, and the weight axes that its own axes stem from."""

    shape: tuple[int, ...]
    """Lengths of all axes."""
    channels: Channels = field(default_factory=dict)
    """Positions along the tracked axes."""
    is_weight: bool = False
    """Whether it is a parameter or buffer, or computed from these alone."""

    def axis(self, axis: int) -> int:
        """Return an axis that may count from the end as a non-negative number."""
        return axis % len(self.shape)

    def positions(self, axis: int) -> IntArray | None:
        """Return the positions along an axis, which may count from the end; None if untracked."""
        return self.channels.get(self.axis(axis)) if self.shape else None


@dataclass(frozen=True, eq=False)
class Product:
    """The multiply-accumulates of one operation: a constant times an output and an input width."""

    macs: int
    """Multiply-accumulates in the dense network, for the whole batch."""
    output: IntArray
    """Positions of the channels that it computes, FIXED where they are not tracked."""
    input: IntArray
    """Positions of the channels that it sums over. For a product of activations of which all
    output channels are fixed, the rows of the left factor instead."""
    by_weight: bool
    """Whether exactly one factor is a weight; its axes are then ``output`` and ``input``."""
    module: str
    """Class name of the module that computes it."""


@dataclass(frozen=True, eq=False)
class Operation:
    """One call of a torch operation of which at least one argument is tracked."""

    name: str
    """Name in ``torch.ops.aten``, without overload and in-place underscore."""
    arguments: dict[str, Any]
    """Arguments by schema name with defaults filled in; tensors are ``TracedTensor``."""
    outputs: tuple[tuple[int, ...], ...]
    """Shapes of the resulting tensors."""
    units: DisjointSets
    """All units of the network; rules change them in place."""
    module: str
    """Class name of the innermost module that computes it."""
    products: list[Product] = field(default_factory=list)
    """Products of the pass so far; a rule appends what its operation costs."""

    @property
    def tensors(self) -> list[TracedTensor]:
        """All tensor arguments in order, including those inside lists."""
        return list(traced_tensors(list(self.arguments.values())))

    @property
    def first(self) -> TracedTensor:
        """The first tensor argument, which most operations transform."""
        return self.tensors[0]

    def tensor(self, name: str) -> TracedTensor | None:
        """Return the argument of this name if it is a tensor, else None."""
        value = self.arguments.get(name)
        return value if isinstance(value, TracedTensor) else None

    def doubt(self, positions: IntArray, reason: str) -> None:
        """Call ``DisjointSets.doubt`` with one shared reason per class of modules.

        Args:
            positions: Positions of any shape.
            reason: What makes their removal doubtful.
        """
        self.units.doubt(positions, f"{reason}, in {self.module}")


def traced_tensors(values: list[Any]) -> Iterator[TracedTensor]:
    """Yield all traced tensors in nested lists."""
    for value in values:
        if isinstance(value, TracedTensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from traced_tensors(list(value))
