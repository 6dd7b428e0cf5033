"""Costs of layers and sizes of tensors, as functions of the widths that a mask leaves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fppmo_ray.distribution.activations import Activations
from fppmo_ray.distribution.space import ChannelGroup, IntArray, LayerCost, TensorSize, Width
from fppmo_ray.pruning.extract import AxisUnits


@dataclass(frozen=True, kw_only=True, eq=False)
class CoupledCost:
    """Multiply-accumulates for one image: a constant times two widths."""

    layer: str
    macs: int
    """Of the dense network."""
    out_units: IntArray
    """One unit per channel that it makes, -1 where it always stays."""
    in_units: IntArray


@torch.no_grad()
def run_and_count(model: Callable[..., Any], inputs: tuple[Tensor, ...]) -> tuple[Any, int]:
    """What a network, or a function that runs it, returns, and its multiply-accumulates.

    These are by torch's own count, for all that is put in. Fused attention, which torch does not
    count on CPUs, is computed as matrix products.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            output = model(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return output, int(counter.get_total_flops()) // 2


def first_of(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One image of a batch: what MACs are counted for, since not all of them grow with batches."""
    return tuple(tensor[:1] for tensor in inputs)


def layer_costs(
    costs: Sequence[CoupledCost], filter_of_unit: IntArray, groups: tuple[ChannelGroup, ...]
) -> tuple[LayerCost, ...]:
    """The cost of every layer, with the groups that its widths follow.

    Args:
        costs: Of the dense network.
        filter_of_unit: A mask's index per unit, -1 for those that always stay; the last entry is
            that of unit -1.
        groups: Of the mask, in order.
    """
    group_of = np.repeat(np.arange(len(groups)), [group.num_filters for group in groups])
    return tuple(
        LayerCost(
            layer=cost.layer,
            macs_per_pair=cost.macs // (len(cost.out_units) * len(cost.in_units)),
            out_width=width_of(filter_of_unit[cost.out_units], group_of, groups),
            in_width=width_of(filter_of_unit[cost.in_units], group_of, groups),
        )
        for cost in costs
    )


def tensor_sizes(
    shapes: Mapping[str, tuple[int, ...]],
    slices: Sequence[AxisUnits],
    groups: tuple[ChannelGroup, ...],
) -> tuple[tuple[TensorSize, ...], int]:
    """The sizes of the parameters that lose elements, and the number of all other elements.

    Args:
        shapes: Of all parameters, by name.
        slices: Every (tensor, axis) that holds a filter of the space.
        groups: Of the space.
    """
    group_of = np.repeat(np.arange(len(groups)), [group.num_filters for group in groups])
    widths: dict[str, list[tuple[int, Width]]] = {}
    for part in slices:
        if part.tensor in shapes:
            width = width_of(part.units, group_of, groups)
            widths.setdefault(part.tensor, []).append((part.axis, width))
    one, sizes = Width(constant=1), []
    for tensor, along in widths.items():
        assert len(along) <= 2, f"{tensor} has filters along more than two axes"
        sliced = {axis for axis, _ in along}
        rest = [n for axis, n in enumerate(shapes[tensor]) if axis not in sliced]
        out, read = [*(width for _, width in along), one][:2]
        sizes.append(
            TensorSize(tensor=tensor, per_pair=math.prod(rest), out_width=out, in_width=read)
        )
    constant = sum(math.prod(shape) for name, shape in shapes.items() if name not in widths)
    return tuple(sizes), constant


def width_of(units: IntArray, group_of: IntArray, groups: tuple[ChannelGroup, ...]) -> Width:
    """Every filter of a group holds equally many positions: that is what makes it a group."""
    positions = np.bincount(group_of[units[units >= 0]], minlength=len(groups))
    terms = [
        (index, int(count) // groups[index].num_filters)
        for index, count in enumerate(positions)
        if count
    ]
    return Width(constant=int(np.count_nonzero(units < 0)), terms=tuple(terms))


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
