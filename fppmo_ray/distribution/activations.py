"""The tensors that an inference makes: how large they are, and which are there at once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from fppmo_ray.distribution.products import FloatArray, IntArray, Products, TensorSize, Width


@dataclass(frozen=True, kw_only=True)
class Activations:
    """What an inference of one image keeps in memory besides the weights; a ``Cost`` in bytes."""

    tensors: tuple[TensorSize, ...]
    """In bytes. Several may have one name: that of the module which makes them."""
    moments: tuple[tuple[int, ...], ...]
    """Which tensors, by index, are there together: no moment is part of another."""
    num_groups: int
    """Of the space."""

    def total(self, widths: IntArray) -> int:
        """Most bytes at any moment, at kept filters per group, ``(num_groups,)``."""
        return int(self._peak(widths))

    def expected(self, widths: FloatArray) -> float:
        """The same at fractional widths."""
        return float(self._peak(widths))

    def widened(self, widths: IntArray, steps: IntArray) -> IntArray:
        """The same with each group alone widened by its step, ``(num_groups,)``."""
        peaks: IntArray = self._peak(widths + np.diag(steps)).astype(np.int64)
        return peaks

    def written(self) -> tuple[TensorSize, ...]:
        """The sizes of all tensors together, those of the same widths added up."""
        bytes_of: dict[tuple[Width, Width], int] = {}
        for size in self.tensors:
            key = size.out_width, size.in_width
            bytes_of[key] = bytes_of.get(key, 0) + size.per_pair
        return tuple(
            TensorSize(tensor="all", per_pair=per_pair, out_width=out, in_width=read)
            for (out, read), per_pair in bytes_of.items()
        )

    def _peak(self, widths: IntArray | FloatArray) -> Any:
        # In double precision, whose products are fast, and exact up to 2^53 bytes.
        sizes = self._sizes.each(widths).astype(np.float64)
        return (sizes @ self._alive.T).max(axis=-1)

    @cached_property
    def _sizes(self) -> Products:
        return as_products(self.tensors, self.num_groups)

    @cached_property
    def _alive(self) -> FloatArray:
        alive = np.zeros((len(self.moments), len(self.tensors)))
        for moment, tensors in enumerate(self.moments):
            alive[moment, list(tensors)] = 1.0
        return alive


def as_products(sizes: tuple[TensorSize, ...], num_groups: int) -> Products:
    """Sizes of tensors as a function of widths."""
    return Products([(size.per_pair, size.out_width, size.in_width) for size in sizes], num_groups)
