"""The physically smaller network: index selection along the traced axes, and nothing else."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fppmo_ray.distribution.space import BoolArray, IntArray
from fppmo_ray.pruning.slices import Axis, Tracing


@torch.no_grad()
def extract(model: nn.Module, tracing: Tracing, keep: BoolArray) -> nn.Module:
    """Build the network that a mask leaves over; milliseconds, without re-tracing.

    Args:
        model: The traced network, or another of the same architecture. Left as it is.
        tracing: What ``trace`` said of it.
        keep: The mask, bool ``(num_filters,)``, True = kept.

    Returns:
        A network of the same class with tensors of its own; ``requires_grad``, dtype, device and
        training mode are those of ``model``.

    Raises:
        ValueError: the mask does not fit the space, or the network does not fit the tracing.
    """
    kept = tracing.kept_indices(keep)
    check_axes(model, tracing.axis_lengths)
    return select(model, kept)


def check_axes(model: nn.Module, axis_lengths: Mapping[Axis, int]) -> None:
    """Refuse a network whose tensors are not those the axes were written for.

    Raises:
        ValueError: a tensor is missing or has another length along an axis.
    """
    tensors = named_tensors(model)
    for (name, axis), length in axis_lengths.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.dim() <= axis or tensor.shape[axis] != length:
            shape = "none" if tensor is None else tuple(tensor.shape)
            raise ValueError(
                f"expected a network whose {name} has length {length} along axis {axis}, got "
                f"{shape}; use the architecture that was traced"
            )


@torch.no_grad()
def select(model: nn.Module, kept: Mapping[Axis, IntArray]) -> nn.Module:
    """Copy a network, selecting the kept indices along every named axis."""
    indices: dict[int, Tensor] = {}
    tensors = named_tensors(model)
    sliced: dict[str, Tensor] = {}
    for (name, axis), positions in kept.items():
        tensor = sliced.get(name, tensors[name])
        index = indices.get(id(positions))
        if index is None:
            index = indices[id(positions)] = torch.from_numpy(positions).to(tensor.device)
        sliced[name] = tensor.index_select(axis, index)
    smaller = _copy(
        model, {id(tensor): _like(tensor, sliced.get(name)) for name, tensor in tensors.items()}
    )
    layers = {name.rpartition(".")[0] for name, _ in kept}
    for layer in layers:
        _read_widths(smaller.get_submodule(layer))
    return smaller


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer once, under the first of its names."""
    return dict(chain(model.named_parameters(), model.named_buffers()))


def _copy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """``copy.deepcopy`` with the tensors of the memo in place of the model's.

    deepcopy takes what its memo holds instead of copying it. An empty shell of every module is put
    there too and filled with few calls, which makes it three times faster.
    """
    shells = [module for module in model.modules() if _is_plain(module)]
    for module in shells:
        memo[id(module)] = object.__new__(type(module))
    for module in shells:
        state = memo[id(module)].__dict__
        for key, value in module.__dict__.items():
            if isinstance(value, _IMMUTABLE):
                state[key] = value
            elif type(value) in _CONTAINERS and not value:  # a module has a dozen empty ones
                state[key] = type(value)()
            elif key != "_compiled_call_impl":  # bound to the module it was compiled for
                state[key] = copy.deepcopy(value, memo)
    copied: nn.Module = copy.deepcopy(model, memo)
    return copied


_IMMUTABLE = (bool, int, float, str, type(None))
_CONTAINERS = (dict, OrderedDict, set)


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is copied attribute by attribute, not in a way of its own."""
    kind = type(module)
    return (
        not hasattr(kind, "__deepcopy__")
        and kind.__reduce_ex__ is nn.Module.__reduce_ex__
        and kind.__getstate__ is nn.Module.__getstate__
    )


def _like(tensor: Tensor, values: Tensor | None) -> Tensor:
    """A new tensor of the same kind with these values, or with copies of its own."""
    values = tensor.detach().clone() if values is None else values
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(values, requires_grad=tensor.requires_grad)
    return values


def _read_widths(layer: nn.Module) -> None:
    """Set, in place, the widths a layer states to those its tensors have."""
    if isinstance(layer, _ConvNd):
        first, second = layer.weight.shape[:2]
        if 1 < layer.groups == layer.in_channels:  # depthwise: as many groups as channels
            per_channel = 1 if layer.transposed else layer.out_channels // layer.in_channels
            layer.groups = first // per_channel
        if layer.transposed:
            first, second = second * layer.groups, first
        else:
            second *= layer.groups
        layer.out_channels, layer.in_channels = first, second
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = len(layer.weight)
    elif isinstance(layer, nn.modules.batchnorm._NormBase):
        state = layer.running_mean if layer.weight is None else layer.weight
        assert state is not None  # a norm without state has no axis to slice
        layer.num_features = len(state)
