"""Rules for operations that compute: elementwise, pooling, normalisation, convolution, matmul.

A rule takes an ``Operation``, unites or keeps the units that it couples, and returns the tracked
positions of every result.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import numpy as np

from fppmo_ray.distribution.space import IntArray
from fppmo_ray.pruning.dependency.disjoint_sets import FIXED
from fppmo_ray.pruning.dependency.operation import (
    Channels,
    Operation,
    Product,
    TracedTensor,
    UnsupportedForm,
)

_DERIVED = (
    "the weights that read it are computed in the forward, as by weight standardisation; replace "
    "them by plain ones to prune it"
)
_JOINED = "it is combined with a tensor of fixed width"
_MIXED = "its channels are mixed with one another"
_NORMALISED = "its channels are normalised together"
_READ = "it is multiplied with a tensor of fixed width"
_SUMMED = "a product of activations sums over it"
_THIRD = "its cost depends on two other widths"


def elementwise(op: Operation) -> list[Channels]:
    """Unite the positions of all operands along each axis of the broadcast result."""
    shape = op.outputs[0]
    result: Channels = {}
    for axis, length in enumerate(shape):
        if length == 1:
            continue
        # Axes are aligned at the end; an operand of length one is repeated and stays so.
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
    """Give each result the positions of the first tensor along axes of equal length."""
    first = op.first
    return [
        {axis: along for axis, along in first.channels.items() if shape[axis] == first.shape[axis]}
        if len(shape) == len(first.shape)
        else {}
        for shape in op.outputs
    ]


def mixed(op: Operation) -> list[Channels]:
    """Softmax, sort, Fourier transforms and cumulative sums: keep the positions along ``dim``."""
    dims = op.arguments["dim"]
    return _keeping(op, map(op.first.axis, [dims] if isinstance(dims, int) else dims), _MIXED)


def observed(op: Operation) -> list[Channels]:
    """Ask whether all elements are true, as checks of values do, or where they are."""
    return [{} for _ in op.outputs]


def resampled(op: Operation) -> list[Channels]:
    """Read an image (N, C, ...) at places of a grid (N, ..., 2 or 3): the channels pass through."""
    image, grid = op.tensors[:2]
    for along in grid.channels.values():
        op.units.keep(along, _MIXED)
    return _keeping(op, range(2, len(image.shape)), _MIXED)


def reduced(op: Operation) -> list[Channels]:
    """Sums, means and maxima: keep the positions along the reduced axes."""
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
    """Pooling, resizing and border padding: keep the last axes, as many as the name says.

    The channel axis comes before these and passes through.
    """
    first = op.first
    digit = re.search(r"(\d)d", op.name)
    assert digit is not None
    start = len(first.shape) - int(digit[1])
    return _keeping(op, range(start, len(first.shape)), _MIXED)


def batch_norm(op: Operation) -> list[Channels]:
    """Unite the channels with the statistics and affine parameters of the batch norm."""
    first = op.first
    state = ("weight", "bias", "running_mean", "running_var")
    tensors = [tensor for name in state if (tensor := op.tensor(name)) is not None]
    tracked = [first.channels.get(1), *(tensor.channels.get(0) for tensor in tensors)]
    op.units.join(tracked, _JOINED)
    return [dict(first.channels), *({} for _ in op.outputs[1:])]


def group_norm(op: Operation) -> list[Channels]:
    """Unite the channels of each norm group, which are normalised together.

    Whole norm groups can go, so a single one stays.
    """
    first, groups = op.first, op.arguments["group"]
    state = [tensor for name in ("weight", "bias") if (tensor := op.tensor(name)) is not None]
    along = op.units.join(
        [first.channels.get(1), *(tensor.channels.get(0) for tensor in state)], _JOINED
    )
    if along is not None and groups == 1:
        op.units.keep(along, _NORMALISED)
    elif along is not None and groups < len(along):
        rows = along.reshape(groups, -1)
        op.units.unite(np.broadcast_to(rows[:, :1], rows.shape), rows)
        op.doubt(along, _NORMALISED)
    return _keeping(op, range(2, len(first.shape)), _NORMALISED)


def layer_norm(op: Operation) -> list[Channels]:
    """Keep the last axes, which are normalised together."""
    rank = len(op.first.shape)
    start = rank - len(op.arguments["normalized_shape"])
    return _keeping(op, range(start, rank), _NORMALISED)


def _keeping(op: Operation, axes: Iterable[int], reason: str) -> list[Channels]:
    """Keep some axes of the first tensor; the results have its axes."""
    for axis in axes:
        op.units.keep(op.first.channels.get(axis), reason)
    return like_first(op)


def without_rule(op: Operation) -> list[Channels]:
    """Keep all positions of all arguments, and track nothing in the results."""
    return _ending(op, f"it goes through {op.name}, which is not followed")


def quantised(op: Operation) -> list[Channels]:
    """Keep all positions: a quantised layer has its weights in a form that cannot be sliced."""
    return _ending(op, _PACKED)


def _ending(op: Operation, reason: str) -> list[Channels]:
    for tensor in op.tensors:
        for along in tensor.channels.values():
            op.units.keep(along, reason)
    return [{} for _ in op.outputs]


_PACKED = (
    "a quantised layer reads it, whose weights are packed: prune the floating-point network and "
    "quantise the smaller one"
)


def convolution(op: Operation) -> list[Channels]:
    """Convolve images (N, I, ...) with weights (O, I / groups, ...).

    The weights of a transposed convolution have the shape (I, O / groups, ...).
    """
    images, weight = op.tensor("input"), op.tensor("weight")
    assert images is not None
    assert weight is not None
    for axis, along in images.channels.items():
        if axis > 1:
            op.units.keep(along, "a convolution runs over it")
    transposed = op.arguments["transposed"]
    _count_convolution(op, images, weight, transposed=transposed)
    couple = _couple_transposed if transposed else _couple_direct
    outputs = couple(op, images.channels.get(1), weight, op.arguments["groups"])
    _add_bias(op, op.tensor("bias"), outputs)
    result = {0: images.channels[0]} if 0 in images.channels else {}
    return [result if outputs is None else {**result, 1: outputs}]


def _count_convolution(
    op: Operation, images: TracedTensor, weight: TracedTensor, *, transposed: bool
) -> None:
    """Every weight is used once per pixel of the result, or of the images if transposed."""
    pixels = images.shape if transposed else op.outputs[0]
    macs = pixels[0] * math.prod(pixels[2:]) * math.prod(weight.shape)
    out_axis, in_axis = (1, 0) if transposed else (0, 1)
    outputs, inputs = _positions(weight, out_axis), _positions(weight, in_axis)
    _count(op, macs, outputs, inputs, weight.is_weight)


def _couple_direct(
    op: Operation, inputs: IntArray | None, weight: TracedTensor, groups: int
) -> IntArray | None:
    """Couple a convolution's channels with its weight; returns the output positions."""
    outputs, along = weight.channels.get(0), weight.channels.get(1)
    _mark(op, weight, outputs, along)
    if groups == 1:
        is_derived = weight.is_weight and along is None and weight.shape[1] > 1
        op.units.join([inputs, along], _DERIVED if is_derived else _READ)
    elif weight.shape[1] == 1:  # depthwise: a channel goes together with its filters
        copies = weight.shape[0] // groups
        op.units.join([None if inputs is None else np.repeat(inputs, copies), outputs], _READ)
    else:  # the weight's second axis serves every conv-group
        op.units.join([inputs, None if along is None else np.tile(along, groups)], _READ)
        if outputs is not None:  # each conv-group must lose as many filters as the others
            op.units.fold(outputs, groups)
    return outputs


