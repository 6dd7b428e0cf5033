"""Least-squares compensation: layers behind removed channels are re-fitted to the kept ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from fppmo_ray.distribution.space import BoolArray
from fppmo_ray.pruning.extract import Tracing
from fppmo_ray.training.modes import in_mode

# ResNet-20 with 57 % of its MACs cut, mean of eight sampled masks, CIFAR-10 (JPEG), 2,000 rows of
# search-val, accuracy after recalibration: 40.4 % without compensation; 58.8 % with half these
# samples, 59.5 % with them, 60.0 % with twice as many, at twice the time. The ridge does not
# matter: from 1e-6 to 1e-2 of the mean diagonal the accuracy moves by less than 0.1 point.
_MIN_SAMPLES = 8192
_SAMPLES_PER_UNKNOWN = 16
_RIDGE = 1e-4
_DENSE_BATCH = 64  # the dense pass is twice as fast on a CPU as in batches of 512
_CHUNK = 8192  # rows of the normal equations at a time, to bound memory


@dataclass(frozen=True, eq=False)
class _Target:
    """What a dense layer made, at some positions of some images."""

    positions: tuple[Tensor, ...]
    """Indices (S,) into image axis and spatial axes."""
    outputs: Tensor
    """(S, kept output channels)."""
    num_images: int


@torch.no_grad()
def compensate(
    pruned: nn.Module,
    dense: nn.Module,
    tracing: Tracing,
    keep: BoolArray,
    batches: Iterable[tuple[Tensor, Tensor]],
) -> None:
    """Re-fit, in place, the layers of ``pruned`` that lost inputs to what ``dense`` computes.

    Every such convolution or linear layer gets the weights that reproduce the dense layer's
    output best, from the inputs it really has: earlier layers are already re-fitted when it sees
    them, in one forward pass (He et al. 2017, 1707.06168). The ridge penalises the distance from
    the present weights, so no layer gets worse on the positions it is fitted to. Grouped
    convolutions, transposed ones and layers that are used more than once are left alone.

    Args:
        pruned: ``extract(dense, tracing, keep)``.
        dense: The dense network; left as it is.
        tracing: What ``trace`` said of it.
        keep: The mask, ``(num_filters,)``, True = kept.
        batches: Images (N, C, H, W) and labels (ignored), on the networks' device; 512 images of
            32 x 32 pixels are plenty. They are put in one batch, which must fit in memory.

    Raises:
        ValueError: there is no batch.
    """
    images = [images for images, _ in batches]
    if not images:
        raise ValueError("compensation needs at least one batch of images, got none")
    together = torch.cat(images)
    if together.dim() == 4:
        together = together.contiguous(memory_format=torch.channels_last)  # a third faster on CPUs
    rows = _layers_to_fit(dense, tracing, keep)
    chunks = torch.split(together, _DENSE_BATCH)
    targets: dict[str, list[_Target]] = {layer: [] for layer in rows}
    with in_mode(dense, training=False), _hooks() as hooks:
        for layer, kept in rows.items():
            hook = partial(_record, kept, len(together), targets[layer])
            hooks.append(dense.get_submodule(layer).register_forward_hook(hook))
        for chunk in chunks:
            dense(chunk)
    with in_mode(pruned, training=False), _hooks() as hooks:
        for layer, recorded in targets.items():
            if len(recorded) == len(chunks):  # else it is used more than once
                refit = partial(_refit, _joined(recorded))
                hooks.append(pruned.get_submodule(layer).register_forward_pre_hook(refit))
        pruned(together)


@contextmanager
def _hooks() -> Iterator[list[RemovableHandle]]:
    """A list of hooks that are removed at the end, whatever happens."""
    handles: list[RemovableHandle] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def _layers_to_fit(dense: nn.Module, tracing: Tracing, keep: BoolArray) -> dict[str, Tensor]:
    """The layers that lose inputs, with the output channels they keep."""
    kept = {(part.tensor, part.axis): part.kept(keep) for part in tracing.slices}
    layers = {}
    for part in tracing.slices:
        layer: Any = dense.get_submodule(part.layer)
        if part.side != "input" or kept[part.tensor, part.axis].all():
            continue
        if isinstance(layer, _ConvNd) and (layer.transposed or layer.groups > 1):
            continue
        everything = np.ones(len(layer.weight), dtype=np.bool_)
        outputs = np.flatnonzero(kept.get((part.tensor, 0), everything))
        layers[part.layer] = torch.from_numpy(outputs).to(layer.weight.device)
    return layers


def _record(
    kept: Tensor, num_images: int, recorded: list[_Target], layer: Any, _: object, output: Tensor
) -> None:
    """Keep a dense layer's output at this chunk's share of the positions its weights ask for."""
    channels_last = output.movedim(1, -1) if isinstance(layer, _ConvNd) else output
    shape = channels_last.shape[:-1]
    wanted = max(_MIN_SAMPLES, _SAMPLES_PER_UNKNOWN * layer.weight[0].numel())
    share = math.ceil(wanted * len(output) / num_images)
    chosen = np.arange(shape.numel())
    if share < len(chosen):
        rng = np.random.default_rng(len(recorded))
        chosen = np.sort(rng.choice(chosen, size=share, replace=False))
    positions = torch.unravel_index(torch.from_numpy(chosen).to(output.device), shape)
    recorded.append(_Target(positions, channels_last[positions][:, kept], len(output)))


def _joined(recorded: list[_Target]) -> _Target:
    """The chunks' targets as one, image indices counted over all chunks."""
    begins = accumulate((target.num_images for target in recorded), initial=0)
    positions = [
        (target.positions[0] + begin, *target.positions[1:])
        for target, begin in zip(recorded, begins, strict=False)  # the last begin is the total
    ]
    return _Target(
        tuple(torch.cat(axis) for axis in zip(*positions, strict=True)),
        torch.cat([target.outputs for target in recorded]),
        sum(target.num_images for target in recorded),
    )


