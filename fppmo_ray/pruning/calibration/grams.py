"""Calibration: one pass of the dense network over a few unlabelled images.

For every layer that reads prunable filters, the second moments of its input patches are summed
up (the Gram matrix). They are all that the OBS order, the error curves and the refit need.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fppmo_ray.distribution.space import IntArray
from fppmo_ray.pruning.calibration.consumers import (
    Consumer,
    find_consumers,
    input_patches,
)
from fppmo_ray.pruning.calibration.layer_outputs import is_stock
from fppmo_ray.pruning.extract import AxisUnits, Tracing, check_axes
from fppmo_ray.training.compute import in_mode
from fppmo_ray.training.device import copy_to
from fppmo_ray.training.inputs import inputs_of

RIDGE = 1e-4
"""Added to the diagonal of every Gram matrix, as a share of its mean, so that it has an inverse.
ResNet-20 at a cut of 57 %, 100 images: 75.9 % with 1e-6 and 1e-4, 76.1 % with 1e-2."""
MAX_BYTES = 2 * 1024**3
"""Default memory for all Gram matrices together. ResNet-50 (residual stream whole) takes 0.8 GiB:
3 x 3 convolutions of 512 channels have 4,608 columns, 170 MB each."""
PATCHES_PER_COLUMN = 32
"""Patches that are summed up, per column of a Gram matrix, unless there are fewer."""
MIN_PATCHES = 16384
"""Fewest patches that are summed up, unless there are fewer. With both numbers, ResNet-20 on 1,000
images ends as accurate as with all patches, in a fifth of the time."""
_FEWEST_COLUMNS = 64
_STRIP = 512


@dataclass(frozen=True, kw_only=True, eq=False)
class InputGram:
    """The second moments of a consumer's input patches."""

    consumer: Consumer
    blocks: tuple[tuple[IntArray, Tensor], ...]
    """Pairs: column numbers, ascending, and the Gram matrix of these columns in float64,
    ``(groups, columns, columns)``, ridge included. One pair unless memory is short; columns of
    different pairs count as uncorrelated."""
    mean: Tensor
    """Mean patch in float64, ``(groups, columns)``; zeros where the moments are not centred."""
    is_centred: bool
    """Whether the mean is subtracted: the layer has a bias, or a batch norm follows, either of
    which makes up for a constant change of the output. Otherwise moments are about zero."""
    num_patches: int
    """How many patches were summed up."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """What one pass of the dense network says of the layers that read prunable filters."""

    grams: tuple[InputGram, ...]
    """One per consumer whose inputs were seen."""
    unseen: tuple[AxisUnits, ...]
    """Input axes of weights whose inputs were not seen. Their filters are ordered by the size of
    these weights, and they are not refitted."""
    num_images: int
    """Images of the pass."""

    @property
    def num_bytes(self) -> int:
        """Memory of all Gram matrices."""
        return sum(
            block.numel() * block.element_size() for gram in self.grams for _, block in gram.blocks
        )


@torch.no_grad()
def calibrate(
    model: nn.Module,
    tracing: Tracing,
    batches: Iterable[Any],
    *,
    num_images: int | None = None,
    num_inputs: int = 1,
    max_bytes: int = MAX_BYTES,
    patches_per_column: int | None = PATCHES_PER_COLUMN,
) -> Calibration:
    """Sum up the second moments of the inputs of every layer that reads prunable filters.

    The network runs once over the images in eval mode. Products are computed in float32 (float64
    where the network is) and summed in float64, on the network's device.

    Args:
        model: The traced network; left as it is.
        tracing: Its tracing.
        batches: Unlabelled inputs, each a tensor (n, C, H, W) on the network's device, or a tuple
            that begins with the inputs, such as images and labels. A hundred images give a result,
            a thousand a better one.
        num_images: Images in all the batches together, which lets every image contribute equally
            many patches; None: all patches of every image are used.
        num_inputs: How many tensors the network's forward takes.
        max_bytes: Memory for all Gram matrices together. Where they would take more, the columns
            of the widest layers are split into equal blocks, which count as uncorrelated. That
            costs accuracy: ResNet-20 at a cut of 57 % falls from 77.8 to 72.8 % with 40 % of the
            memory it needs, to 70.6 % with 24 %, and without refit and OBS order to 45 %.
        patches_per_column: About so many patches, but at least ``MIN_PATCHES``, are used for each
            column of a Gram matrix; None: all. Without ``num_images`` it is not used.

    Raises:
        ValueError: there is no batch, an activation is not finite, or the network is another than
            the traced one.
    """
    check_axes(model, tracing.axis_lengths)
    consumers, others = find_consumers(model, tracing)
    most_columns = _block_columns(consumers, max_bytes)
    share = None if patches_per_column is None or num_images is None else 1 / num_images
    sums = [_Sums(consumer, most_columns, share, patches_per_column) for consumer in consumers]
    seen_images = _run(model, sums, batches, num_inputs)
    grams = [_finished(model, part) for part in sums if part.num_patches and not part.is_foreign]
    observed = {gram.consumer.tensor for gram in grams}
    unread = {consumer.tensor for consumer in consumers} - observed
    others += [p for p in tracing.slices if p.side == "input" and p.tensor in unread]
    if others:
        names = ", ".join(part.tensor for part in others)
        warnings.warn(
            f"the inputs of these weights could not be observed: {names}; the filters that they "
            "read are ordered by the size of these weights, and they are not refitted",
            stacklevel=2,
        )
    return Calibration(grams=tuple(grams), unseen=tuple(others), num_images=seen_images)


@dataclass(eq=False)
class _Sums:
    """Running sums of one consumer's patches."""

    consumer: Consumer
    most_columns: int
    share: float | None
    """The share of all images that one image is; None: use every patch."""
    patches_per_column: int | None
    blocks: list[tuple[IntArray, Tensor]] = field(default_factory=list)
    shift: Tensor | None = None
    """Mean of the first batch: subtracted, so that float32 sees no large common offset."""
    total: Tensor | None = None
    num_patches: int = 0
    is_foreign: bool = False
    """Whether a subclass computes something else than its stock class."""
    feeds_batchnorm: bool = False
    is_checked: bool = False

    def wanted(self, batch: int) -> int | None:
        """How many patches of a batch to use; None: all."""
        if self.share is None or self.patches_per_column is None:
            return None
        wanted = max(self.patches_per_column * self.consumer.num_columns, MIN_PATCHES)
        return math.ceil(wanted * self.share * batch)

    def add(self, patches: Tensor) -> None:
        """Add patches, (patches, groups, columns)."""
        if patches.dtype not in (torch.float32, torch.float64):
            patches = patches.float()
        patches = patches.transpose(0, 1)  # (groups, patches, columns)
        if self.shift is None:
            self._start(patches)
        assert self.shift is not None
        assert self.total is not None
        patches = patches - self.shift[:, None].to(patches.dtype)
        self.total += patches.sum(1, dtype=torch.float64)
        self.num_patches += patches.shape[1]
        for columns, block in self.blocks:
            whole = len(columns) == patches.shape[2]
            index = copy_to(patches.device, torch.from_numpy(columns))
            part = patches if whole else patches[:, :, index]
            # The upper triangle alone, strip by strip, takes little more than half the products.
            for begin in range(0, len(columns), _STRIP):
                strip = slice(begin, begin + _STRIP)
                block[:, strip, begin:] += part[:, :, strip].mT @ part[:, :, begin:]

    def _start(self, patches: Tensor) -> None:
        groups = len(patches)
        self.shift = patches.mean(1, dtype=torch.float64)
        self.total = torch.zeros_like(self.shift)
        for columns in _column_blocks(self.consumer, self.most_columns):
            size = len(columns)
            self.blocks.append((columns, self.shift.new_zeros(groups, size, size)))


