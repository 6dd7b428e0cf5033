"""Sizes and numbers as a network's code sees them while it is traced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from fppmo_ray.distribution.space import IntArray
from fppmo_ray.pruning.dependency.disjoint_sets import DisjointSets
from fppmo_ray.pruning.dependency.operation import TracedTensor
from fppmo_ray.pruning.dependency.widths import (
    Expression,
    Length,
    Term,
    TrackedInt,
    WidthLog,
    lengths,
    tracked,
)
from fppmo_ray.pruning.extract import NumberKey, with_number

_STATED = "the network's code states its width as a number that does not change"
_LARGEST = 8192  # a larger number is no width, and every number takes as many positions
_OF_ANY_MODULE = frozenset(vars(nn.Module()))


def module_numbers(model: nn.Module) -> dict[NumberKey, int]:
    """Return all integers from 2 on that modules keep as attributes, in tuples, lists or dicts.

    Of torch's own modules these are plain attributes only.
    """
    found: dict[NumberKey, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        is_torch = type(module).__module__.startswith("torch.")
        for attribute, value in vars(module).items():
            if attribute in _OF_ANY_MODULE:
                continue
            if type(value) is int:
                found[name, attribute, None] = value
            elif type(value) in (tuple, list, dict) and not is_torch:
                parts = value.items() if isinstance(value, dict) else enumerate(value)
                for place, part in parts:
                    if type(part) is int and isinstance(place, int | str):
                        found[name, attribute, place] = part
    return {key: value for key, value in found.items() if 2 <= value <= _LARGEST}


def layer_numbers(layer: nn.Module, axes: Mapping[int, IntArray]) -> dict[str, IntArray]:
    """Return the attributes of torch's layers that state a width of their weight.

    Args:
        layer: The layer.
        axes: Positions along the tracked axes of its weight, or of its running mean.
    """
    first, second = axes.get(0), axes.get(1)
    if isinstance(layer, _ConvNd):
        if second is not None and layer.groups > 1:
            second = np.tile(second, layer.groups)
        names = ("in_channels", "out_channels") if layer.transposed else None
        stated = dict(zip(names or ("out_channels", "in_channels"), (first, second), strict=True))
    elif isinstance(layer, nn.Linear):
        stated = {"out_features": first, "in_features": second}
    elif isinstance(layer, nn.PReLU):
        stated = {"num_parameters": first}
    elif isinstance(layer, _NormBase):
        stated = {"num_features": first}
    else:
        stated = {}
    return {name: along for name, along in stated.items() if along is not None}


@contextmanager
def tracked_numbers(
    model: nn.Module, numbers: Mapping[NumberKey, Length], log: WidthLog
) -> Iterator[None]:
    """Replace the numbers that modules keep by tracked ones within a block.

    Args:
        model: The network, changed in place.
        numbers: The numbers.
        log: Where their uses are recorded.
    """
    before = []
    for (name, attribute, place), length in numbers.items():
        state = vars(model.get_submodule(name))
        value = state[attribute]
        before.append((state, attribute, value))
        number = tracked(value if place is None else value[place], length, log)
        state[attribute] = with_number(value, place, number)
    try:
        yield
    finally:
        for state, attribute, value in reversed(before):
            state[attribute] = value


class SizeMode(TorchFunctionMode):
    """Gives tracked integers to code that asks for sizes, and relates numbers to axes.

    Args:
        traced: The traced counterparts of tensors.
        units: The units of all positions; changed in place.
        log: Where uses of tracked integers are recorded.
    """

    def __init__(self, traced: Any, units: DisjointSets, log: WidthLog) -> None:
        super().__init__()
        self._traced, self._units, self._log = traced, units, log

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a torch function, and track the integers that go in and come out."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func == _SHAPE:
            return self._sizes(args[0], result)
        name = getattr(func, "__name__", "")
        if name == "size" and isinstance(args[0], Tensor):
            return self._sizes(args[0], result, *args[1:], **kwargs)
        if name in ("numel", "nelement"):
            return self._num_elements(args[0], result)
        if any(isinstance(value, TrackedInt) for value in _flat([*args, *kwargs.values()])):
            for value in _flat([*args, *kwargs.values()]):
                if isinstance(value, TrackedInt):
                    self._log.use(value.expression)
            self._relate(name, args, kwargs, result)
        return result

    def _channels(self, tensor: Any) -> dict[int, IntArray]:
        found = self._traced.get(tensor) if isinstance(tensor, Tensor) else None
        return found.channels if found is not None else {}

    def _sizes(self, tensor: Tensor, plain: Any, dim: int | None = None) -> Any:
        """The sizes of a tensor, or one of them, tracked along the tracked axes."""
        channels = self._channels(tensor)
        if isinstance(plain, int):
            assert dim is not None
            along = channels.get(dim % tensor.dim())
            return plain if along is None else tracked(plain, Length(along), self._log)
        return torch.Size(
            tracked(length, Length(channels[axis]), self._log) if axis in channels else length
            for axis, length in enumerate(plain)
        )

    def _num_elements(self, tensor: Tensor, plain: int) -> int:
        channels = self._channels(tensor)
        if not channels or not plain:
            return plain
        expression: Expression = 1
        for axis, length in enumerate(plain_shape(tensor)):
            factor = Length(channels[axis]) if axis in channels else length
            expression = Term("mul", expression, factor)
        return tracked(plain, expression, self._log)

    def _relate(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        """Relate the numbers among the arguments of a function to the axes that they size."""
        if name in _SIZED and isinstance(result, Tensor):
            self._relate_sizes(name, args, kwargs, result)
        elif name in ("split", "split_with_sizes"):
            parts = _argument(
                args, kwargs, 1, "split_size_or_sections", "split_size", "split_sizes"
            )
            dim = _argument(args, kwargs, 2, "dim") or 0
            given = parts if isinstance(parts, tuple | list) else [parts]
            for part, made in zip(given, result, strict=False):
                self._state(part, self._channels(made).get(dim % made.dim()))
        elif name == "__getitem__":
            for axis, bound in _bounds(args[1], args[0].dim()):
                along = self._channels(args[0]).get(axis)
                self._state(bound, None if along is None else along[: int(bound)])
        elif name == "narrow":
            dim, length = (_argument(args, kwargs, i, n) for i, n in ((1, "dim"), (3, "length")))
            self._state(length, self._channels(result).get(dim % result.dim()))
        elif name.startswith("conv"):
            groups, along = _argument(args, kwargs, 6, "groups"), self._channels(args[0]).get(1)
            if along is not None and len(along) == groups:
                self._state(groups, along)
        elif name == "group_norm":
            groups, along = _argument(args, kwargs, 1, "num_groups"), self._channels(args[0]).get(1)
            if along is not None:
                self._state(groups, along[:: len(along) // int(groups)])

    def _relate_sizes(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor
    ) -> None:
        """Relate a result's sizes; new and repeated elements are alike along every axis."""
        first = args[0] if args and isinstance(args[0], Tensor) else None
        values: Any = args[1:] if first is not None else args
        if name == "unflatten" and first is not None:
            start, values = int(values[0]) % first.dim(), values[1:]
        else:
            start = 0
        values = values or [kwargs.get("size", kwargs.get("shape", kwargs.get("sizes", ())))]
        sizes = values[0] if isinstance(values[0], tuple | list) else values
        if name != "unflatten" and len(sizes) != result.dim():
            return
        channels = self._channels(result)
        made = {}
        shape = plain_shape(result)
        before = plain_shape(first) if first is not None else ()
        shift = len(shape) - len(before)
        for axis, size in enumerate(sizes, start):
            if not isinstance(size, TrackedInt) or int(size) != shape[axis]:
                continue
            repeats = name in _REPEATING and (axis < shift or before[axis - shift] == 1)
            along = _joined(size.expression) if name in _NEW else None
            if repeats and isinstance(size.expression, Length):
                along = size.expression.positions
            if along is not None:
                made[axis] = along
            else:
                self._state(size, channels.get(axis))
                self._give(size, channels.get(axis))
        if made:
            self._traced[result] = TracedTensor(shape, {**channels, **made})

    def _give(self, size: TrackedInt, along: IntArray | None) -> None:
        """Tie an axis that is given the length of an axis with other channels."""
        length = size.expression
        if not isinstance(length, Length) or length.is_number or along is None:
            return
        first, second = self._units.roots(length.positions), self._units.roots(along)
        if len(first) == len(second) and not np.intersect1d(first, second).size:
            self._units.unite(first, second)

    def _state(self, number: Any, along: IntArray | None) -> None:
        """Note that a module's number is the length of an axis, or of a part of it.

        Of several numbers in one expression, such as a width and how many heads share it, the
        largest is taken for the width.
        """
        found = lengths(number.expression) if isinstance(number, TrackedInt) else []
        if not found or not all(length.is_number for length in found):
            return
        positions = max((length.positions for length in found), key=len)
        if along is None:
            self._units.keep(positions, _STATED)
        elif len(along) % len(positions) == 0:
            # The axis has several positions of every channel: either side by side, or in rows.
            every = along[:: len(along) // len(positions)]
            fewer, all_units = (np.unique(self._units.roots(axis)) for axis in (every, along))
            is_row = len(fewer) < len(all_units)
            tie(self._units, positions, along[: len(positions)] if is_row else every)
        elif len(positions) % len(along) == 0:
            tie(self._units, positions, np.tile(along, len(positions) // len(along)))


_SHAPE = vars(torch._C.TensorBase)["shape"].__get__
_NEW = frozenset("zeros ones full empty rand randn new_zeros new_ones new_full new_empty".split())
_REPEATING = frozenset(["expand", "broadcast_to", "repeat"])
_SIZED = _NEW | _REPEATING | {"view", "reshape", "unflatten"}


def _joined(expression: Expression) -> IntArray | None:
    """The positions of a length, or of a sum of lengths one after the other; None if it is none."""
    if isinstance(expression, Length):
        return expression.positions
    if isinstance(expression, Term) and expression.operator == "add":
        left, right = _joined(expression.left), _joined(expression.right)
        return None if left is None or right is None else np.concatenate([left, right])
    return None


def plain_shape(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape of a tensor as plain integers."""
    with torch._C.DisableTorchFunctionSubclass():
        return tuple(int(length) for length in tensor.shape)


def tie(units: DisjointSets, one: IntArray, other: IntArray) -> None:
    """Unite two axes of equal width, unless they have the same channels in another order.

    Args:
        units: The units of all positions; changed in place.
        one: Positions along one axis.
        other: As many positions along the other.
    """
    first, second = units.roots(one), units.roots(other)
    if not np.array_equal(np.sort(first), np.sort(second)):
        units.unite(first, second)


def relate_compared(log: WidthLog, units: DisjointSets) -> None:
    """Unite the numbers that were equal to a width when the code compared them.

    Args:
        log: The comparisons.
        units: The units of all positions; changed in place.
    """
    for decision in log.decisions:
        sides = decision.left, decision.right
        is_equal = decision.outcome == (decision.comparison == "eq")
        if decision.comparison not in ("eq", "ne") or not is_equal:
            continue
        if all(isinstance(side, Length) for side in sides):
            one, other = sides
            assert isinstance(one, Length)
            assert isinstance(other, Length)
            if one.is_number != other.is_number:
                tie(units, one.positions, other.positions)


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], place: int, *names: str) -> Any:
    """An argument by its place or one of its names, None where it is not given."""
    if place < len(args):
        return args[place]
    return next((kwargs[name] for name in names if name in kwargs), None)


def _bounds(index: Any, num_axes: int) -> Iterator[tuple[int, TrackedInt]]:
    """Yield every tracked start or stop of a slice, with the axis that is sliced."""
    items = list(index) if isinstance(index, tuple) else [index]
    axis = 0
    for place, item in enumerate(items):
        if item is None:
            continue
        if item is Ellipsis:
            axis = num_axes - sum(other is not None for other in items[place + 1 :])
            continue
        if isinstance(item, slice):
            for bound in (item.start, item.stop):
                if isinstance(bound, TrackedInt) and bound > 0:
                    yield axis, bound
        axis += item.dim() if isinstance(item, Tensor) and item.dtype == torch.bool else 1


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple | list):
            yield from _flat(value)
        elif isinstance(value, slice):
            yield from (value.start, value.stop)
        else:
            yield value
