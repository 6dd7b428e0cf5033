"""A tracing as plain data, and extraction of the smaller network by selecting indices."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.weight_norm import WeightNorm

from fppmo_ray.distribution.space import BoolArray, IntArray, PruningSpace
from fppmo_ray.pruning.copying import DetachedCopies, with_plain_weights
from fppmo_ray.pruning.network_io import opened
from fppmo_ray.training.device import copy_to

Axis = tuple[str, int]
"""A tensor's name as in the state dict, and one of its axes."""

Side = Literal["output", "input", "along"]
"""Role of an axis in its layer: the channels it outputs, takes as input, or passes on."""


def layer_of(tensor: str) -> str:
    """Return the name of the layer that a tensor belongs to, also if it is parametrized.

    Args:
        tensor: Name as in the state dict, such as ``conv.weight``, or
            ``conv.parametrizations.weight.original0``.
    """
    holder = tensor.rpartition(".")[0]
    return f".{holder}".partition(".parametrizations.")[0][1:]


@dataclass(frozen=True, kw_only=True, eq=False)
class AxisUnits:
    """The filter that every position along one axis of one tensor belongs to."""

    tensor: str
    """Name of the tensor in the state dict."""
    axis: int
    """Axis of the tensor."""
    units: IntArray
    """``(length of the axis,)``: the filter's index in a mask, -1 = always kept."""
    side: Side
    """``output`` or ``input`` of convolutions and linear layers; ``along`` for batch norm, PReLU
    and other layers that act on each channel. A depthwise convolution has only an ``output``."""

    @property
    def layer(self) -> str:
        """Name of the layer that holds the tensor."""
        return layer_of(self.tensor)

    def kept(self, keep: BoolArray) -> BoolArray:
        """Return which positions along the axis a mask keeps, bool ``(length of the axis,)``."""
        return np.append(keep, True)[self.units]  # unit -1 reads the appended True


NumberKey = tuple[str, str, int | str | None]
"""Name of a module, one of its attributes, and the place in it if it is a tuple, list or dict."""


@dataclass(frozen=True, kw_only=True, eq=False)
class NumberUnits:
    """An integer that a module keeps and that states a width."""

    number: NumberKey
    """Where it is kept."""
    units: IntArray
    """The filter of every channel that it counts, as in ``AxisUnits``."""


