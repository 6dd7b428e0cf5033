"""What a network costs as a function of its widths: MACs, parameters, memory of activations.

Costs are whole numbers and exact, because a layer's cost is a constant times its output width
times its input width, and both widths are affine in the numbers of kept filters per group. Sums of
such products give MACs and parameters (``Products``); the largest of several sums gives the peak
memory of an inference (``Activations``). Latency, which is measured, has a table of its own
(``latency_table``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


class Cost(Protocol):
    """A cost of networks: a whole number that never falls when a width rises."""

    def total(self, widths: IntArray) -> int:
        """Return the cost at kept filters per group, ``(num_groups,)``."""
        ...

    def totals(self, widths: IntArray) -> IntArray:
        """Return the costs ``(num_totals,)`` at several widths, ``(num_totals, num_groups)``."""
        ...

    def expected(self, widths: FloatArray) -> float:
        """Return the approximate cost at fractional widths, ``(num_groups,)``."""
        ...

    def widened(self, widths: IntArray, steps: IntArray) -> IntArray:
        """Return the cost of widening each group alone, ``(num_groups,)``.

        Args:
            widths: Kept filters per group, ``(num_groups,)``.
            steps: Filters to add to each group, ``(num_groups,)``.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Width:
    """A layer's width: ``constant + sum(channels_per_filter * kept filters of the group)``."""

    constant: int = 0
    """Channels that no mask removes."""
    terms: tuple[tuple[int, int], ...] = ()
    """Pairs (group index, channels per kept filter)."""


@dataclass(frozen=True, kw_only=True)
class TensorSize:
    """Size of one tensor: ``per_pair * out_width * in_width``, whichever axes the widths are."""

    tensor: str
    """Name of the parameter, or of the module that makes the activation."""
    per_pair: int
    """Elements or bytes per pair of output and input channel."""
    out_width: Width
    """One width of the tensor."""
    in_width: Width
    """Its other width; the constant 1 where it has only one."""


Product = tuple[int, Width, Width]
"""A constant and two widths; its value is all three multiplied."""


@dataclass(frozen=True, eq=False)
class Products:
    """A sum of products of two widths, plus a constant; a ``Cost``.

    The products are kept as matrices: with o and i the affine maps from kept filters ``w`` to
    output and input widths, the sum is ``constant + sum_k c_k * o_k(w) * i_k(w)``.
    """

    products: Sequence[Product]
    """The summands. No number in them is negative, so that a wider group never costs less."""
    num_groups: int
    """Number of channel groups of the space."""
    constant: int = 0
    """Part of the sum that does not depend on widths."""

    def total(self, widths: IntArray) -> int:
        """Return the sum at kept filters per group, ``(num_groups,)``."""
        per_pair, terms, constants = self._stacked
        both = terms.dot(widths)
        both += constants
        return int(per_pair.dot(both[: len(per_pair)] * both[len(per_pair) :])) + self.constant

    def totals(self, widths: IntArray) -> IntArray:
        """Return the sums ``(num_totals,)`` at several widths, ``(num_totals, num_groups)``."""
        totals: IntArray = self.each(widths).sum(axis=-1) + self.constant
        return totals

    def expected(self, widths: FloatArray) -> float:
        """Return the sum at expected (fractional) kept filters per group, ``(num_groups,)``.

        The covariance of a product's two widths is left out.
        """
        per_pair, out_terms, out_constant, in_terms, in_constant = self._matrices
        out, read = out_terms @ widths + out_constant, in_terms @ widths + in_constant
        return float(per_pair @ (out * read)) + self.constant

    def each(self, widths: IntArray | FloatArray) -> Any:
        """Return every product by itself, ``(..., num_products)``, at ``(..., num_groups)``."""
        per_pair, _, constants = self._stacked
        # Sums of products of channels are exact in float64, whose products are far faster.
        both: Any = widths.astype(np.float64) @ self._float_terms
        both = both.astype(widths.dtype) + constants
        return per_pair * both[..., : len(per_pair)] * both[..., len(per_pair) :]

    def increase(self, widths: IntArray, steps: IntArray) -> IntArray:
        """Return how much widening each group alone adds to the sum, ``(..., num_groups)``.

        Args:
            widths: Kept filters per group, ``(..., num_groups)``.
            steps: Filters to add to each group, ``(..., num_groups)``.
        """
        # Each product is c * o(w) * i(w), so a step of d filters in one group, whose channels
        # per filter are o' and i', adds exactly d * c * (o' * i + i' * o) + d^2 * c * o' * i'.
        per_pair, out_terms, out_constant, in_terms, in_constant = self._matrices
        out_cost = per_pair * (widths @ out_terms.T + out_constant)  # c * o
        in_cost = per_pair * (widths @ in_terms.T + in_constant)  # c * i
        slope = in_cost @ out_terms + out_cost @ in_terms
        increase: IntArray = steps * (slope + steps * self._curvature)
        return increase

    def widened(self, widths: IntArray, steps: IntArray) -> IntArray:
        """Return the sum with each group alone widened, ``(num_groups,)``.

        Args:
            widths: Kept filters per group, ``(num_groups,)``.
            steps: Filters to add to each group, ``(num_groups,)``.
        """
        return self.total(widths) + self.increase(widths, steps)

    @cached_property
    def _matrices(self) -> tuple[IntArray, IntArray, IntArray, IntArray, IntArray]:
        per_pair = np.array([constant for constant, _, _ in self.products], dtype=np.int64)
        out = width_matrix([out_width for _, out_width, _ in self.products], self.num_groups)
        read = width_matrix([in_width for _, _, in_width in self.products], self.num_groups)
        return per_pair, *out, *read

    @cached_property
    def _stacked(self) -> tuple[IntArray, IntArray, IntArray]:
        """The matrices of output widths above those of input widths: half the calls of numpy."""
        per_pair, out_terms, out_constant, in_terms, in_constant = self._matrices
        terms = np.concatenate([out_terms, in_terms])
        return per_pair, terms, np.concatenate([out_constant, in_constant])

    @cached_property
    def _float_terms(self) -> FloatArray:
        """The stacked terms, transposed, ``(num_groups, 2 * num_products)``."""
        _, terms, _ = self._stacked
        return np.ascontiguousarray(terms.T, dtype=np.float64)

    @cached_property
    def _curvature(self) -> IntArray:
        """Sum over the products of c * o' * i' for each group, ``(num_groups,)``."""
        per_pair, out_terms, _, in_terms, _ = self._matrices
        curvature: IntArray = per_pair @ (out_terms * in_terms)
        return curvature