def _run(model: nn.Module, sums: Sequence[_Sums], batches: Iterable[Any], num_inputs: int) -> int:
    """Run the network over all batches with hooks that add up; returns the number of images."""
    num_images = batch_size = num_batches = 0
    makers: dict[int, _Sums] = {}  # by id of the outputs that are alive in this batch
    alive: list[Tensor] = []

    def observe(part: _Sums, layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        images = args[0] if args else kwargs["input"]
        if not part.is_checked:
            part.is_checked = True
            part.is_foreign = not is_stock(layer, args, kwargs, output)
        if part.is_foreign:
            return
        makers[id(output)] = part
        alive.append(output)
        wanted = part.wanted(batch_size)
        part.add(input_patches(layer, images, output, wanted, num_batches))

    def read_by_batchnorm(_: nn.Module, args: Any) -> None:
        maker = makers.get(id(args[0])) if args else None
        if maker is not None:
            maker.feeds_batchnorm = True

    with in_mode(model, training=False), ExitStack() as hooks, full_precision():
        for part in sums:
            for name in part.consumer.modules:
                hook = partial(observe, part)
                layer = model.get_submodule(name)
                handle = layer.register_forward_hook(hook, with_kwargs=True)
                hooks.callback(handle.remove)
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                hooks.callback(module.register_forward_pre_hook(read_by_batchnorm).remove)
        for num_batches, batch in enumerate(batches):  # noqa: B007 (the hooks read it)
            inputs = inputs_of(batch, num_inputs)
            batch_size = len(inputs[0])
            model(*inputs)
            num_images += batch_size
            makers.clear()
            alive.clear()
    if not num_images:
        raise ValueError("a calibration needs images, got no batches")
    return num_images


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 matrices without TF32 or bfloat16 inside."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _finished(model: nn.Module, part: _Sums) -> InputGram:
    """The Gram matrices of the sums."""
    assert part.shift is not None
    assert part.total is not None
    offset = part.total / part.num_patches  # of the mean from the shift
    mean = part.shift + offset
    bias = getattr(model.get_submodule(part.consumer.modules[0]), "bias", None)
    is_centred = bias is not None or part.feeds_batchnorm
    blocks = []
    for columns, block in part.blocks:
        index = copy_to(offset.device, torch.from_numpy(columns))
        away, centre = offset[:, index], mean[:, index]
        block.copy_(block.triu() + block.triu(1).mT)
        block.div_(part.num_patches).sub_(away[:, :, None] * away[:, None, :])
        if not is_centred:
            block.add_(centre[:, :, None] * centre[:, None, :])
        if not torch.isfinite(block).all():
            raise ValueError(
                f"the inputs of {part.consumer.modules[0]} are not finite on the calibration "
                "images; check the network's weights and the images"
            )
        diagonal = block.diagonal(dim1=1, dim2=2)
        # An input that is 0 everywhere says nothing; any positive number makes it invertible.
        scale = diagonal.mean(1, keepdim=True)
        diagonal.add_(torch.where(scale > 0, RIDGE * scale, 1.0))
        blocks.append((columns, block))
    return InputGram(
        consumer=part.consumer,
        blocks=tuple(blocks),
        mean=mean if is_centred else torch.zeros_like(mean),
        is_centred=is_centred,
        num_patches=part.num_patches,
    )


def _block_columns(consumers: Sequence[Consumer], max_bytes: int) -> int:
    """The most columns of one Gram matrix at which all of them together fit.

    Raises:
        ValueError: not even blocks of 64 columns fit.
    """

    def total(most: int) -> int:
        return sum(
            8 * len(consumer.units) * size * size
            for consumer in consumers
            for size in map(len, _column_blocks(consumer, most))
        )

    most = max((consumer.num_columns for consumer in consumers), default=1)
    while total(most) > max_bytes:
        most = most * 7 // 8
        if most < _FEWEST_COLUMNS:
            raise ValueError(
                f"the Gram matrices take more than max_bytes = {max_bytes:,} even in blocks of "
                f"{_FEWEST_COLUMNS} columns; allow {total(_FEWEST_COLUMNS):,} or more"
            )
    return most


def _column_blocks(consumer: Consumer, most_columns: int) -> list[IntArray]:
    """The columns in blocks of about equal size, the channels of a filter all in one block."""
    if consumer.num_columns <= most_columns:
        return [np.arange(consumer.num_columns)]
    units = consumer.units[0]  # every group of a convolution has the same
    names, inverse = np.unique(units, return_inverse=True)
    num_blocks = min(len(names), math.ceil(consumer.num_columns / most_columns))
    block_of_channel = (inverse * num_blocks // len(names)).astype(np.int64)
    block_of_column = np.tile(block_of_channel, consumer.num_taps)
    return [np.flatnonzero(block_of_column == block) for block in range(num_blocks)]