@dataclass(frozen=True, kw_only=True)
class Tracing:
    """A traced network as plain numpy data, from which ``extract`` prunes without re-tracing."""

    space: PruningSpace
    """The channel groups and exact costs."""
    slices: tuple[AxisUnits, ...]
    """Every (tensor, axis) that holds at least one filter of the space."""
    left_whole: tuple[str, ...] = ()
    """Names of the groups that cannot be pruned exactly and are not part of the space."""
    numbers: tuple[NumberUnits, ...] = ()
    """Every integer of a module that states a width of the space."""

    def widths_of_numbers(self, keep: BoolArray) -> dict[NumberKey, int]:
        """Return the values of the integers that state widths, where a mask changes them.

        Args:
            keep: The mask, bool ``(num_filters,)``, True = kept.
        """
        flags = np.append(keep, True)  # unit -1 reads the appended True
        widths = {part.number: int(flags[part.units].sum()) for part in self.numbers}
        return {
            part.number: widths[part.number]
            for part in self.numbers
            if widths[part.number] != len(part.units)
        }

    @cached_property
    def axis_lengths(self) -> Mapping[Axis, int]:
        """Length of every sliced axis in the dense network."""
        return {(part.tensor, part.axis): len(part.units) for part in self.slices}

    def kept_indices(self, keep: BoolArray) -> dict[Axis, IntArray]:
        """Return the positions to select along every axis that loses some.

        Args:
            keep: The mask, bool ``(num_filters,)``, True = kept.

        Raises:
            ValueError: the mask has another type or shape, or empties a group.
        """
        check_mask(self.space, keep)
        positions: dict[bytes, IntArray | None] = {}  # many axes have the same units
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
    """Check that a mask fits a space.

    Args:
        space: The space of the network.
        keep: The mask, bool ``(num_filters,)``, True = kept.

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
        if width < group.floor:
            raise ValueError(
                f"the mask keeps {width} filters of group {group.name}, expected {group.floor} or "
                "more: the network's code decides by this width, and with fewer it would be "
                "another network"
            )


@torch.no_grad()
def extract(model: nn.Module, tracing: Tracing, keep: BoolArray) -> nn.Module:
    """Build the smaller network of a mask by selecting indices; takes milliseconds.

    Args:
        model: The traced network, or another of the same architecture; not changed.
        tracing: What ``trace`` returned for it.
        keep: The mask, bool ``(num_filters,)``, True = kept.

    Returns:
        A network of the same class with tensors of its own; ``requires_grad``, dtype, device and
        training mode are those of ``model``. Parametrized weights become plain parameters.

    Raises:
        ValueError: the mask does not fit the space, or the network does not fit the tracing.
    """
    model = opened(model)
    kept = tracing.kept_indices(keep)
    model = with_plain_weights(model)
    check_axes(model, tracing.axis_lengths)
    return select(model, kept, tracing.widths_of_numbers(keep))


def check_axes(model: nn.Module, axis_lengths: Mapping[Axis, int]) -> None:
    """Check that a network's tensors have given lengths.

    Args:
        model: The network.
        axis_lengths: Expected length along every (tensor, axis).

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
def select(
    model: nn.Module,
    kept: Mapping[Axis, IntArray],
    numbers: Mapping[NumberKey, int] | None = None,
    *,
    shares: bool = False,
) -> nn.Module:
    """Copy a network, selecting indices along some axes.

    Args:
        model: The dense network; not changed.
        kept: Indices to select along every (tensor, axis) that loses some.
        numbers: New values of integers that modules keep.
        shares: Whether parameters that lose nothing are the dense network's own.
    """
    tensors = named_tensors(model)
    indices = _on_devices(kept, tensors)
    sliced: dict[str, Tensor] = {}
    for (name, axis), positions in kept.items():
        tensor = sliced.get(name, tensors[name])
        sliced[name] = selected(tensor, axis, indices[id(positions), tensor.device])
    memo = {
        id(tensor): tensor
        if shares and name not in sliced and isinstance(tensor, nn.Parameter)
        else _like(tensor, sliced.get(name))
        for name, tensor in tensors.items()
    }
    smaller = replaced(model, memo)
    changed = {id(tensors[name]) for name in sliced}
    for holder, module in model.named_modules():
        own = chain(module._parameters.values(), module._buffers.values())
        if any(id(tensor) in changed for tensor in own):
            _read_widths(smaller.get_submodule(layer_of(f"{holder}.")))
    for (holder, attribute, place), width in (numbers or {}).items():
        state = vars(smaller.get_submodule(holder))
        state[attribute] = with_number(state[attribute], place, width)
    return smaller


def selected(tensor: Tensor, axis: int, indices: Tensor) -> Tensor:
    """Return a tensor at some indices along an axis.

    Args:
        tensor: The tensor.
        axis: Its axis, 0 or more.
        indices: Places along the axis, int ``(num_indices,)``.
    """
    if isinstance(tensor, FakeTensor):  # it has no numbers
        return tensor.new_empty((*tensor.shape[:axis], len(indices), *tensor.shape[axis + 1 :]))
    place: tuple[Any, ...] = (*[slice(None)] * axis, indices)
    return tensor[place]  # up to five times faster than index_select


def with_number(value: Any, place: int | str | None, number: int) -> Any:
    """Return a module's attribute with another number in it.

    Args:
        value: The attribute: an integer, tuple, list or dict.
        place: Where the number is in it; None: it is the attribute.
        number: The new number.
    """
    if place is None:
        return number
    if isinstance(value, dict):
        return {**value, place: number}
    return type(value)(number if i == place else part for i, part in enumerate(value))


