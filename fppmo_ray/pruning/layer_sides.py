"""The sides of a layer: channels it makes, reads or passes on, and the tensor axes they span."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from fppmo_ray.pruning.slices import Axis, Side


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerSide:
    """One side of a layer and the tensor axes that follow its width."""

    layer: str
    module: Any
    side: Side
    axes: tuple[Axis, ...]
    length: int
    sliceable: bool
    """False where nothing that reaches this side can be pruned."""


def layer_sides(module: Any, name: str, tensors: Mapping[str, Tensor]) -> list[LayerSide]:
    """All sides of a layer; none for what has no weights.

    Args:
        module: A layer, or a parameter that belongs to none of the usual layers.
        name: Its name in the model.
        tensors: The model's parameters and buffers by name.
    """

    def side(kind: Side, length: int, axis: int, *parts: str, sliceable: bool = True) -> LayerSide:
        paths = [f"{name}.{part}" if part else name for part in parts]
        present = [path for path in paths if path in tensors]
        return LayerSide(
            layer=name,
            module=module,
            side=kind,
            # A bias has but one axis, whichever the weight's is.
            axes=tuple((path, min(axis, tensors[path].dim() - 1)) for path in present),
            length=length,
            sliceable=sliceable,
        )

    if isinstance(module, _ConvNd):
        known = f"{name}.weight" in tensors and _conv_is_sliceable(module)
        out_axis, in_axis = (1, 0) if module.transposed else (0, 1)
        output = side("output", module.out_channels, out_axis, "weight", "bias", sliceable=known)
        if module.groups == module.in_channels == module.out_channels > 1:
            return [output]
        # The input of a depthwise convolution spans no axis: its filters are its channels.
        read = [] if is_depthwise(module) else ["weight"]
        return [output, side("input", module.in_channels, in_axis, *read, sliceable=known)]
    if isinstance(module, nn.Linear):
        known = f"{name}.weight" in tensors
        return [
            side("output", module.out_features, 0, "weight", "bias", sliceable=known),
            side("input", module.in_features, 1, "weight", sliceable=known),
        ]
    if isinstance(module, _NormBase):
        state = ("weight", "bias", "running_mean", "running_var")
        known = any(f"{name}.{part}" in tensors for part in state)  # else nothing tells its width
        return [side("along", module.num_features, 0, *state, sliceable=known)]
    if isinstance(module, nn.PReLU):
        shared = module.num_parameters == 1
        return [] if shared else [side("along", module.num_parameters, 0, "weight")]
    if isinstance(module, nn.Parameter):  # a layer scale, say: its last axis longer than one
        axis = max((axis for axis, length in enumerate(module.shape) if length > 1), default=0)
        return [side("along", module.shape[axis], axis, "")] if module.numel() > 1 else []
    if any(True for _ in module.parameters(recurse=False)):
        return [side("along", 0, 0, sliceable=False)]  # weights of a kind we cannot slice
    return []


def is_depthwise(conv: _ConvNd) -> bool:
    """Whether every input channel has filters of its own."""
    return not conv.transposed and 1 < conv.groups == conv.in_channels


def _conv_is_sliceable(conv: _ConvNd) -> bool:
    """Not where the dependency graph takes a grouped convolution for a depthwise one."""
    if conv.groups == 1 or is_depthwise(conv):
        return True
    return not conv.transposed and conv.groups != conv.out_channels
