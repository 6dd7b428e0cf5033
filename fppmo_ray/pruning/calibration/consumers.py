"""The layers that read prunable filters: their weights as matrices, their inputs as patches.

Every such layer is a matrix product of patches of its input. A convolution's patch is what its
kernel covers at one output position, a linear layer's is one input vector, and a transposed
convolution is a convolution of the input with zeros between its pixels. Columns are ordered tap by
tap, and within a tap channel by channel, because then a patch is copied in long runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fppmo_ray.distribution.space import IntArray
from fppmo_ray.pruning.extract import AxisUnits, Tracing

_STOCK = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)
STOCK_LAYERS = (*_STOCK, nn.ConvTranspose3d, nn.Linear)
"""The classes whose arithmetic is known; a subclass is compared with them when it runs."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Consumer:
    """A layer that reads prunable filters, as a product of matrices."""

    tensor: str
    """Name of the weight in the state dict."""
    modules: tuple[str, ...]
    """Names of the modules that hold the weight; several where it is shared."""
    units: IntArray
    """``(groups, channels per group)``: the filter that every input channel belongs to, -1 =
    always kept. Groups are those of a grouped convolution, 1 otherwise."""
    num_taps: int
    """Kernel positions, 1 for a linear layer."""

    @property
    def num_columns(self) -> int:
        """Columns of a group's matrix: taps times channels."""
        return self.num_taps * int(self.units.shape[1])


def find_consumers(model: nn.Module, tracing: Tracing) -> tuple[list[Consumer], list[AxisUnits]]:
    """The consumers whose arithmetic is known, and the input axes of all others.

    Args:
        model: The traced network.
        tracing: Its tracing.

    Returns:
        Convolutions, transposed convolutions and linear layers; then the axes of weights that
        something else reads, such as attention or a layer that changes its weight first.
    """
    consumers: list[Consumer] = []
    others: list[AxisUnits] = []
    for part in tracing.slices:
        if part.side != "input":
            continue
        layer: Any = model.get_submodule(part.layer)
        known = isinstance(layer, STOCK_LAYERS) and part.tensor.rpartition(".")[2] == "weight"
        read_axis = 0 if isinstance(layer, _ConvTransposeNd) else 1
        if not known or part.axis != read_axis:
            others.append(part)
            continue
        groups = layer.groups if isinstance(layer, _ConvNd) else 1
        # A grouped convolution has one axis for all groups, a transposed one has them in a row.
        rows = groups if isinstance(layer, _ConvTransposeNd) else 1
        units = part.units.reshape(rows, -1)
        consumers.append(
            Consumer(
                tensor=part.tensor,
                modules=_holders(model, layer.weight),
                units=units if rows == groups else units.repeat(groups, axis=0),
                num_taps=math.prod(_kernel(layer)),
            )
        )
    return consumers, others


def weight_matrix(layer: nn.Module, weight: Tensor | None = None) -> Tensor:
    """A layer's weight in float64 as ``(groups, outputs per group, columns)``.

    Args:
        layer: A consumer's module.
        weight: Instead of the layer's own, a tensor of its weight's shape.
    """
    module: Any = layer
    weight = (module.weight if weight is None else weight).detach().double()
    if isinstance(layer, nn.Linear):
        return weight[None]
    if isinstance(layer, _ConvTransposeNd):
        # (I, O / g, taps) to (g, O / g, I / g, taps reversed)
        weight = weight.flip(tuple(range(2, weight.dim()))).flatten(2)
        grouped = torch.unflatten(weight, 0, (layer.groups, -1)).transpose(1, 2)
    else:
        grouped = torch.unflatten(weight.flatten(2), 0, (module.groups, -1))  # (g, O/g, I/g, taps)
    return grouped.transpose(2, 3).flatten(2)


@torch.no_grad()
def write_matrix(layer: nn.Module, matrix: Tensor) -> None:
    """Write, in place, a layer's weight from its matrix; the inverse of ``weight_matrix``.

    Args:
        layer: A consumer's module.
        matrix: ``(groups, outputs per group, columns)``.
    """
    module: Any = layer
    if isinstance(layer, nn.Linear):
        module.weight.copy_(matrix[0])
        return
    taps = math.prod(module.kernel_size)
    grouped = torch.unflatten(matrix, 2, (taps, -1)).transpose(2, 3)  # (g, O / g, I / g, taps)
    if isinstance(layer, _ConvTransposeNd):
        kernel = torch.unflatten(grouped.transpose(1, 2).flatten(0, 1), 2, module.kernel_size)
        module.weight.copy_(kernel.flip(tuple(range(2, kernel.dim()))))
    else:
        module.weight.copy_(torch.unflatten(grouped.flatten(0, 1), 2, module.kernel_size))