def _on_devices(
    kept: Mapping[Axis, IntArray], tensors: Mapping[str, Tensor]
) -> dict[tuple[int, torch.device], Tensor]:
    """Return every array of positions by its id and a device, on the device of its tensors.

    All positions go to a device in a single copy.
    """
    arrays: dict[torch.device, dict[int, IntArray]] = {}
    for (name, _), positions in kept.items():
        arrays.setdefault(tensors[name].device, {})[id(positions)] = positions
    copied: dict[tuple[int, torch.device], Tensor] = {}
    for device, wanted in arrays.items():
        together = copy_to(device, torch.from_numpy(np.concatenate(list(wanted.values()))))
        parts = torch.split(together, [len(positions) for positions in wanted.values()])
        copied |= {(key, device): part for key, part in zip(wanted, parts, strict=True)}
    return copied


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer once, under the first of its names."""
    return dict(chain(model.named_parameters(), model.named_buffers()))


def replaced(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """``copy.deepcopy`` that uses the tensors in the memo instead of copying the model's.

    An empty shell of every module is put in the memo too and filled with few calls, which is three
    times faster than letting deepcopy reconstruct the modules.
    """
    shells = [module for module in model.modules() if _is_plain(module)]
    for module in shells:
        memo[id(module)] = object.__new__(type(module))
    with DetachedCopies():
        _fill(shells, memo)
        copied: nn.Module = copy.deepcopy(model, memo)
    return copied


def _fill(shells: list[nn.Module], memo: dict[int, Any]) -> None:
    """Copy the attributes of modules to their empty shells in the memo."""
    for module in reversed(shells):  # children first: a compiled module reads its own at once
        state = memo[id(module)].__dict__
        for key, value in module.__dict__.items():
            if isinstance(value, _IMMUTABLE) or (
                type(value) is tuple and all(isinstance(part, _IMMUTABLE) for part in value)
            ):
                state[key] = value
            elif key in _OWN and all(part is None or id(part) in memo for part in value.values()):
                state[key] = type(value)(
                    (name, None if part is None else memo[id(part)]) for name, part in value.items()
                )
            elif type(value) in _CONTAINERS and not value:  # a module has a dozen empty ones
                state[key] = type(value)()
            elif key != "_compiled_call_impl":  # bound to the module it was compiled for
                state[key] = copy.deepcopy(value, memo)


_IMMUTABLE = (bool, int, float, str, type(None))
_OWN = ("_parameters", "_buffers", "_modules")
_CONTAINERS = (dict, OrderedDict, set)


def _is_plain(module: nn.Module) -> bool:
    """Whether a module has the default way of being copied, attribute by attribute."""
    kind = type(module)
    return (
        not hasattr(kind, "__deepcopy__")
        and kind.__reduce_ex__ is nn.Module.__reduce_ex__
        and kind.__getstate__ is nn.Module.__getstate__
    )


def _like(tensor: Tensor, values: Tensor | None) -> Tensor:
    """A new parameter or buffer with these values, or with a copy of the tensor's own."""
    values = tensor.detach().clone() if values is None else values
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(values, requires_grad=tensor.requires_grad)
    return values


_DERIVING = (BasePruningMethod, WeightNorm)
"""Hooks that compute a weight from other tensors before each pass."""


def _read_widths(layer: nn.Module) -> None:
    """Set the width attributes of a layer, in place, to the shapes of its tensors."""
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, _DERIVING):
            hook(layer, ())
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
    elif isinstance(layer, nn.GroupNorm):
        per_group = layer.num_channels // layer.num_groups
        layer.num_channels = len(layer.weight)
        layer.num_groups = layer.num_channels // per_group
    elif isinstance(layer, nn.modules.batchnorm._NormBase):
        state = layer.running_mean if layer.weight is None else layer.weight
        assert state is not None  # a norm without state has no axis to slice
        layer.num_features = len(state)
