"""What every layer costs, as a function of the widths that a mask leaves."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.flop_counter import FlopCounterMode

from fppmo_ray.distribution.space import ChannelGroup, IntArray, LayerCost, Width
from fppmo_ray.pruning.slices import AxisUnits


@torch.no_grad()
def layer_macs(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[dict[str, int], int]:
    """Multiply-accumulates per image of every convolution and linear layer, and of the network.

    Args:
        model: The network in eval mode.
        inputs: A batch; the first axis counts images.

    Returns:
        MACs per layer, those of a shared layer over all its uses, and the network's total.
    """
    macs: defaultdict[str, int] = defaultdict(int)

    def hook(name: str) -> Any:
        def count(layer: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            macs[name] += _num_positions(layer, args[0], output) * layer.weight.numel()

        return count

    layers = [(name, layer) for name, layer in model.named_modules() if _is_weighted(layer)]
    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers]
    try:
        total = network_macs(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: count // len(inputs[0]) for name, count in macs.items()}, total


@torch.no_grad()
def network_macs(model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Multiply-accumulates per image, by torch's own count."""
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    return int(counter.get_total_flops()) // (2 * len(inputs[0]))


def layer_costs(
    model: nn.Module,
    macs: Mapping[str, int],
    slices: tuple[AxisUnits, ...],
    groups: tuple[ChannelGroup, ...],
) -> tuple[LayerCost, ...]:
    """The cost of every layer that ``layer_macs`` counted, with the groups its widths follow."""
    units = {(part.tensor, part.axis): part.units for part in slices}
    group_of = np.repeat(np.arange(len(groups)), [group.num_filters for group in groups])

    def width(layer: str, axis: int) -> Width:
        length = model.get_parameter(f"{layer}.weight").shape[axis]
        along = units.get((f"{layer}.weight", axis), np.full(length, -1))
        return _width(along, group_of, groups)

    costs = []
    for layer, count in macs.items():
        module: Any = model.get_submodule(layer)
        out_axis, in_axis = (1, 0) if getattr(module, "transposed", False) else (0, 1)
        costs.append(
            LayerCost(
                layer=layer,
                macs_per_pair=count // math.prod(module.weight.shape[:2]),
                out_width=width(layer, out_axis),
                in_width=width(layer, in_axis),
            )
        )
    return tuple(costs)


def _width(units: IntArray, group_of: IntArray, groups: tuple[ChannelGroup, ...]) -> Width:
    """Every filter of a group holds equally many positions: that is what makes it a group."""
    positions = np.bincount(group_of[units[units >= 0]], minlength=len(groups))
    terms = [
        (index, int(count) // groups[index].num_filters)
        for index, count in enumerate(positions)
        if count
    ]
    return Width(constant=int(np.count_nonzero(units < 0)), terms=tuple(terms))


def _is_weighted(layer: nn.Module) -> bool:
    return isinstance(layer, _ConvNd | nn.Linear)


def _num_positions(layer: Any, read: Tensor, made: Tensor) -> int:
    """How often the layer's weights are applied: output positions over all images."""
    if isinstance(layer, nn.Linear):
        return made.numel() // layer.out_features
    assert isinstance(layer, _ConvNd)
    if layer.transposed:
        return read.numel() // layer.in_channels
    return made.numel() // layer.out_channels