def input_patches(
    layer: nn.Module, images: Tensor, output: Tensor, num_wanted: int | None, offset: int = 0
) -> Tensor:
    """The rows that a layer's matrix is multiplied with, ``(patches, groups, columns)``.

    Args:
        layer: A consumer's module.
        images: Its input: (..., I) of a linear layer, (N, I, ...) or (I, ...) of a convolution.
        output: Its output.
        num_wanted: About so many patches, on a regular lattice of output positions; None: all.
        offset: Shifts the lattice, >= 0; vary it from batch to batch.
    """
    if isinstance(layer, nn.Linear):
        rows = images.reshape(-1, images.shape[-1])
        step = 1 if num_wanted is None else max(1, len(rows) // num_wanted)
        return rows[offset % step :: step, None]
    module: Any = layer
    kernel = module.kernel_size
    if images.dim() == len(kernel) + 1:
        images, output = images[None], output[None]
    if isinstance(layer, _ConvTransposeNd):
        padded, stride = _zero_stuffed(module, images, output), (1,) * len(kernel)
        steps: Sequence[int] = (1,) * len(kernel)  # a lattice could miss taps: they alternate
    else:
        padded, stride = _padded(module, images), module.stride
        steps = _lattice(output, num_wanted)
    windows = padded.movedim(1, -1).contiguous()
    for axis, size in enumerate(kernel):
        reach = module.dilation[axis] * (size - 1) + 1
        start = offset // math.prod(steps[:axis]) % steps[axis] * stride[axis]
        windows = windows.narrow(1 + axis, start, windows.shape[1 + axis] - start)
        windows = windows.unfold(1 + axis, reach, stride[axis] * steps[axis])
        windows = windows[..., :: module.dilation[axis]]
    # (N, positions, I, taps) with several axes each, to (N, positions, groups, taps, I / g)
    windows = torch.unflatten(windows, 1 + len(kernel), (module.groups, -1))
    windows = windows.movedim(2 + len(kernel), -1)
    columns = math.prod(kernel) * windows.shape[-1]
    return windows.reshape(-1, module.groups, columns)


def output_rows(
    layer: nn.Module, output: Tensor, num_wanted: int | None, offset: int = 0
) -> Tensor:
    """The outputs at the positions of ``input_patches``, ``(patches, outputs)``.

    Args:
        layer: A consumer's module.
        output: Its output, or a tensor of the same shape.
        num_wanted: As for ``input_patches``.
        offset: As for ``input_patches``.
    """
    if isinstance(layer, nn.Linear):
        rows = output.reshape(-1, output.shape[-1])
        step = 1 if num_wanted is None else max(1, len(rows) // num_wanted)
        return rows[offset % step :: step]
    module: Any = layer
    if output.dim() == len(module.kernel_size) + 1:
        output = output[None]
    if not isinstance(layer, _ConvTransposeNd):
        steps = _lattice(output, num_wanted)
        for axis, step in enumerate(steps):
            start = offset // math.prod(steps[:axis]) % step
            places = torch.arange(start, output.shape[2 + axis], step, device=output.device)
            output = output.index_select(2 + axis, places)
    return output.movedim(1, -1).reshape(-1, output.shape[1])


def made_axis(layer: nn.Module) -> int:
    """The axis of a layer's weight along which its outputs lie."""
    return 1 if isinstance(layer, _ConvTransposeNd) else 0


def _holders(model: nn.Module, weight: Tensor) -> tuple[str, ...]:
    """Names of the modules with this very parameter as their weight."""
    return tuple(
        name for name, module in model.named_modules() if getattr(module, "weight", None) is weight
    )


def _kernel(layer: Any) -> tuple[int, ...]:
    kernel: tuple[int, ...] = layer.kernel_size if isinstance(layer, _ConvNd) else (1,)
    return kernel


def _padded(conv: Any, images: Tensor) -> Tensor:
    """The input with the convolution's own padding, whatever its mode."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    if not any(conv._reversed_padding_repeated_twice):
        return images
    return F.pad(images, conv._reversed_padding_repeated_twice, mode=mode)


def _zero_stuffed(conv: Any, images: Tensor, output: Tensor) -> Tensor:
    """The input of the ordinary convolution that equals a transposed one."""
    padding: list[int] = []
    stuffed = images
    for axis, size in enumerate(conv.kernel_size):
        dim, stride = 2 + axis, conv.stride[axis]
        length = stuffed.shape[dim]
        if stride > 1:
            zeros = stuffed.new_zeros(*stuffed.shape[: dim + 1], stride, *stuffed.shape[dim + 1 :])
            zeros.select(dim + 1, 0).copy_(stuffed)
            stuffed = zeros.flatten(dim, dim + 1).narrow(dim, 0, (length - 1) * stride + 1)
        reach = conv.dilation[axis] * (size - 1)
        before = reach - conv.padding[axis]
        after = output.shape[dim] + reach - stuffed.shape[dim] - before
        padding = [before, after, *padding]  # the last axis comes first
    return F.pad(stuffed, padding)


def _lattice(output: Tensor, num_wanted: int | None) -> Sequence[int]:
    """Steps between output positions along every axis, so that about enough patches are left."""
    lengths = output.shape[2:]
    steps = [1] * len(lengths)
    if num_wanted is None:
        return steps
    too_many = len(output) * math.prod(lengths) // max(num_wanted, 1)
    axis = 0
    while too_many >= 2 and any(2 * step <= n for step, n in zip(steps, lengths, strict=True)):
        if 2 * steps[axis] <= lengths[axis]:
            steps[axis] *= 2
            too_many //= 2
        axis = (axis + 1) % len(lengths)
    return steps
