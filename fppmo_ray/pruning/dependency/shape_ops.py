"""Rules of what moves elements about: reshapes, permutations, concatenations, cuts, shuffles."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from fppmo_ray.distribution.space import IntArray
from fppmo_ray.pruning.dependency.disjoint_sets import FIXED
from fppmo_ray.pruning.dependency.operation import Channels, Operation, TracedTensor

_CHOSEN = "some of its channels are chosen by number"
_JOINED = "it is put beside something of a fixed width"
_SPLIT = "a reshape splits its axis"


def reshaped(op: Operation) -> list[Channels]:
    """Views and reshapes: axes are merged, split, or both.

    Where an axis is split, the inner part is taken to shrink and the outer to stay, as in the
    groups of a shuffle or the heads of attention.
    """
    first, shape = op.first, op.outputs[0]
    result: Channels = {}
    for sources, targets in _blocks(first.shape, shape):
        followed = [axis for axis in sources if axis in first.channels]
        if not followed:
            continue
        if len(followed) > 1:
            for axis in followed:
                op.units.keep(first.channels[axis], "a reshape merges it with other channels")
            continue
        merged = _merge(first, followed[0], sources)
        axis, along = _split(op, merged, [shape[target] for target in targets])
        result[targets[axis]] = along
    return [result]


def _merge(tensor: TracedTensor, axis: int, sources: Sequence[int]) -> IntArray:
    """The positions along one axis into which these are flattened."""
    before = math.prod(tensor.shape[source] for source in sources if source < axis)
    after = math.prod(tensor.shape[source] for source in sources if source > axis)
    return np.tile(np.repeat(tensor.channels[axis], after), before)


def _split(op: Operation, merged: IntArray, lengths: list[int]) -> tuple[int, IntArray]:
    """Which of the axes into which one is split varies, and the positions along it."""
    grid = merged.reshape(lengths)
    roots = op.units.roots(merged).reshape(lengths)
    varying = [
        axis for axis in range(len(lengths)) if (roots != np.take(roots, [0], axis=axis)).any()
    ]
    if not varying:
        op.units.keep(merged, "it is all that a tensor holds")
    if len(varying) < 2:
        axis = varying[0] if varying else int(np.argmax(lengths))
        return axis, np.moveaxis(grid, axis, 0).reshape(lengths[axis], -1)[:, 0]
    axis = varying[-1]
    rows = np.moveaxis(grid, axis, -1).reshape(-1, lengths[axis])
    along = op.units.fold(rows.ravel(), len(rows))
    op.doubt(along, _SPLIT)
    return axis, along


def _blocks(
    before: tuple[int, ...], after: tuple[int, ...]
) -> Iterator[tuple[list[int], list[int]]]:
    """Smallest runs of axes before and after a reshape that hold as many elements.

    Axes of length one belong to none.
    """
    old = [axis for axis, length in enumerate(before) if length != 1]
    new = [axis for axis, length in enumerate(after) if length != 1]
    while old:
        sources, targets = [old.pop(0)], [new.pop(0)]
        held, wanted = before[sources[0]], after[targets[0]]
        while held != wanted:
            if held < wanted:
                sources.append(old.pop(0))
                held *= before[sources[-1]]
            else:
                targets.append(new.pop(0))
                wanted *= after[targets[-1]]
        yield sources, targets


def restrided(op: Operation) -> list[Channels]:
    """Other strides: the same tensor where its shape stays, as after pooling to one pixel."""
    if op.outputs[0] != op.first.shape or op.arguments["storage_offset"]:
        raise ValueError("elements change places")
    return [dict(op.first.channels)]


def permuted(op: Operation) -> list[Channels]:
    """Axes in another order."""
    first = op.first
    order = list(range(len(first.shape)))
    if "dims" in op.arguments:
        order = [first.axis(axis) for axis in op.arguments["dims"]]
    elif order:
        one, other = (
            op.arguments.get("dim0", 0),
            op.arguments.get("dim1", len(order) - 1),
        )
        one, other = first.axis(one), first.axis(other)
        order[one], order[other] = order[other], order[one]
    return [{to: first.channels[axis] for to, axis in enumerate(order) if axis in first.channels}]


def expanded(op: Operation) -> list[Channels]:
    """Axes of one become longer, and new ones come before the first."""
    first, shape = op.first, op.outputs[0]
    shift = len(shape) - len(first.shape)
    return [{axis + shift: along for axis, along in first.channels.items()}]


def repeated(op: Operation) -> list[Channels]:
    """Copies side by side along every axis."""
    first, shape = op.first, op.outputs[0]
    shift = len(shape) - len(first.shape)
    return [
        {
            axis + shift: np.tile(along, shape[axis + shift] // len(along))
            for axis, along in first.channels.items()
        }
    ]


def concatenated(op: Operation) -> list[Channels]:
    """Tensors one behind the other along ``dim``; all other axes are shared."""
    tensors = [tensor for tensor in op.tensors if tensor.shape != (0,)]
    dim = tensors[0].axis(op.arguments["dim"])
    result = _shared_axes(op, tensors, skip=dim)
    if any(dim in tensor.channels for tensor in tensors):
        parts = [tensor.channels.get(dim, np.full(tensor.shape[dim], FIXED)) for tensor in tensors]
        result[dim] = np.concatenate(parts)
    return [result]


def stacked(op: Operation) -> list[Channels]:
    """Tensors one behind the other along a new axis."""
    dim = op.arguments["dim"] % len(op.outputs[0])
    shared = _shared_axes(op, op.tensors, skip=None)
    return [{axis + (axis >= dim): along for axis, along in shared.items()}]


def _shared_axes(op: Operation, tensors: list[TracedTensor], skip: int | None) -> Channels:
    result: Channels = {}
    for axis in range(len(tensors[0].shape)):
        if axis != skip:
            joined = op.units.join([tensor.channels.get(axis) for tensor in tensors], _JOINED)
            if joined is not None:
                result[axis] = joined
    return result


def split(op: Operation) -> list[Channels]:
    """Cuts an axis into parts: equal ones are united place by place, others are kept."""
    first = op.first
    dim = first.axis(op.arguments["dim"])
    along = first.channels.get(dim)
    others = {axis: a for axis, a in first.channels.items() if axis != dim}
    if along is None:
        return [dict(others) for _ in op.outputs]
    lengths = [shape[dim] for shape in op.outputs]
    if len(set(lengths)) == 1:
        op.doubt(op.units.fold(along, len(lengths)), "it is split into parts")
    else:
        op.units.keep(along, "it is split into parts of different widths")
    ends = np.cumsum(lengths)[:-1]
    return [{**others, dim: part} for part in np.split(along, ends)]


def sliced(op: Operation) -> list[Channels]:
    """A stretch of an axis: an equal part of it counts as a split, any other is kept."""
    first, shape = op.first, op.outputs[0]
    dim = first.axis(op.arguments["dim"])
    along = first.channels.get(dim)
    result = dict(first.channels)
    if along is None or shape[dim] == first.shape[dim]:
        return [result]
    start, step, length = op.arguments["start"] or 0, op.arguments["step"], shape[dim]
    start = max(start + len(along) if start < 0 else start, 0)
    if step == 1 and length > 1 and len(along) % length == 0 and start % length == 0:
        op.doubt(op.units.fold(along, len(along) // length), "it is split into parts")
    else:
        op.units.keep(along, _CHOSEN)
    result[dim] = along[start : start + step * length : step]
    return [result]


def selected(op: Operation) -> list[Channels]:
    """One index of an axis, or every one by itself."""
    first = op.first
    dim = first.axis(op.arguments["dim"])
    op.units.keep(first.channels.get(dim), _CHOSEN)
    result = {a - (a > dim): along for a, along in first.channels.items() if a != dim}
    return [result for _ in op.outputs]


def rearranged(op: Operation) -> list[Channels]:
    """Rolls, flips and index_select along ``dims`` or ``dim``, without which they are over all."""
    first = op.first
    dims = op.arguments.get("dims", op.arguments.get("dim"))
    dims = [dims] if isinstance(dims, int) else dims or range(len(first.shape))
    moved = {first.axis(axis) for axis in dims}
    for axis in moved:
        op.units.keep(first.channels.get(axis), _CHOSEN)
    return [{axis: along for axis, along in first.channels.items() if axis not in moved}]


def indexed(op: Operation) -> list[Channels]:
    """``tensor[index, ...]`` with tensors as indices, next to one another."""
    first, indices = op.first, op.arguments["indices"]
    axes = [axis for axis, index in enumerate(indices) if index is not None]
    for axis in axes:
        op.units.keep(first.channels.get(axis), _CHOSEN)
    if axes != list(range(axes[0], axes[-1] + 1)):
        for along in first.channels.values():
            op.units.keep(along, _CHOSEN)
        return [{}]
    shift = len(op.outputs[0]) - len(first.shape)
    result = {
        axis + (shift if axis > axes[0] else 0): along
        for axis, along in first.channels.items()
        if axis not in axes
    }
    return [result]


def embedded(op: Operation) -> list[Channels]:
    """Rows of a table."""
    op.units.keep(op.first.channels.get(0), _CHOSEN)
    columns = op.first.channels.get(1)
    return [{} if columns is None else {len(op.outputs[0]) - 1: columns}]


def padded(op: Operation) -> list[Channels]:
    """What is added along an axis stays whatever a mask removes."""
    first, pads = op.first, op.arguments["pad"]
    result: Channels = {}
    for axis, along in first.channels.items():
        place = 2 * (len(first.shape) - 1 - axis)
        before, after = pads[place : place + 2] if place < len(pads) else (0, 0)
        if before < 0 or after < 0:
            op.units.keep(along, _CHOSEN)
        else:
            result[axis] = np.pad(along, (before, after), constant_values=FIXED)
    return [result]


def pixel_shuffled(op: Operation) -> list[Channels]:
    """(C r^2, H, W) to (C, r H, r W): r^2 channels become one."""
    first, result = op.first, dict(op.first.channels)
    along = first.along(-3)
    if along is not None:
        columns = along.reshape(-1, op.arguments["upscale_factor"] ** 2).T
        result[first.axis(-3)] = op.units.fold(columns.ravel(), len(columns))
    return [result]


def pixel_unshuffled(op: Operation) -> list[Channels]:
    """(C, r H, r W) to (C r^2, H, W): one channel becomes r^2."""
    first, result = op.first, dict(op.first.channels)
    along = first.along(-3)
    if along is not None:
        result[first.axis(-3)] = np.repeat(along, op.arguments["downscale_factor"] ** 2)
    return [result]


def channel_shuffled(op: Operation) -> list[Channels]:
    """(groups, C / groups) transposed: every group loses the same places."""
    first, groups = op.first, op.arguments["groups"]
    along = first.channels.get(1)
    if along is None:
        return [dict(first.channels)]
    op.units.fold(along, groups)
    return [{**first.channels, 1: along.reshape(groups, -1).T.ravel()}]


def columns(op: Operation) -> list[Channels]:
    """im2col: (N, C, H, W) to (N, C times the kernel's size, places)."""
    first, along = op.first, op.first.channels.get(1)
    if along is None:
        return [{}]
    return [{1: np.repeat(along, op.outputs[0][1] // first.shape[1])}]


def windows(op: Operation) -> list[Channels]:
    """``unfold`` of one axis: a new last axis."""
    first, dim = op.first, op.first.axis(op.arguments["dimension"])
    op.units.keep(first.channels.get(dim), _CHOSEN)
    return [{axis: along for axis, along in first.channels.items() if axis != dim}]


def gated(op: Operation) -> list[Channels]:
    """glu: the first half times the sigmoid of the second."""
    first = op.first
    dim = first.axis(op.arguments["dim"])
    result = dict(first.channels)
    if dim in result:
        result[dim] = op.units.fold(result[dim], 2)
    return [result]
