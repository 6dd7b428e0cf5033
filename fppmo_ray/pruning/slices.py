"""What tracing a network yields: its space of masks, and where each filter sits in each tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from fppmo_ray.distribution.space import BoolArray, IntArray, PruningSpace

Axis = tuple[str, int]
"""A tensor's name as in the state dict, and one of its axes."""

Side = Literal["output", "input", "along"]
"""What an axis is to its layer: the channels it makes, those it reads, or those it passes on."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AxisUnits:
    """Which filter every position along one axis of one tensor belongs to."""

    tensor: str
    """Name as in the state dict."""
    axis: int
    units: IntArray
    """``(length of the axis,)``: the filter's index in a mask, -1 = always kept."""
    side: Side
    """``output`` and ``input`` of convolutions and linear layers; ``along`` for batch norm, PReLU
    and the like. A depthwise convolution has an ``output`` alone."""

    @property
    def layer(self) -> str:
        """Name of the layer that holds the tensor."""
        return self.tensor.rpartition(".")[0]

    def kept(self, keep: BoolArray) -> BoolArray:
        """Which positions along the axis a mask keeps."""
        return np.append(keep, True)[self.units]  # unit -1 reads the appended True


@dataclass(frozen=True, kw_only=True)
class Tracing:
    """A traced network as plain numpy data; ``extract`` needs nothing more, and never re-traces."""

    space: PruningSpace
    slices: tuple[AxisUnits, ...]
    """Every (tensor, axis) that holds at least one filter of the space."""
    left_whole: tuple[str, ...] = ()
    """Names of the groups that cannot be pruned exactly, and so are not part of the space."""

    @cached_property
    def axis_lengths(self) -> Mapping[Axis, int]:
        """Length in the dense network of every axis that can be sliced."""
        return {(part.tensor, part.axis): len(part.units) for part in self.slices}

    def kept_indices(self, keep: BoolArray) -> dict[Axis, IntArray]:
        """The positions to select along every axis that loses some.

        Args:
            keep: The mask, bool ``(num_filters,)``, True = kept.

        Raises:
            ValueError: the mask has another type or shape, or empties a group.
        """
        check_mask(self.space, keep)
        positions: dict[bytes, IntArray | None] = {}  # most axes share their units with others
        kept: dict[Axis, IntArray] = {}
        for part in self.slices:
            key = part.units.tobytes()
            if key not in positions:
                flags = part.kept(keep)
                positions[key] = None if flags.all() else np.flatnonzero(flags)
            indices = positions[key]
            if indices is not None:
                kept[part.tensor, part.axis] = indices
        return kept


def check_mask(space: PruningSpace, keep: BoolArray) -> None:
    """Refuse what is no mask of this space.

    Raises:
        ValueError: the mask has another type or shape, or empties a group.
    """
    if not isinstance(keep, np.ndarray) or keep.dtype != np.bool_:
        kind = keep.dtype if isinstance(keep, np.ndarray) else type(keep).__name__
        raise ValueError(f"a mask must be a numpy array of bool (True = kept), got {kind}")
    if keep.shape != (space.num_filters,):
        raise ValueError(
            f"a mask of this network has shape ({space.num_filters},), got {keep.shape}; "
            "it belongs to another network"
        )
    for group, width in zip(space.groups, space.widths(keep), strict=True):
        if width == 0:
            raise ValueError(
                f"the mask removes all {group.num_filters} filters of group {group.name}; "
                "keep at least one"
            )
