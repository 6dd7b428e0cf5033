"""What every layer takes at every width, as it was measured: latency as plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fppmo_ray.distribution.activations import as_products
from fppmo_ray.distribution.products import (
    FloatArray,
    IntArray,
    Products,
    TensorSize,
    Width,
    width_matrix,
)

FS_PER_NS = 10**6


@dataclass(frozen=True, kw_only=True)
class LayerLatency:
    """Nanoseconds of one layer at some of its widths, never less at wider ones."""

    layer: str
    out_width: Width
    in_width: Width
    out_points: tuple[int, ...]
    """Output widths that were measured, ascending."""
    in_points: tuple[int, ...]
    ns: tuple[tuple[int, ...], ...]
    """A row for every output width, and in it an entry for every input width."""


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """The latency of a network as a function of its widths; a ``Cost`` in nanoseconds.

    Layers are interpolated between the widths that were measured. All else (norms, activations,
    sums, what a call costs) is a constant and a time per byte that the network writes. All of it is
    in whole numbers, so that the sum is exact, the same everywhere, and never falls as widths rise.
    """

    num_groups: int
    """Of the space."""
    layers: tuple[LayerLatency, ...]
    written: tuple[TensorSize, ...]
    """Bytes that an image's inference writes."""
    fs_per_byte: int
    """Femtoseconds, >= 0."""
    constant_ns: int
    dense_ns: int
    """What the dense network was measured to take: what cuts are shares of."""

    def total(self, widths: IntArray) -> int:
        """Nanoseconds at kept filters per group, ``(num_groups,)``."""
        return int(self._total(widths))

    def expected(self, widths: FloatArray) -> float:
        """The same at fractional widths."""
        time, per = self._interpolated(widths)
        rest = self._written.expected(widths) * self.fs_per_byte / FS_PER_NS
        return float((time / per).sum()) + rest + self.constant_ns

    def widened(self, widths: IntArray, steps: IntArray) -> IntArray:
        """The same with each group alone widened by its step, ``(num_groups,)``."""
        widened: IntArray = self._total(widths + np.diag(steps))
        return widened

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers; ``from_json`` gives the table back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LatencyTable:
        """The table that ``to_json`` described."""
        layers, written = data["layers"], data["written"]
        return cls(
            **data
            | {
                "layers": tuple(
                    LayerLatency(
                        **entry
                        | _widths_of(entry)
                        | {name: tuple(entry[name]) for name in ("out_points", "in_points")}
                        | {"ns": tuple(map(tuple, entry["ns"]))}
                    )
                    for entry in layers
                ),
                "written": tuple(TensorSize(**entry | _widths_of(entry)) for entry in written),
            }
        )

    def _total(self, widths: IntArray) -> IntArray:
        """Nanoseconds ``(...)`` at widths ``(..., num_groups)``."""
        time, per = self._interpolated(widths)
        rest = self._written.each(widths).sum(axis=-1) * self.fs_per_byte // FS_PER_NS
        total: IntArray = (time // per).sum(axis=-1) + rest + self.constant_ns
        return total

    def _interpolated(self, widths: Any) -> tuple[Any, Any]:
        """Time of every layer ``(..., num_layers)``, as a whole number over another.

        Between four points it is bilinear. Fractions are left to the caller, since a whole number
        divided last is rounded down in the same way everywhere.
        """
        grid = self._grid
        out, at_out = _place(widths @ grid.out_terms.T + grid.out_constant, grid.out_points)
        read, at_in = _place(widths @ grid.in_terms.T + grid.in_constant, grid.in_points)
        row = np.arange(len(self.layers))
        out_low, out_high = (grid.out_points[row, at_out + i] for i in (0, 1))
        in_low, in_high = (grid.in_points[row, at_in + i] for i in (0, 1))
        low, high = (
            grid.ns[row, at_out, at_in + i] * (out_high - out)
            + grid.ns[row, at_out + 1, at_in + i] * (out - out_low)
            for i in (0, 1)
        )
        time = low * (in_high - read) + high * (read - in_low)
        return time, (out_high - out_low) * (in_high - in_low)

    @cached_property
    def _written(self) -> Products:
        return as_products(self.written, self.num_groups)

    @cached_property
    def _grid(self) -> _Grid:
        layers = self.layers
        out_points = _padded([layer.out_points for layer in layers], rising=True)
        in_points = _padded([layer.in_points for layer in layers], rising=True)
        shape = out_points.shape[1], in_points.shape[1]
        return _Grid(
            *width_matrix([layer.out_width for layer in layers], self.num_groups),
            *width_matrix([layer.in_width for layer in layers], self.num_groups),
            out_points,
            in_points,
            np.array([_padded_table(layer.ns, shape) for layer in layers]).reshape(-1, *shape),
        )


@dataclass(frozen=True, eq=False)
class _Grid:
    """All layers' points, padded to the same number by points that no width reaches."""

    out_terms: IntArray
    out_constant: IntArray
    in_terms: IntArray
    in_constant: IntArray
    out_points: IntArray
    in_points: IntArray
    ns: IntArray


def _place(widths: Any, points: IntArray) -> tuple[Any, NDArray[np.intp]]:
    """Widths within the points of their layers, and the last point that each is not below.

    Args:
        widths: ``(..., num_layers)``.
        points: ``(num_layers, num_points)``, the padding behind the widest.
    """
    inside = np.maximum(widths, points[:, 0])
    at = (inside[..., None] >= points).sum(axis=-1) - 1
    return inside, np.minimum(at, points.shape[1] - 2)


def _padded(rows: Sequence[Sequence[int]], *, rising: bool) -> IntArray:
    length = max([2, *(len(row) + 1 for row in rows)])
    return np.array(
        [[*row, *(row[-1] + 1 + i for i in range(length - len(row)))] for row in rows],
        dtype=np.int64,
    ).reshape(-1, length)


def _padded_table(ns: tuple[tuple[int, ...], ...], shape: tuple[int, int]) -> IntArray:
    table = np.array(ns, dtype=np.int64)
    missing = [(0, wanted - there) for wanted, there in zip(shape, table.shape, strict=True)]
    return np.pad(table, missing, mode="edge")


def _widths_of(entry: dict[str, Any]) -> dict[str, Width]:
    def width(value: dict[str, Any]) -> Width:
        return Width(constant=value["constant"], terms=tuple(map(tuple, value["terms"])))

    return {name: width(entry[name]) for name in ("out_width", "in_width")}


def monotone(times: FloatArray) -> FloatArray:
    """The nearest times, by the largest error, that never fall along either axis.

    It is the mean of the tightest such bounds above and below (Ubhaya 1974): what noise, or a width
    that a kernel happens to like, made faster than a narrower one.

    Args:
        times: ``(num_out_widths, num_in_widths)``, widths ascending.
    """
    above, below = times, times
    for axis in (0, 1):
        above = np.maximum.accumulate(above, axis=axis)
        below = np.flip(np.minimum.accumulate(np.flip(below, axis), axis=axis), axis)
    nearest: FloatArray = (above + below) / 2
    return nearest