def _refit(target: _Target, layer: Any, args: tuple[Tensor, ...]) -> None:
    """Solve for a layer's weights before it runs: ridge least squares for their change."""
    gather = _patches if isinstance(layer, _ConvNd) else _vectors
    weights = layer.weight.detach().double().flatten(1).T  # (inputs, outputs)
    if layer.bias is not None:
        weights = torch.cat([weights, layer.bias.detach().double()[None]])
    gram = weights.new_zeros(len(weights), len(weights))
    moments = torch.zeros_like(weights)
    for begin in range(0, len(target.outputs), _CHUNK):
        chunk = slice(begin, begin + _CHUNK)
        rows = gather(layer, args[0], tuple(axis[chunk] for axis in target.positions)).double()
        if layer.bias is not None:
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        gram += rows.T @ rows
        moments += rows.T @ (target.outputs[chunk].double() - rows @ weights)
    ridge = _RIDGE * gram.diagonal().mean()
    if ridge <= 0:
        return  # the inputs are all zero: any weights do
    gram.diagonal().add_(ridge)
    weights = weights + torch.cholesky_solve(moments, torch.linalg.cholesky(gram))
    if layer.bias is not None:
        layer.bias.copy_(weights[-1])
        weights = weights[:-1]
    layer.weight.copy_(weights.T.reshape(layer.weight.shape))


def _vectors(_: object, inputs: Tensor, positions: tuple[Tensor, ...]) -> Tensor:
    """A linear layer's inputs at these positions, (S, in_features)."""
    return inputs[positions]


def _patches(conv: _ConvNd, inputs: Tensor, positions: tuple[Tensor, ...]) -> Tensor:
    """What a convolution reads at these output positions, (S, in_channels * kernel size)."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = F.pad(inputs, conv._reversed_padding_repeated_twice, mode=mode)
    channels_last = padded.movedim(1, -1)
    image, *corners = positions
    num_axes = len(corners)
    windows = []
    for axis, corner in enumerate(corners):
        taps = torch.arange(conv.kernel_size[axis], device=inputs.device) * conv.dilation[axis]
        window = corner[:, None] * conv.stride[axis] + taps  # (S, taps)
        shape = [1] * num_axes
        shape[axis] = -1
        windows.append(window.reshape(len(corner), *shape))
    image = image.reshape(-1, *[1] * num_axes)
    patches = channels_last[(image, *windows)]  # (S, taps of every axis, channels)
    return patches.movedim(-1, 1).flatten(1)