def _couple_transposed(
    op: Operation, inputs: IntArray | None, weight: TracedTensor, groups: int
) -> IntArray | None:
    """Couple a transposed convolution's channels with its weight; returns the output positions."""
    along, outputs = weight.channels.get(0), weight.channels.get(1)
    op.units.join([inputs, along], _READ)
    if 1 < groups == weight.shape[0]:  # depthwise
        op.units.keep(outputs, "every input channel contributes to it")
        _mark(op, weight, along, None)
        return None if along is None else np.repeat(along, weight.shape[1])
    _mark(op, weight, outputs, along)
    if along is not None and groups > 1:
        op.units.fold(along, groups)
    return None if outputs is None else np.tile(outputs, groups)


def linear(op: Operation) -> list[Channels]:
    """Multiply ``input`` (..., I) with ``weight`` (O, I) transposed, and add ``bias`` (O,)."""
    features, weight, bias = (op.tensor(name) for name in ("input", "weight", "bias"))
    assert features is not None
    assert weight is not None
    op.units.join([features.positions(-1), weight.channels.get(1)], _READ)
    outputs = weight.channels.get(0)
    _mark(op, weight, outputs, weight.channels.get(1))
    _add_bias(op, bias, outputs)
    macs = math.prod(features.shape) * weight.shape[0]
    _count(op, macs, _positions(weight, 0), _positions(weight, 1), weight.is_weight)
    last = len(features.shape) - 1
    result = {axis: along for axis, along in features.channels.items() if axis != last}
    return [result if outputs is None else {**result, last: outputs}]


