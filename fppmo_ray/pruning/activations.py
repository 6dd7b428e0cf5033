"""How large the tensors of an inference are, as a function of the widths that a mask leaves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fppmo_ray.distribution.activations import Activations
from fppmo_ray.distribution.products import IntArray, TensorSize, Width
from fppmo_ray.distribution.space import ChannelGroup

_ONE = Width(constant=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class CoupledTensor:
    """A tensor with memory of its own that an inference of one image makes."""

    module: str
    """Class of the module that computes it."""
    integer_bytes: int | None
    """Of an element; None of floating-point numbers, whose precision is the network's."""
    shape: tuple[int, ...]
    units: Mapping[int, IntArray]
    """Per axis that is followed, one unit for every position, -1 where it always stays."""


def activations(
    tensors: Sequence[CoupledTensor],
    moments: Sequence[tuple[int, ...]],
    filter_of_unit: IntArray,
    groups: tuple[ChannelGroup, ...],
    float_bytes: int,
) -> Activations:
    """The sizes of all tensors, with the groups that their widths follow.

    Args:
        tensors: Of the dense network.
        moments: Which of them are there together, by index.
        filter_of_unit: A mask's index per unit, -1 for those that always stay; the last entry is
            that of unit -1.
        groups: Of the mask, in order.
        float_bytes: Of a floating-point number of the network's precision.
    """
    group_of = np.repeat(np.arange(len(groups)), [group.num_filters for group in groups])
    return Activations(
        tensors=tuple(
            _size(tensor, filter_of_unit, group_of, tensor.integer_bytes or float_bytes)
            for tensor in tensors
        ),
        moments=tuple(moments),
        num_groups=len(groups),
    )


def _size(
    tensor: CoupledTensor, filter_of_unit: IntArray, group_of: IntArray, item_bytes: int
) -> TensorSize:
    """In bytes; along a third axis that loses positions it counts as it is in the dense network."""
    followed = {axis: filter_of_unit[units] for axis, units in tensor.units.items()}
    sliced = [axis for axis, filters in followed.items() if (filters >= 0).any()][:2]
    rest = [length for axis, length in enumerate(tensor.shape) if axis not in sliced]
    widths = [_width(followed[axis], group_of) for axis in sliced]
    out, read = [*widths, _ONE, _ONE][:2]
    return TensorSize(
        tensor=tensor.module,
        per_pair=item_bytes * math.prod(rest),
        out_width=out,
        in_width=read,
    )


def _width(filters: IntArray, group_of: IntArray) -> Width:
    """Positions along an axis; where filters of a group hold unlike numbers, at most so many."""
    positions = np.bincount(filters[filters >= 0], minlength=len(group_of))
    groups = np.unique(group_of[positions > 0]).tolist()
    return Width(
        constant=int(np.count_nonzero(filters < 0)),
        terms=tuple((group, int(positions[group_of == group].max())) for group in groups),
    )