def width_matrix(widths: Sequence[Width], num_groups: int) -> tuple[IntArray, IntArray]:
    """Return widths as an affine map from kept filters per group.

    Args:
        widths: The widths, one for each row.
        num_groups: Number of channel groups of the space.

    Returns:
        Channels per kept filter ``(num_widths, num_groups)`` and constants ``(num_widths,)``.
    """
    terms = np.zeros((len(widths), num_groups), dtype=np.int64)
    for row, width in enumerate(widths):
        for group, channels in width.terms:
            terms[row, group] += channels
    return terms, np.array([width.constant for width in widths], dtype=np.int64)


def as_products(sizes: Sequence[TensorSize], num_groups: int, constant: int = 0) -> Products:
    """Return the total size of tensors as a function of widths.

    Args:
        sizes: The tensors whose size depends on widths.
        num_groups: Number of channel groups of the space.
        constant: Total size of all other tensors, >= 0.
    """
    products = [(size.per_pair, size.out_width, size.in_width) for size in sizes]
    return Products(products, num_groups, constant)


@dataclass(frozen=True, kw_only=True)
class Activations:
    """The tensors that an inference of one image makes; their peak memory is a ``Cost``."""

    tensors: tuple[TensorSize, ...]
    """Sizes in bytes, without the weights. Tensors made by the same module have the same name."""
    moments: tuple[tuple[int, ...], ...]
    """For each moment of the inference, the indices of the tensors that are in memory together.
    Moments whose tensors are all part of another moment are left out."""
    num_groups: int
    """Number of channel groups of the space."""

    def total(self, widths: IntArray) -> int:
        """Return the most bytes at any moment, at kept filters per group, ``(num_groups,)``."""
        return int(self._peak(widths))

    def totals(self, widths: IntArray) -> IntArray:
        """Return ``total`` of several widths, ``(num_totals, num_groups)``."""
        peaks: IntArray = self._peak(widths)
        return peaks

    def expected(self, widths: FloatArray) -> float:
        """Return the most bytes at any moment, at fractional widths, ``(num_groups,)``."""
        return float(self._peak(widths))

    def widened(self, widths: IntArray, steps: IntArray) -> IntArray:
        """Return the most bytes with each group alone widened, ``(num_groups,)``.

        Args:
            widths: Kept filters per group, ``(num_groups,)``.
            steps: Filters to add to each group, ``(num_groups,)``.
        """
        peaks: IntArray = self._peak(widths + np.diag(steps))
        return peaks

    def written(self) -> tuple[TensorSize, ...]:
        """Return all bytes that an inference writes: tensors of the same widths are added up."""
        bytes_of: dict[tuple[Width, Width], int] = {}
        for size in self.tensors:
            key = size.out_width, size.in_width
            bytes_of[key] = bytes_of.get(key, 0) + size.per_pair
        return tuple(
            TensorSize(tensor="all", per_pair=per_pair, out_width=out, in_width=read)
            for (out, read), per_pair in bytes_of.items()
        )

    def _peak(self, widths: IntArray | FloatArray) -> Any:
        """Return the peak, ``(...)``, at widths ``(..., num_groups)``."""
        alive, starts = self._alive
        sizes = self._sizes.each(widths)
        return np.add.reduceat(sizes[..., alive], starts, axis=-1).max(axis=-1)

    @cached_property
    def _sizes(self) -> Products:
        return as_products(self.tensors, self.num_groups)

    @cached_property
    def _alive(self) -> tuple[IntArray, IntArray]:
        """The tensors of all moments, one moment after the other, and where each moment starts."""
        lengths = [len(tensors) for tensors in self.moments]
        alive = np.array([index for tensors in self.moments for index in tensors], dtype=np.int64)
        return alive, np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
