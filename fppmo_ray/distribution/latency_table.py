"""Measured latency as a function of widths, in plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fppmo_ray.distribution.costs import (
    FloatArray,
    IntArray,
    Products,
    TensorSize,
    Width,
    as_products,
    width_matrix,
)

FS_PER_NS = 10**6
"""Femtoseconds in a nanosecond."""


@dataclass(frozen=True, kw_only=True)
class LayerLatency:
    """Measured latency of one layer at some of its widths."""

    layer: str
    """Name of the layer."""
    out_width: Width
    """Number of output channels."""
    in_width: Width
    """Number of input channels."""
    out_points: tuple[int, ...]
    """Output widths that were measured, ascending."""
    in_points: tuple[int, ...]
    """Input widths that were measured, ascending."""
    ns: tuple[tuple[int, ...], ...]
    """Nanoseconds: a row for every output width, and in it an entry for every input width. They
    never fall along a row or a column; see ``monotone``."""


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """The latency of a network as a function of its widths; a ``Cost`` in nanoseconds.

    It is the sum over the layers, interpolated between the measured widths, plus a time per byte
    that the network writes, plus a constant; the last two stand for norms, activation functions,
    additions and the overhead of calls. All numbers are whole, so the sum is exact, equal on every
    machine, and never falls as widths rise.
    """

    num_groups: int
    """Number of channel groups of the space."""
    layers: tuple[LayerLatency, ...]
    """Measured layers, or groups of them."""
    written: tuple[TensorSize, ...]
    """Bytes that the inference of one image writes."""
    fs_per_byte: int
    """Femtoseconds per byte written, >= 0."""
    constant_ns: int
    """Nanoseconds that do not depend on widths; negative where the savings of groups overlap."""
    dense_ns: int
    """Measured latency of the dense network; a ``latency_cut`` is a share of it."""

    def total(self, widths: IntArray) -> int:
        """Return the nanoseconds at kept filters per group, ``(num_groups,)``."""
        return int(self.totals(widths))

    def totals(self, widths: IntArray) -> IntArray:
        """Return the nanoseconds ``(...)`` at widths ``(..., num_groups)``."""
        time, per = self._interpolated(widths)
        rest = self._written.each(widths).sum(axis=-1) * self.fs_per_byte // FS_PER_NS
        totals: IntArray = (time // per).sum(axis=-1) + rest + self.constant_ns
        return totals

    def expected(self, widths: FloatArray) -> float:
        """Return the nanoseconds at fractional widths, ``(num_groups,)``."""
        time, per = self._interpolated(widths)
        rest = self._written.expected(widths) * self.fs_per_byte / FS_PER_NS
        return float((time / per).sum()) + rest + self.constant_ns

    def widened(self, widths: IntArray, steps: IntArray) -> IntArray:
        """Return the nanoseconds with each group alone widened, ``(num_groups,)``.

        Args:
            widths: Kept filters per group, ``(num_groups,)``.
            steps: Filters to add to each group, ``(num_groups,)``.
        """
        return self.totals(widths + np.diag(steps))

    def to_json(self) -> dict[str, Any]:
        """Return the table as plain lists and numbers, for ``from_json``."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LatencyTable:
        """Return the table that ``to_json`` described."""
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

    def _interpolated(self, widths: Any) -> tuple[Any, Any]:
        """Return the bilinear interpolation of every layer's time, as a fraction.

        The caller divides, so that whole numbers are rounded down once, in the same way everywhere.

        Args:
            widths: Kept filters per group, ``(..., num_groups)``.

        Returns:
            Numerators and denominators, each ``(..., num_layers)``.
        """
        # The layer's widths lie in a cell of its grid: in [out_low, out_high] x [in_low, in_high].
        grid = self._grid
        out, at_out = _place(widths @ grid.out_terms.T + grid.out_constant, grid.out_points)
        read, at_in = _place(widths @ grid.in_terms.T + grid.in_constant, grid.in_points)
        row = np.arange(len(self.layers))
        out_low, out_high = (grid.out_points[row, at_out + i] for i in (0, 1))
        in_low, in_high = (grid.in_points[row, at_in + i] for i in (0, 1))
        # Interpolate along the output width at both ends of the cell, then along the input width;
        # the denominator is the area of the cell.
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
        out_points = _padded_points([layer.out_points for layer in layers])
        in_points = _padded_points([layer.in_points for layer in layers])
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
    """The tables of all layers as arrays, padded with points beyond the widest layer."""

    out_terms: IntArray
    """``(num_layers, num_groups)``; with ``out_constant`` it gives output widths."""
    out_constant: IntArray
    """``(num_layers,)``."""
    in_terms: IntArray
    """``(num_layers, num_groups)``; with ``in_constant`` it gives input widths."""
    in_constant: IntArray
    """``(num_layers,)``."""
    out_points: IntArray
    """``(num_layers, num_out_points)``, ascending."""
    in_points: IntArray
    """``(num_layers, num_in_points)``, ascending."""
    ns: IntArray
    """``(num_layers, num_out_points, num_in_points)``; the last values repeat in the padding."""


def _place(widths: Any, points: IntArray) -> tuple[Any, NDArray[np.intp]]:
    """Return the widths raised to their layer's first point, and the cell that each lies in.

    Cell k of a layer is the interval from its point k to its point k + 1.

    Args:
        widths: Widths of the layers, ``(..., num_layers)``.
        points: Measured widths, ``(num_layers, num_points)``, the last of them padding.
    """
    inside = np.maximum(widths, points[:, 0])
    at = (inside[..., None] >= points).sum(axis=-1) - 1
    return inside, np.minimum(at, points.shape[1] - 2)


def _padded_points(rows: Sequence[Sequence[int]]) -> IntArray:
    """Return ascending rows at one length: each is continued upwards by at least one point."""
    length = max([2, *(len(row) + 1 for row in rows)])
    return np.array(
        [[*row, *(row[-1] + 1 + i for i in range(length - len(row)))] for row in rows],
        dtype=np.int64,
    ).reshape(-1, length)


def _padded_table(ns: tuple[tuple[int, ...], ...], shape: tuple[int, int]) -> IntArray:
    """Return a layer's table at the given shape: its last row and column are repeated."""
    table = np.array(ns, dtype=np.int64)
    missing = [(0, wanted - there) for wanted, there in zip(shape, table.shape, strict=True)]
    return np.pad(table, missing, mode="edge")


def _widths_of(entry: dict[str, Any]) -> dict[str, Width]:
    """Return the two widths that an entry of ``LatencyTable.to_json`` holds."""

    def width(value: dict[str, Any]) -> Width:
        return Width(constant=value["constant"], terms=tuple(map(tuple, value["terms"])))

    return {name: width(entry[name]) for name in ("out_width", "in_width")}


def monotone(times: FloatArray) -> FloatArray:
    """Return the nearest times that never fall along either axis; the largest error is least.

    Measured times may fall with width, through noise or because a kernel suits certain widths. The
    solution is the mean of the tightest monotone bounds above and below the times (Ubhaya 1974,
    isotone optimization).

    Args:
        times: ``(num_out_widths, num_in_widths)``, widths ascending.
    """
    # Above: the largest time of any narrower layer. Below: the smallest time of any wider one.
    above, below = times, times
    for axis in (0, 1):
        above = np.maximum.accumulate(above, axis=axis)
        below = np.flip(np.minimum.accumulate(np.flip(below, axis), axis=axis), axis)
    nearest: FloatArray = (above + below) / 2
    return nearest