def matrix_product(op: Operation) -> list[Channels]:
    """Multiply (..., n, k) with (..., k, m); a third tensor is added to the product."""
    tensors = [value for value in op.arguments.values() if isinstance(value, TracedTensor)]
    if len(tensors) not in (2, 3):
        raise UnsupportedForm(f"a matrix product of {len(tensors)} tensors")
    added = tensors.pop(0) if len(tensors) > 2 else None
    left, right = tensors
    # Both factors share the axis that is summed over.
    summed = [left.positions(-1), right.positions(-2)]
    op.units.join(summed, _READ)
    if summed[0] is not None and not (left.is_weight or right.is_weight):
        op.units.keep(summed[0], _SUMMED)
    if left.is_weight and not right.is_weight:
        _mark(op, left, left.positions(-2), left.positions(-1))
    elif right.is_weight and not left.is_weight:
        _mark(op, right, right.positions(-1), right.positions(-2))
    # The result has the rows of the left factor and the columns of the right one.
    result = _batch_axes(op, left, right)
    rank = len(op.outputs[0])
    for axis, outputs in ((rank - 2, left.positions(-2)), (rank - 1, right.positions(-1))):
        if outputs is not None:
            result[axis] = outputs
    _count_matrix_product(op, left, right, result)
    if added is not None:
        _add_bias(op, added, result.get(rank - 1))
        terms = {"added": added, "product": TracedTensor(op.outputs[0], result)}
        return elementwise(Operation("add", terms, op.outputs, op.units, op.module))
    return [result]


def _batch_axes(op: Operation, left: TracedTensor, right: TracedTensor) -> Channels:
    """The axes before the last two, which the factors share."""
    factors = [
        TracedTensor(shape[:-2], {a: c for a, c in channels.items() if a < len(shape) - 2})
        for shape, channels in ((left.shape, left.channels), (right.shape, right.channels))
    ]
    shape = op.outputs[0][:-2]
    terms = dict(zip(("left", "right"), factors, strict=True))
    return elementwise(Operation("mul", terms, (shape,), op.units, op.module))[0]


def _count_matrix_product(
    op: Operation, left: TracedTensor, right: TracedTensor, result: Channels
) -> None:
    """Count a product of at most two removable widths; keep any further one."""
    shape = op.outputs[0]
    for axis in range(len(shape) - 2):
        op.units.keep(result.get(axis), _THIRD)
    rows, outputs, inputs = _positions(left, -2), _positions(right, -1), _positions(left, -1)
    can_go = op.units.can_go
    if can_go(rows) and can_go(outputs) and can_go(inputs):
        op.units.keep(outputs, _THIRD)
    # Removable rows take the place of a width that stays.
    if can_go(rows) and can_go(outputs):
        inputs = rows
    elif can_go(rows):
        outputs = rows
    macs = math.prod(shape) * left.shape[-1]
    _count(op, macs, outputs, inputs, left.is_weight != right.is_weight)


def attention(op: Operation) -> list[Channels]:
    """Keep all channels of fused attention over queries, keys and values."""
    for tensor in op.tensors:
        for along in tensor.channels.values():
            op.units.keep(along, _SUMMED)
    return [{} for _ in op.outputs]


def _count(op: Operation, macs: int, outputs: IntArray, inputs: IntArray, by_weight: bool) -> None:
    op.products.append(
        Product(macs=macs, output=outputs, input=inputs, by_weight=by_weight, module=op.module)
    )


def _positions(tensor: TracedTensor, axis: int) -> IntArray:
    """Positions along an axis, FIXED where it is not tracked."""
    along = tensor.positions(axis)
    return np.full(tensor.shape[axis], FIXED) if along is None else along


def _mark(
    op: Operation, weight: TracedTensor, outputs: IntArray | None, inputs: IntArray | None
) -> None:
    """Record which axes of a weight are its outputs and inputs; other tensors have none."""
    if weight.is_weight:
        op.units.mark_output(outputs)
        op.units.mark_input(inputs)


def _add_bias(op: Operation, bias: TracedTensor | None, outputs: IntArray | None) -> None:
    if bias is not None and bias.shape and outputs is not None:
        along = bias.positions(-1)
        if len(outputs) == bias.shape[-1]:
            op.units.join([outputs, along], _READ)
        if bias.is_weight:
            op.units.mark_output(along)
