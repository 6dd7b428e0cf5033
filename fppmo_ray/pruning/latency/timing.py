"""Timing of layers and other calls on a device, one at a time and in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fppmo_ray.distribution.products import IntArray, Width
from fppmo_ray.distribution.space import BoolArray, ChannelGroup
from fppmo_ray.pruning.costs import width_of
from fppmo_ray.pruning.extract import AxisUnits, Side, Tracing, select

Call = Callable[[], object]
"""Runs something on the device."""

_TURNS = 8
_SAMPLES = 4  # of each turn
_SAMPLE_S = 1e-3  # what is over sooner is called several times in a row
_MOST_CALLS = 32


def seconds_in_turns(makers: Sequence[Callable[[], Call]], device: torch.device) -> list[float]:
    """Seconds of each call: the least of several turns that all of them take.

    What else the machine does can only add to a time, and comes and goes: so the least tells, and
    what is compared is measured in turns. Each call is made anew for each, since all of them
    together might not fit into memory.

    Args:
        makers: Each makes a call, with all that it needs, on the device.
        device: A CPU or a GPU.
    """
    least = [float("inf")] * len(makers)
    for _ in range(_TURNS):
        for index, make in enumerate(makers):
            least[index] = min(least[index], *_samples(make(), device))
    return least


def _samples(call: Call, device: torch.device) -> list[float]:
    _sample(call, 1, device)  # kernels are chosen, memory is taken
    calls = min(_MOST_CALLS, max(1, round(_SAMPLE_S / _sample(call, 1, device))))
    return [_sample(call, calls, device) for _ in range(_SAMPLES)]


def _sample(call: Call, calls: int, device: torch.device) -> float:
    """Seconds of one of several calls in a row."""
    if device.type == "cuda":
        return _cuda_sample(call, calls, device)
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls


def _cuda_sample(call: Call, calls: int, device: torch.device) -> float:
    """By the device's own clock, waiting for the next kernel included."""
    begin: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(device)
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize(device)
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds / 1000 / calls


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
