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

from fppmo_ray.distribution.costs import IntArray, Width
from fppmo_ray.distribution.space import BoolArray, ChannelGroup
from fppmo_ray.pruning.costs import width_of
from fppmo_ray.pruning.extract import AxisUnits, Side, Tracing, select
from fppmo_ray.training.device import device_module

Call = Callable[[], object]
"""Runs a computation on the device."""

_TURNS, _FEWEST_TURNS = 8, 3
_ENOUGH_S = 0.5  # per call: then the fewest turns do, since long calls differ less
_SAMPLES = 4  # per turn
_SAMPLE_S = 1e-3  # shorter calls are repeated within a sample until they take this long
_MOST_CALLS = 32  # per sample


def seconds_in_turns(makers: Sequence[Callable[[], Call]], device: torch.device) -> list[float]:
    """Return the seconds of each call: the minimum over several rounds through all calls.

    Other processes can only add to a time, so the minimum is the estimate. Their load changes over
    time, so calls that are compared take turns. Each call is made anew for every turn, since all of
    them together might not fit into memory.

    Args:
        makers: Functions that each prepare one call with its data on the device.
        device: The CPU or GPU that runs the calls.

    Returns:
        Seconds of one run of each call, in order.
    """
    least, begin = [float("inf")] * len(makers), time.perf_counter()
    for turn in range(_TURNS):
        for index, make in enumerate(makers):
            least[index] = min(least[index], *_samples(make(), device))
        has_enough = time.perf_counter() - begin > _ENOUGH_S * len(makers)
        if has_enough and turn + 1 >= _FEWEST_TURNS:
            break
    return least


def _samples(call: Call, device: torch.device) -> list[float]:
    _sample(call, 1, device)  # warm-up: kernels are chosen, memory is allocated
    calls = min(_MOST_CALLS, max(1, round(_SAMPLE_S / _sample(call, 1, device))))
    return [_sample(call, calls, device) for _ in range(_SAMPLES)]


def _sample(call: Call, calls: int, device: torch.device) -> float:
    """Mean seconds of one call, over several in a row."""
    if device.type != "cpu":
        return _gpu_sample(call, calls, device)
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls


def _gpu_sample(call: Call, calls: int, device: torch.device) -> float:
    """Mean seconds by the GPU's own clock, including gaps between kernels."""
    gpu = device_module(device)
    begin, end = (gpu.Event(enable_timing=True) for _ in range(2))
    gpu.synchronize(device)
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    gpu.synchronize(device)
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds / 1000 / calls


_Layer = _ConvNd | nn.Linear


@dataclass(frozen=True, eq=False)
class TimedLayer:
    """One call of a convolution or linear layer that can lose channels."""

    name: str
    """Name of the layer in the network."""
    module: _Layer
    """The dense layer."""
    image_shape: tuple[int, ...]
    """Shape of its input in the dense network, with the batch axis."""
    parts: tuple[AxisUnits, ...]
    """The sliced axes of its weight and bias."""
    out_width: Width
    """Output channels as a function of the groups' widths."""
    in_width: Width
    """Input channels as a function of the groups' widths."""

    def width(self, side: Side, keep: BoolArray) -> int:
        """Return its number of output or input channels under a mask.

        Args:
            side: ``output`` or ``input``.
            keep: The mask, bool ``(num_filters,)``, True = kept.
        """
        for part in self.parts:
            if part.side == side and part.tensor.endswith("weight"):
                return int(part.kept(keep).sum())
        return (self.out_width if side == "output" else self.in_width).constant

    def at(self, out_keep: BoolArray, in_keep: BoolArray) -> Callable[[], Call]:
        """Return a function that prepares a pass of the layer at given widths.

        Args:
            out_keep: Mask that decides the output width.
            in_keep: Mask that decides the input width.
        """
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
        """A key that is equal for layers which take the same time at equal widths."""
        return repr(self.module), self.image_shape


def timed_layers(
    network: nn.Module, tracing: Tracing, inputs: tuple[Tensor, ...]
) -> list[TimedLayer]:
    """Return every call of a convolution or linear layer that has a filter of the space.

    Args:
        network: The dense network, in eval mode.
        tracing: What ``trace`` returned for it.
        inputs: Arguments of its forward, with the batch axis.
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
    """All layers in the order in which a pass calls them, with the shapes of their inputs."""
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
    return Width(constant=1)  # not sliced: the same for every mask


def _images(layer: _Layer, shape: tuple[int, ...]) -> Tensor:
    """Random input for a layer that has lost channels; ``shape`` is that of the dense input."""
    axis, width = (
        (len(shape) - 1 - len(layer.kernel_size), layer.in_channels)
        if isinstance(layer, _ConvNd)
        else (len(shape) - 1, layer.in_features)
    )
    sizes = [width if i == axis else length for i, length in enumerate(shape)]
    weight = layer.weight
    return torch.randn(sizes, device=weight.device, dtype=weight.dtype)
