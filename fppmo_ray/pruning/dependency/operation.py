"""An operation that torch computed, as the rules see it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fppmo_ray.distribution.space import IntArray
from fppmo_ray.pruning.dependency.disjoint_sets import DisjointSets

Channels = dict[int, IntArray]
"""Per axis of a tensor that is followed, the position of every index along it."""


@dataclass(frozen=True, eq=False)
class TracedTensor:
    """A tensor: its shape, and which of its axes follow axes of weights."""

    shape: tuple[int, ...]
    channels: Channels = field(default_factory=dict)
    is_weight: bool = False
    """A parameter or buffer, or computed from these alone."""

    def axis(self, axis: int) -> int:
        """A non-negative axis."""
        return axis % len(self.shape)

    def along(self, axis: int) -> IntArray | None:
        """Positions along an axis, counted from the end where negative."""
        return self.channels.get(self.axis(axis))


@dataclass(frozen=True, eq=False)
class Product:
    """What an operation that sums over channels costs: a constant times two widths."""

    macs: int
    """Multiply-accumulates, of the whole batch if there is one."""
    out: IntArray
    """Positions of the channels it makes, FIXED where they are not followed."""
    read: IntArray
    """Positions of those it sums over; where ``out`` is as fixed, those that it repeats it for."""
    by_weight: bool
    """Whether a factor is a weight, whose axes these are."""
    module: str
    """Class of the module that computes it."""


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation on tensors of which some are followed."""

    name: str
    """As in ``torch.ops.aten``, without overload and in-place underscore."""
    arguments: dict[str, Any]
    """By the schema's names, a ``TracedTensor`` in place of every tensor, defaults filled in."""
    outputs: tuple[tuple[int, ...], ...]
    """Shapes of the resulting tensors."""
    units: DisjointSets
    module: str
    """Class of the module that computes it."""
    products: list[Product] = field(default_factory=list)
    """To which a rule adds what it costs."""

    @property
    def tensors(self) -> list[TracedTensor]:
        """All tensors it reads, those of lists included."""
        return list(_tensors(list(self.arguments.values())))

    @property
    def first(self) -> TracedTensor:
        """The tensor it is about."""
        return self.tensors[0]

    def tensor(self, name: str) -> TracedTensor | None:
        """An argument that is a tensor, or None."""
        value = self.arguments.get(name)
        return value if isinstance(value, TracedTensor) else None

    def doubt(self, positions: IntArray, reason: str) -> None:
        """See ``DisjointSets.doubt``; what one class of modules does counts as one case."""
        self.units.doubt(positions, f"{reason}, in {self.module}")


def _tensors(values: list[Any]) -> Iterator[TracedTensor]:
    for value in values:
        if isinstance(value, TracedTensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(list(value))
