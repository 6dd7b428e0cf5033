"""The layers whose latency is measured by itself, and what each is at other widths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fppmo_ray.distribution.products import IntArray, Width
from fppmo_ray.distribution.space import BoolArray, ChannelGroup
from fppmo_ray.pruning.costs import width_of
from fppmo_ray.pruning.extract import select
from fppmo_ray.pruning.latency.timing import Call
from fppmo_ray.pruning.slices import AxisUnits, Side, Tracing

_Layer = _ConvNd | nn.Linear


@dataclass(frozen=True, eq=False)
class TimedLayer:
    """A convolution or linear layer that loses channels, as it is called in a pass."""

    name: str
    module: _Layer
    image_shape: tuple[int, ...]
    """Of what it reads in the dense network, with the batch."""
    parts: tuple[AxisUnits, ...]
    """Of its weight and bias."""
    out_width: Width
    in_width: Width

    def width(self, side: Side, keep: BoolArray) -> int:
        """Channels that it makes, or reads, under a mask."""
        for part in self.parts:
            if part.side == side and part.tensor.endswith("weight"):
                return int(part.kept(keep).sum())
        return (self.out_width if side == "output" else self.in_width).constant

    def at(self, out_keep: BoolArray, in_keep: BoolArray) -> Callable[[], Call]:
        """Makes a pass of the layer with the output widths of one mask and inputs of another."""
        kept: dict[tuple[str, int], IntArray] = {
            (part.tensor.rpartition(".")[2], part.axis): np.flatnonzero(
                part.kept(in_keep if part.side == "input" else out_keep)
            )
            for part in self.parts
        }

        def make() -> Call:
            layer = select(self.module, kept)
            assert isinstance(layer, _ConvNd | nn.Linear)
            images = _images(layer, self.image_shape)
            return lambda: layer(images)

        return make

    @property
    def kind(self) -> tuple[str, tuple[int, ...]]:
        """What layers share that take the same time at the same widths."""
        return repr(self.module), self.image_shape


def timed_layers(
    network: nn.Module, tracing: Tracing, inputs: tuple[Tensor, ...]
) -> list[TimedLayer]:
    """Every call of a convolution or linear layer that has a filter of the space.

    Args:
        network: The dense network, in eval mode.
        tracing: Of the network.
        inputs: What it is called with, with the batch.
    """
    parts: dict[str, list[AxisUnits]] = {}
    for part in tracing.slices:
        parts.setdefault(part.layer, []).append(part)
    groups = tracing.space.groups
    return [
        TimedLayer(
            name=name,
            module=module,
            image_shape=shape,
            parts=tuple(parts[name]),
            out_width=_width(parts[name], "output", groups),
            in_width=_width(parts[name], "input", groups),
        )
        for name, module, shape in _calls(network, inputs)
        if name in parts
    ]


@torch.no_grad()
def _calls(
    network: nn.Module, inputs: tuple[Tensor, ...]
) -> list[tuple[str, _Layer, tuple[int, ...]]]:
    """The layers in the order in which a pass calls them, with the shapes of what they read."""
    calls: list[tuple[str, _Layer, tuple[int, ...]]] = []
    names: dict[_Layer, str] = {
        module: name
        for name, module in network.named_modules()
        if isinstance(module, _ConvNd | nn.Linear)
    }

    def note(module: Any, read: tuple[Tensor, ...]) -> None:
        calls.append((names[module], module, tuple(read[0].shape)))

    hooks = [module.register_forward_pre_hook(note) for module in names]
    try:
        network(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _width(parts: list[AxisUnits], side: Side, groups: tuple[ChannelGroup, ...]) -> Width:
    group_of = np.repeat(np.arange(len(groups)), [group.num_filters for group in groups])
    for part in parts:
        if part.side == side and part.tensor.endswith("weight"):
            return width_of(part.units, group_of, groups)
    return Width(constant=1)  # the same at every mask, so that it tells nothing


def _images(layer: _Layer, shape: tuple[int, ...]) -> Tensor:
    """Random numbers of the shape that a layer reads once it has lost channels."""
    axis, width = (
        (len(shape) - 1 - len(layer.kernel_size), layer.in_channels)
        if isinstance(layer, _ConvNd)
        else (len(shape) - 1, layer.in_features)
    )
    sizes = [width if i == axis else length for i, length in enumerate(shape)]
    weight = layer.weight
    return torch.randn(sizes, device=weight.device, dtype=weight.dtype)
