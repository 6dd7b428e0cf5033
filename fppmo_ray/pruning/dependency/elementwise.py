"""Rules of what keeps a tensor's axes: element by element, pooling, sums, normalisation."""

from __future__ import annotations

import re
from collections.abc import Iterable

from fppmo_ray.pruning.dependency.operation import Channels, Operation

_JOINED = "it is combined with something of a fixed width"
_MIXED = "its channels are mixed with one another"
_NORMALISED = "its channels are normalised together"


def elementwise(op: Operation) -> list[Channels]:
    """Unite what broadcasting brings together."""
    shape = op.outputs[0]
    result: Channels = {}
    for axis, length in enumerate(shape):
        if length == 1:
            continue
        operands = [
            operand.channels.get(own)
            for operand in op.tensors
            if (own := axis - len(shape) + len(operand.shape)) >= 0 and operand.shape[own] == length
        ]
        joined = op.units.join(operands, _JOINED)
        if joined is not None:
            result[axis] = joined
    return [result for _ in op.outputs]


def like_first(op: Operation) -> list[Channels]:
    """The results' axes are those of the first tensor where they have its lengths."""
    first = op.first
    return [
        {axis: along for axis, along in first.channels.items() if shape[axis] == first.shape[axis]}
        if len(shape) == len(first.shape)
        else {}
        for shape in op.outputs
    ]


def mixed(op: Operation) -> list[Channels]:
    """Softmax and the like: what runs along ``dim`` is kept."""
    dim = op.first.axis(op.arguments["dim"])
    return _keeping(op, [dim], _MIXED)


def reduced(op: Operation) -> list[Channels]:
    """Sums, means, maxima: what they run over is kept."""
    first, dims = op.first, op.arguments.get("dim")
    if dims is None or dims == []:
        dims = range(len(first.shape))
    gone = {first.axis(axis) for axis in ([dims] if isinstance(dims, int) else dims)}
    for axis in gone:
        op.units.keep(first.channels.get(axis), _MIXED)
    stays = bool(op.arguments.get("keepdim"))
    result = {
        axis - (0 if stays else sum(other < axis for other in gone)): along
        for axis, along in first.channels.items()
        if axis not in gone
    }
    return [result for _ in op.outputs]


def pooled(op: Operation) -> list[Channels]:
    """Pooling, resizing and padding at the borders change the last axes, as many as the name says.

    Channels come before these.
    """
    first = op.first
    digit = re.search(r"(\d)d", op.name)
    assert digit is not None
    start = len(first.shape) - int(digit[1])
    return _keeping(op, range(start, len(first.shape)), _MIXED)


def batch_norm(op: Operation) -> list[Channels]:
    """Statistics and affine parameters go with the channels."""
    first = op.first
    state = ("weight", "bias", "running_mean", "running_var")
    tensors = [tensor for name in state if (tensor := op.tensor(name)) is not None]
    followed = [first.channels.get(1), *(tensor.channels.get(0) for tensor in tensors)]
    op.units.join(followed, _JOINED)
    return [dict(first.channels), *({} for _ in op.outputs[1:])]


def group_norm(op: Operation) -> list[Channels]:
    """The channels of a group are normalised together."""
    return _keeping(op, range(1, len(op.first.shape)), _NORMALISED)


def layer_norm(op: Operation) -> list[Channels]:
    """The last axes are normalised together."""
    rank = len(op.first.shape)
    start = rank - len(op.arguments["normalized_shape"])
    return _keeping(op, range(start, rank), _NORMALISED)


def _keeping(op: Operation, axes: Iterable[int], reason: str) -> list[Channels]:
    """The first tensor's axes, some of which must stay."""
    for axis in axes:
        op.units.keep(op.first.channels.get(axis), reason)
    return like_first(op)


def not_followed(op: Operation) -> list[Channels]:
    """Keep all that an operation without a rule reads."""
    for tensor in op.tensors:
        for along in tensor.channels.values():
            op.units.keep(along, f"it goes through {op.name}, which is not followed")
    return [{} for _ in op.outputs]
