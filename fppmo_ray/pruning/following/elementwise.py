"""Rules of what keeps a tensor's axes: element by element, pooling, sums, normalisation."""

from __future__ import annotations

import re
from collections.abc import Iterable

from fppmo_ray.pruning.following.call import Call, Channels

_JOINED = "it is combined with something of a fixed width"
_MIXED = "its channels are mixed with one another"
_NORMALISED = "its channels are normalised together"


def elementwise(call: Call) -> list[Channels]:
    """Unite what broadcasting brings together."""
    shape = call.outputs[0]
    result: Channels = {}
    for axis, length in enumerate(shape):
        if length == 1:
            continue
        operands = [
            operand.channels.get(own)
            for operand in call.tensors
            if (own := axis - len(shape) + len(operand.shape)) >= 0 and operand.shape[own] == length
        ]
        joined = call.units.join(operands, _JOINED)
        if joined is not None:
            result[axis] = joined
    return [result for _ in call.outputs]


def like_first(call: Call) -> list[Channels]:
    """The results' axes are those of the first tensor where they have its lengths."""
    first = call.first
    return [
        {axis: along for axis, along in first.channels.items() if shape[axis] == first.shape[axis]}
        if len(shape) == len(first.shape)
        else {}
        for shape in call.outputs
    ]


def mixed(call: Call) -> list[Channels]:
    """Softmax and the like: what runs along ``dim`` is kept."""
    dim = call.first.axis(call.arguments["dim"])
    return _keeping(call, [dim], _MIXED)


def reduced(call: Call) -> list[Channels]:
    """Sums, means, maxima: what they run over is kept."""
    first, dims = call.first, call.arguments.get("dim")
    if dims is None or dims == []:
        dims = range(len(first.shape))
    gone = {first.axis(axis) for axis in ([dims] if isinstance(dims, int) else dims)}
    for axis in gone:
        call.units.keep(first.channels.get(axis), _MIXED)
    stays = bool(call.arguments.get("keepdim"))
    result = {
        axis - (0 if stays else sum(other < axis for other in gone)): along
        for axis, along in first.channels.items()
        if axis not in gone
    }
    return [result for _ in call.outputs]


def pooled(call: Call) -> list[Channels]:
    """Pooling, resizing and padding at the borders change the last axes, as many as the name says.

    Channels come before these.
    """
    first = call.first
    digit = re.search(r"(\d)d", call.name)
    assert digit is not None
    start = len(first.shape) - int(digit[1])
    return _keeping(call, range(start, len(first.shape)), _MIXED)


def batch_norm(call: Call) -> list[Channels]:
    """Statistics and affine parameters go with the channels."""
    first = call.first
    state = ("weight", "bias", "running_mean", "running_var")
    tensors = [tensor for name in state if (tensor := call.tensor(name)) is not None]
    followed = [first.channels.get(1), *(tensor.channels.get(0) for tensor in tensors)]
    call.units.join(followed, _JOINED)
    return [dict(first.channels), *({} for _ in call.outputs[1:])]


def group_norm(call: Call) -> list[Channels]:
    """The channels of a group are normalised together."""
    return _keeping(call, range(1, len(call.first.shape)), _NORMALISED)


def layer_norm(call: Call) -> list[Channels]:
    """The last axes are normalised together."""
    rank = len(call.first.shape)
    start = rank - len(call.arguments["normalized_shape"])
    return _keeping(call, range(start, rank), _NORMALISED)


def _keeping(call: Call, axes: Iterable[int], reason: str) -> list[Channels]:
    """The first tensor's axes, some of which must stay."""
    for axis in axes:
        call.units.keep(call.first.channels.get(axis), reason)
    return like_first(call)


def not_followed(call: Call) -> list[Channels]:
    """Keep all that an operation without a rule reads."""
    for tensor in call.tensors:
        for along in tensor.channels.values():
            call.units.keep(along, f"it goes through {call.name}, which is not followed")
    return [{} for _ in call.outputs]
