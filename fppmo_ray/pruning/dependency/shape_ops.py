"""Rules for operations that move elements: reshape, permute, concatenate, split, index, shuffle.

A rule takes an ``Operation``, unites or keeps the units that it couples, and returns the tracked
positions of every result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from fppmo_ray.distribution.space import IntArray
from fppmo_ray.pruning.dependency.disjoint_sets import FIXED
from fppmo_ray.pruning.dependency.operation import (
    Channels,
    Operation,
    TracedTensor,
    UnsupportedForm,
)

_CHOSEN = "some of its channels are selected by index"
_JOINED = "it is concatenated with a tensor of fixed width"
_SPLIT = "a reshape splits its axis"


def reshaped(op: Operation) -> list[Channels]:
    """Views and reshapes: merge axes, split them, or both.

    Where an axis is split, the rule assumes that the inner part shrinks and the outer part stays,
    as in the groups of a channel shuffle or the heads of attention; the proof checks it.
    """
    first, shape = op.first, op.outputs[0]
    if math.prod(first.shape) != math.prod(shape) or 0 in shape:
        raise UnsupportedForm("a view of another element type, or without elements")
    result: Channels = {}
    for sources, targets in _blocks(first.shape, shape):
        tracked = [axis for axis in sources if axis in first.channels]
        if not tracked:
            continue
        if len(tracked) > 1:
            for axis in tracked:
                op.units.keep(first.channels[axis], "a reshape merges it with other channels")
            continue
        merged = _merge(first, tracked[0], sources)
        axis, along = _split(op, merged, [shape[target] for target in targets])
        result[targets[axis]] = along
    return [result]


def _merge(tensor: TracedTensor, axis: int, sources: Sequence[int]) -> IntArray:
    """Flatten several axes into one, and return the positions along it."""
    before = math.prod(tensor.shape[source] for source in sources if source < axis)
    after = math.prod(tensor.shape[source] for source in sources if source > axis)
    return np.tile(np.repeat(tensor.channels[axis], after), before)


def _split(op: Operation, merged: IntArray, lengths: list[int]) -> tuple[int, IntArray]:
    """Split an axis into several of these lengths.

    Returns:
        The index of the axis that remains tracked, and the positions along it.
    """
    grid = merged.reshape(lengths)
    roots = op.units.roots(merged).reshape(lengths)
    # Along which of the new axes do the units differ?
    varying = [
        axis for axis in range(len(lengths)) if (roots != np.take(roots, [0], axis=axis)).any()
    ]
    if not varying:
        op.units.keep(merged, "a reshape splits an axis that belongs to it alone")
    # Along at most one: the split undoes a merge, and that axis carries the channels.
    if len(varying) < 2:
        axis = varying[0] if varying else int(np.argmax(lengths))
        return axis, np.moveaxis(grid, axis, 0).reshape(lengths[axis], -1)[:, 0]
    # Along several: the innermost shrinks, and the blocks of the outer ones are united.
    axis = varying[-1]
    rows = np.moveaxis(grid, axis, -1).reshape(-1, lengths[axis])
    along = op.units.fold(rows.ravel(), len(rows))
    op.doubt(along, _SPLIT)
    return axis, along


def _blocks(
    before: tuple[int, ...], after: tuple[int, ...]
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the smallest runs of axes before and after a reshape with equal numbers of elements.

    Axes of length one belong to no run.
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
    """Set other strides for the same shape, as torch does after pooling to one pixel."""
    if op.outputs[0] != op.first.shape or op.arguments["storage_offset"]:
        raise UnsupportedForm("elements change places")
    return [dict(op.first.channels)]


def permuted(op: Operation) -> list[Channels]:
    """Reorder axes."""
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
    """Repeat axes of length one, and add axes before the first."""
    first, shape = op.first, op.outputs[0]
    shift = len(shape) - len(first.shape)
    return [
        {
            axis + shift: np.resize(along, shape[axis + shift])  # repeats a single position
            for axis, along in first.channels.items()
        }
    ]


def repeated(op: Operation) -> list[Channels]:
    """Repeat the tensor side by side along every axis."""
    first, shape = op.first, op.outputs[0]
    if 0 in shape:
        raise UnsupportedForm("no elements")
    shift = len(shape) - len(first.shape)
    return [
        {
            axis + shift: np.tile(along, shape[axis + shift] // len(along))
            for axis, along in first.channels.items()
        }
    ]


def concatenated(op: Operation) -> list[Channels]:
    """Concatenate tensors along ``dim``; they share all other axes."""
    tensors = [tensor for tensor in op.tensors if tensor.shape != (0,)]
    dim = tensors[0].axis(op.arguments["dim"])
    result = _shared_axes(op, tensors, skip=dim)
    if any(dim in tensor.channels for tensor in tensors):
        parts = [tensor.channels.get(dim, np.full(tensor.shape[dim], FIXED)) for tensor in tensors]
        result[dim] = np.concatenate(parts)
    return [result]


def stacked(op: Operation) -> list[Channels]:
    """Stack tensors along a new axis; they share all others."""
    dim = op.arguments["dim"] % len(op.outputs[0])
    shared = _shared_axes(op, op.tensors, skip=None)
    return [{axis + (axis >= dim): along for axis, along in shared.items()}]


def _shared_axes(op: Operation, tensors: list[TracedTensor], skip: int | None) -> Channels:
    """Unite the positions of all tensors along every axis but one."""
    result: Channels = {}
    for axis in range(len(tensors[0].shape)):
        if axis != skip:
            joined = op.units.join([tensor.channels.get(axis) for tensor in tensors], _JOINED)
            if joined is not None:
                result[axis] = joined
    return result


def split(op: Operation) -> list[Channels]:
    """Split an axis: equal parts are united place by place, unequal ones must prove exact."""
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
        op.doubt(along, "it is split into parts of different widths")
    ends = np.cumsum(lengths)[:-1]
    return [{**others, dim: part} for part in np.split(along, ends)]


def sliced(op: Operation) -> list[Channels]:
    """Slice an axis: one of several equal parts counts as a split, others must prove exact."""
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
    elif step == 1:
        op.doubt(along, _CHOSEN)
    else:
        op.units.keep(along, _CHOSEN)
    result[dim] = along[start : start + step * length : step]
    return [result]


def selected(op: Operation) -> list[Channels]:
    """Select one index along an axis, or each index by itself."""
    first = op.first
    dim = first.axis(op.arguments["dim"])
    op.units.keep(first.channels.get(dim), _CHOSEN)
    result = {a - (a > dim): along for a, along in first.channels.items() if a != dim}
    return [result for _ in op.outputs]


def rearranged(op: Operation) -> list[Channels]:
    """Roll, flip or index_select: keep ``dims`` or ``dim``, by default all axes."""
    first = op.first
    dims = op.arguments.get("dims", op.arguments.get("dim"))
    dims = [dims] if isinstance(dims, int) else dims or range(len(first.shape))
    moved = {first.axis(axis) for axis in dims}
    for axis in moved:
        op.units.keep(first.channels.get(axis), _CHOSEN)
    return [{axis: along for axis, along in first.channels.items() if axis not in moved}]


def indexed(op: Operation) -> list[Channels]:
    """Index axes with integer tensors or masks of one axis: keep the indexed axes.

    Adjacent indexed axes are replaced by the axes of the indices; otherwise all axes are kept.
    """
    first, indices = op.first, op.arguments["indices"]
    axes = [axis for axis, index in enumerate(indices) if index is not None]
    block = max(len(indices[axis].shape) for axis in axes)
    if len(op.outputs[0]) != len(first.shape) - len(axes) + block:
        raise UnsupportedForm("a mask over several axes")
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
    """Look up rows of a table: keep its rows."""
    op.units.keep(op.first.channels.get(0), _CHOSEN)
    columns = op.first.channels.get(1)
    return [{} if columns is None else {len(op.outputs[0]) - 1: columns}]


def padded(op: Operation) -> list[Channels]:
    """Pad axes with a constant: the padding stays whatever a mask removes."""
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
    """Reshape (C r^2, H, W) to (C, r H, r W): r^2 channels become one."""
    first, result = op.first, _keeping_pixels(op)
    along = first.positions(-3)
    if along is not None:
        columns = along.reshape(-1, op.arguments["upscale_factor"] ** 2).T
        result[first.axis(-3)] = op.units.fold(columns.ravel(), len(columns))
    return [result]


def pixel_unshuffled(op: Operation) -> list[Channels]:
    """Reshape (C, r H, r W) to (C r^2, H, W): one channel becomes r^2."""
    first, result = op.first, _keeping_pixels(op)
    along = first.positions(-3)
    if along is not None:
        result[first.axis(-3)] = np.repeat(along, op.arguments["downscale_factor"] ** 2)
    return [result]


def _keeping_pixels(op: Operation) -> Channels:
    """Keep the last two axes; returns the positions along the others."""
    rank = len(op.first.shape)
    for axis in (rank - 2, rank - 1):
        op.units.keep(op.first.channels.get(axis), "its pixels are shuffled")
    return {axis: along for axis, along in op.first.channels.items() if axis < rank - 2}


def channel_shuffled(op: Operation) -> list[Channels]:
    """Transpose channels seen as (groups, C / groups): every group loses the same places."""
    first, groups = op.first, op.arguments["groups"]
    along = first.channels.get(1)
    if along is None:
        return [dict(first.channels)]
    op.units.fold(along, groups)
    return [{**first.channels, 1: along.reshape(groups, -1).T.ravel()}]


def columns(op: Operation) -> list[Channels]:
    """Gather patches (im2col) of (N, C, H, W) as (N, C times the kernel's size, patches)."""
    if len(op.first.shape) != 4:
        raise UnsupportedForm("an image without a batch axis")
    first, along = op.first, op.first.channels.get(1)
    if along is None:
        return [{}]
    return [{1: np.repeat(along, op.outputs[0][1] // first.shape[1])}]


def folded(op: Operation) -> list[Channels]:
    """Sum patches (col2im) of shape (N, C times the kernel's size, patches) to (N, C, H, W)."""
    along = op.first.channels.get(1)
    if along is None or len(op.first.shape) != 3:
        raise UnsupportedForm("no channels, or an image without a batch axis")
    rows = along.reshape(op.outputs[0][1], -1)
    op.units.unite(np.broadcast_to(rows[:, :1], rows.shape), rows)
    return [{1: rows[:, 0]}]


def complex_parts(op: Operation) -> list[Channels]:
    """View complex numbers as two parts along a new last axis, or such parts as complex numbers."""
    rank = min(len(op.first.shape), len(op.outputs[0]))
    op.units.keep(op.first.channels.get(rank), _CHOSEN)
    return [{axis: along for axis, along in op.first.channels.items() if axis < rank}]


def windows(op: Operation) -> list[Channels]:
    """Gather windows along one axis as a new last axis: keep that axis."""
    first, dim = op.first, op.first.axis(op.arguments["dimension"])
    op.units.keep(first.channels.get(dim), _CHOSEN)
    return [{axis: along for axis, along in first.channels.items() if axis != dim}]


def gated(op: Operation) -> list[Channels]:
    """Multiply the first half of an axis by the sigmoid of the second (glu)."""
    first = op.first
    dim = first.axis(op.arguments["dim"])
    result = dict(first.channels)
    if dim in result:
        result[dim] = op.units.fold(result[dim], 2)
    return [result]
