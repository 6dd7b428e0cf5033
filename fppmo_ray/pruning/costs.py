"""Costs of layers and sizes of tensors, as functions of the widths that a mask leaves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fppmo_ray.distribution.costs import Activations
from fppmo_ray.distribution.space import ChannelGroup, IntArray, LayerCost, TensorSize, Width
from fppmo_ray.pruning.extract import AxisUnits


@dataclass(frozen=True, kw_only=True, eq=False)
class CoupledCost:
    """Multiply-accumulates for one image: a constant times two widths."""

    layer: str
    """Name of the layer, or class name of the module that multiplies activations."""
    macs: int
    """Multiply-accumulates in the dense network."""
    out_units: IntArray
    """The unit of every output channel, -1 where it always stays."""
    in_units: IntArray
    """The unit of every input channel, -1 where it always stays."""


@torch.no_grad()
def run_and_count(
    network: nn.Module, inputs: tuple[Tensor, ...], run: Callable[..., Any] | None = None
) -> tuple[Any, int]:
    """Run a network, and return its output and torch's own count of multiply-accumulates.

    Args:
        network: The network.
        inputs: Its arguments; the count is for the whole batch.
        run: A function that runs the network on its arguments; None: the network's forward.
    """
    counter: Any = FlopCounterMode(display=False)
    counter.mod_tracker = _Untracked()
    with unfused(network), counter:
        output = (run or network)(*inputs)
    return output, int(counter.get_total_flops()) // 2


class _Untracked:
    """Replaces the part of torch's counter that follows modules, a fifth of the time of a pass."""

    parents = ("Global",)

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, *_: object) -> None:
        """Do nothing."""


@contextmanager
def unfused(network: nn.Module) -> Iterator[None]:
    """Compute fused attention and recurrent layers as matrix products, within the block.

    torch does not count the fused kernels on CPUs, and they hide their matrix products.

    Args:
        network: The network that is run.
    """
    fast, onednn = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    recurrent = any(isinstance(module, nn.RNNBase) for module in network.modules())
    torch.backends.mha.set_fastpath_enabled(False)
    # torch.backends.mkldnn.flags would warn about settings of other devices.
    torch._C._set_mkldnn_enabled(onednn and not recurrent)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch._C._set_mkldnn_enabled(onednn)


def layer_costs(
    costs: Sequence[CoupledCost], filter_of_unit: IntArray, groups: tuple[ChannelGroup, ...]
) -> tuple[LayerCost, ...]:
    """Return the cost of every layer as a function of the groups' widths.

    Args:
        costs: Costs of the dense network's layers.
        filter_of_unit: Index into the mask per unit, -1 for units that always stay; the last entry
            is that of unit -1.
        groups: Groups of the mask, in order.
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
    """Return the sizes of the parameters that lose elements, and the number of all others.

    Args:
        shapes: Shape of every parameter, by name.
        slices: Every (tensor, axis) that holds a filter of the space.
        groups: Groups of the space, in order.
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
    """Return the width of an axis as a function of the groups' widths.

    Every filter of a group holds equally many positions along the axis, by the group's definition.

    Args:
        units: The filter of every position along the axis, -1 = always kept.
        group_of: The group of every filter.
        groups: Groups of the space, in order.
    """
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
    """A tensor with memory of its own that the inference of one image allocates."""

    module: str
    """Class name of the module that computes it."""
    integer_bytes: int | None
    """Bytes per element of integers; None for floating point, which has the network's precision."""
    shape: tuple[int, ...]
    """Its shape in the dense network."""
    units: Mapping[int, IntArray]
    """For every tracked axis, the unit of every position, -1 where it always stays."""


def activations(
    tensors: Sequence[CoupledTensor],
    moments: Sequence[tuple[int, ...]],
    filter_of_unit: IntArray,
    groups: tuple[ChannelGroup, ...],
    float_bytes: int,
) -> Activations:
    """Return the sizes of all tensors as functions of the groups' widths.

    Args:
        tensors: Tensors that the dense network allocates.
        moments: Sets of these tensors, by index, that are alive together.
        filter_of_unit: Index into the mask per unit, -1 for units that always stay; the last entry
            is that of unit -1.
        groups: Groups of the mask, in order.
        float_bytes: Bytes per floating-point number in the network's precision.
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
    """Size in bytes as a product of two widths; a third sliced axis counts in its dense length."""
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
    """Width of an axis; an upper bound if filters of a group have unequal numbers of positions."""
    positions = np.bincount(filters[filters >= 0], minlength=len(group_of))
    groups = np.unique(group_of[positions > 0]).tolist()
    return Width(
        constant=int(np.count_nonzero(filters < 0)),
        terms=tuple((group, int(positions[group_of == group].max())) for group in groups),
    )
