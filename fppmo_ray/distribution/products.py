"""Sums of products of two widths: what MACs, parameters and bytes of activations come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Width:
    """A layer's width: ``constant + sum(channels_per_filter * kept filters of the group)``."""

    constant: int = 0
    terms: tuple[tuple[int, int], ...] = ()
    """Pairs (group index, channels per kept filter)."""


@dataclass(frozen=True, kw_only=True)
class TensorSize:
    """Elements of one parameter: ``per_pair * out_width * in_width``, whichever axes these are."""

    tensor: str
    per_pair: int
    out_width: Width
    in_width: Width


Product = tuple[int, Width, Width]
"""A constant and two widths: what it comes to is all three multiplied."""


def width_matrix(widths: Sequence[Width], num_groups: int) -> tuple[IntArray, IntArray]:
    """Channels per kept filter ``(num_widths, num_groups)`` and constants ``(num_widths,)``."""
    terms = np.zeros((len(widths), num_groups), dtype=np.int64)
    for row, width in enumerate(widths):
        for group, channels in width.terms:
            terms[row, group] += channels
    return terms, np.array([width.constant for width in widths], dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Products:
    """Products as matrices, and what is added to their sum.

    Args:
        products: Of whole numbers, none negative, so that nothing gets cheaper by a wider group.
        num_groups: Of the space.
        constant: What no width changes.
    """

    products: Sequence[Product]
    num_groups: int
    constant: int = 0

    def total(self, widths: IntArray) -> int:
        """The sum at kept filters per group, ``(num_groups,)``."""
        return int(self._sum(widths)) + self.constant

    def expected(self, widths: FloatArray) -> float:
        """The sum at expected (fractional) kept filters per group, ``(num_groups,)``.

        The covariance of a product's two widths is left out.
        """
        return float(self._sum(widths)) + self.constant

    def each(self, widths: IntArray | FloatArray) -> Any:
        """Every product by itself, ``(..., num_products)``, at widths ``(..., num_groups)``."""
        per_pair, out_terms, out_constant, in_terms, in_constant = self._matrices
        return (
            per_pair * (widths @ out_terms.T + out_constant) * (widths @ in_terms.T + in_constant)
        )

    def increase(self, widths: IntArray, steps: IntArray) -> IntArray:
        """What widening each group alone by its step would add, ``(num_groups,)``.

        Every product is ``c * o(w) * i(w)`` with affine o and i, so a step d in one group adds
        exactly ``d * c * (o' * i + i' * o) + d^2 * c * o' * i'``.
        """
        per_pair, out_terms, out_constant, in_terms, in_constant = self._matrices
        out_cost = per_pair * (out_terms @ widths + out_constant)
        in_cost = per_pair * (in_terms @ widths + in_constant)
        slope = in_cost @ out_terms + out_cost @ in_terms
        increase: IntArray = steps * (slope + steps * self._curvature)
        return increase

    def widened(self, widths: IntArray, steps: IntArray) -> IntArray:
        """The sum with each group alone widened by its step, ``(num_groups,)``."""
        return self.total(widths) + self.increase(widths, steps)

    def _sum(self, widths: IntArray | FloatArray) -> Any:
        per_pair, out_terms, out_constant, in_terms, in_constant = self._matrices
        return per_pair @ ((out_terms @ widths + out_constant) * (in_terms @ widths + in_constant))

    @cached_property
    def _matrices(self) -> tuple[IntArray, IntArray, IntArray, IntArray, IntArray]:
        per_pair = np.array([constant for constant, _, _ in self.products], dtype=np.int64)
        out = width_matrix([out_width for _, out_width, _ in self.products], self.num_groups)
        read = width_matrix([in_width for _, _, in_width in self.products], self.num_groups)
        return per_pair, *out, *read

    @cached_property
    def _curvature(self) -> IntArray:
        per_pair, out_terms, _, in_terms, _ = self._matrices
        curvature: IntArray = per_pair @ (out_terms * in_terms)
        return curvature
