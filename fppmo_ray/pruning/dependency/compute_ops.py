"""Rules for operations that compute: elementwise, pooling, normalisation, convolution, matmul."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import numpy as np

from fppmo_ray.distribution.space import IntArray
from fppmo_ray.pruning.dependency.disjoint_sets import FIXED
from fppmo_ray.pruning.dependency.operation import Channels, Operation, Product, TracedTensor

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


_READ = "it is read by, or made of, something of a fixed width"

_SUMMED = "a product of activations sums over it"
_THIRD = "what it costs depends on two other widths"


def convolution(op: Operation) -> list[Channels]:
    """Images (N, I, ...), weights (O, I / groups, ...) or, transposed, (I, O / groups, ...)."""
    images, weight = op.tensor("input"), op.tensor("weight")
    assert images is not None
    assert weight is not None
    for axis, along in images.channels.items():
        if axis > 1:
            op.units.keep(along, "a convolution runs over it")
    transposed = op.arguments["transposed"]
    _count_convolution(op, images, weight, transposed=transposed)
    follow = _transposed if transposed else _direct
    made = follow(op, images.channels.get(1), weight, op.arguments["groups"])
    _add_bias(op, op.tensor("bias"), made)
    result = {0: images.channels[0]} if 0 in images.channels else {}
    return [result if made is None else {**result, 1: made}]


def _count_convolution(
    op: Operation, images: TracedTensor, weight: TracedTensor, *, transposed: bool
) -> None:
    """Every weight is used once per position of the images, or of the result."""
    places = images.shape if transposed else op.outputs[0]
    macs = places[0] * math.prod(places[2:]) * math.prod(weight.shape)
    made, read = (1, 0) if transposed else (0, 1)
    _count(op, macs, _positions(weight, made), _positions(weight, read), weight.is_weight)


def _direct(
    op: Operation, read: IntArray | None, weight: TracedTensor, groups: int
) -> IntArray | None:
    made, along = weight.channels.get(0), weight.channels.get(1)
    _mark(op, weight, made, along)
    if groups == 1:
        op.units.join([read, along], _READ)
    elif weight.shape[1] == 1:  # depthwise: a channel goes together with its filters
        copies = weight.shape[0] // groups
        op.units.join([None if read is None else np.repeat(read, copies), made], _READ)
    else:
        op.units.join([read, None if along is None else np.tile(along, groups)], _READ)
        if made is not None:  # each group must lose as many filters as the others
            op.units.fold(made, groups)
    return made


def _transposed(
    op: Operation, read: IntArray | None, weight: TracedTensor, groups: int
) -> IntArray | None:
    along, made = weight.channels.get(0), weight.channels.get(1)
    op.units.join([read, along], _READ)
    if 1 < groups == weight.shape[0]:  # depthwise
        op.units.keep(made, "every channel makes it")
        _mark(op, weight, along, None)
        return None if along is None else np.repeat(along, weight.shape[1])
    _mark(op, weight, made, along)
    if along is not None and groups > 1:
        op.units.fold(along, groups)
    return None if made is None else np.tile(made, groups)


def matrix_product(op: Operation) -> list[Channels]:
    """(..., n, k) times (..., k, m), with or without something added."""
    tensors = [value for value in op.arguments.values() if isinstance(value, TracedTensor)]
    added = tensors.pop(0) if len(tensors) > 2 else None
    left, right = tensors
    summed = [left.along(-1), right.along(-2)]
    op.units.join(summed, _READ)
    if summed[0] is not None and not (left.is_weight or right.is_weight):
        op.units.keep(summed[0], _SUMMED)
    if left.is_weight and not right.is_weight:
        _mark(op, left, left.along(-2), left.along(-1))
    elif right.is_weight and not left.is_weight:
        _mark(op, right, right.along(-1), right.along(-2))
    result = _batch_axes(op, left, right)
    rank = len(op.outputs[0])
    for axis, made in ((rank - 2, left.along(-2)), (rank - 1, right.along(-1))):
        if made is not None:
            result[axis] = made
    _count_matrix_product(op, left, right, result)
    if added is not None:
        _add_bias(op, added, result.get(rank - 1))
        terms = {"added": added, "product": TracedTensor(op.outputs[0], result)}
        return elementwise(Operation("add", terms, op.outputs, op.units, op.module))
    return [result]


def attention(op: Operation) -> list[Channels]:
    """Fused attention: queries, keys and values (..., tokens, channels)."""
    for tensor in op.tensors:
        for along in tensor.channels.values():
            op.units.keep(along, _SUMMED)
    return [{} for _ in op.outputs]


def _count_matrix_product(
    op: Operation, left: TracedTensor, right: TracedTensor, result: Channels
) -> None:
    """Costs are products of two widths, so that further ones which are followed are kept."""
    shape = op.outputs[0]
    for axis in range(len(shape) - 2):
        op.units.keep(result.get(axis), _THIRD)
    made, read = _positions(right, -1), _positions(left, -1)
    rows, can_go = _positions(left, -2), op.units.can_go
    if can_go(rows) and can_go(made) and can_go(read):
        op.units.keep(made, _THIRD)
    if can_go(rows) and can_go(made):
        read = rows
    elif can_go(rows):
        made = rows
    macs = math.prod(shape) * left.shape[-1]
    _count(op, macs, made, read, left.is_weight != right.is_weight)


def linear(op: Operation) -> list[Channels]:
    """``input`` (..., I) times ``weight`` (O, I) transposed, plus ``bias`` (O,)."""
    features, weight, bias = (op.tensor(name) for name in ("input", "weight", "bias"))
    assert features is not None
    assert weight is not None
    op.units.join([features.along(-1), weight.channels.get(1)], _READ)
    made = weight.channels.get(0)
    _mark(op, weight, made, weight.channels.get(1))
    _add_bias(op, bias, made)
    macs = math.prod(features.shape) * weight.shape[0]
    _count(op, macs, _positions(weight, 0), _positions(weight, 1), weight.is_weight)
    last = len(features.shape) - 1
    result = {axis: along for axis, along in features.channels.items() if axis != last}
    return [result if made is None else {**result, last: made}]


def _batch_axes(op: Operation, left: TracedTensor, right: TracedTensor) -> Channels:
    """The axes before the last two, which the factors share."""
    factors = [
        TracedTensor(shape[:-2], {a: c for a, c in channels.items() if a < len(shape) - 2})
        for shape, channels in ((left.shape, left.channels), (right.shape, right.channels))
    ]
    shape = op.outputs[0][:-2]
    terms = dict(zip(("left", "right"), factors, strict=True))
    return elementwise(Operation("mul", terms, (shape,), op.units, op.module))[0]


def _count(op: Operation, macs: int, made: IntArray, read: IntArray, by_weight: bool) -> None:
    op.products.append(
        Product(macs=macs, out=made, read=read, by_weight=by_weight, module=op.module)
    )


def _positions(tensor: TracedTensor, axis: int) -> IntArray:
    """Positions along an axis, FIXED where it is not followed."""
    along = tensor.along(axis)
    return np.full(tensor.shape[axis], FIXED) if along is None else along


def _mark(
    op: Operation, weight: TracedTensor, made: IntArray | None, read: IntArray | None
) -> None:
    if weight.is_weight:
        op.units.mark_made(made)
        op.units.mark_read(read)


def _add_bias(op: Operation, bias: TracedTensor | None, made: IntArray | None) -> None:
    if bias is not None and made is not None:
        along = bias.along(-1)
        if len(made) == bias.shape[-1]:
            op.units.join([made, along], _READ)
        if bias.is_weight:
            op.units.mark_made(along)
