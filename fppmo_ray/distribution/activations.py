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
        peaks: IntArray = self._peak(widths + np.diag(steps))
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
        alive, starts = self._alive
        sizes = self._sizes.each(widths)
        return np.add.reduceat(sizes[..., alive], starts, axis=-1).max(axis=-1)

    @cached_property
    def _sizes(self) -> Products:
        return as_products(self.tensors, self.num_groups)

    @cached_property
    def _alive(self) -> tuple[IntArray, IntArray]:
        """The tensors of all moments, one moment after the other, and where each begins."""
        lengths = [len(tensors) for tensors in self.moments]
        alive = np.array([index for tensors in self.moments for index in tensors], dtype=np.int64)
        return alive, np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)


def as_products(sizes: tuple[TensorSize, ...], num_groups: int) -> Products:
    """Sizes of tensors as a function of widths."""
    return Products([(size.per_pair, size.out_width, size.in_width) for size in sizes], num_groups)
