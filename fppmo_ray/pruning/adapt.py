"""Weight adaptation: one set of dense weights is trained to serve many masks.

Every step runs the network of another mask, whose tensors are selected from the dense parameters,
so that gradients land there (as in slimmable and once-for-all networks: 1812.08928, 1908.09791).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle, islice

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fppmo_ray.distribution.space import BoolArray, IntArray
from fppmo_ray.pruning.extract import Axis, Tracing, check_axes, select
from fppmo_ray.training import (
    PLAIN_COMPUTE,
    ComputeConfig,
    EpochReport,
    Images,
    Recipe,
    Seed,
    TrainingState,
    recalibrate_batchnorm,
    train_epoch,
)

_RECALIBRATION_BATCH, _RECALIBRATION_BATCHES = 250, 4


def adapt_epoch(
    dense: nn.Module,
    tracing: Tracing,
    masks: BoolArray,
    images: Images,
    recipe: Recipe,
    *,
    epoch: int,
    seed: Seed,
    state: TrainingState | None,
    compute: ComputeConfig = PLAIN_COMPUTE,
    teacher: nn.Module | None = None,
) -> tuple[TrainingState, EpochReport]:
    """Train dense weights for one epoch under masks, in place; ``train_epoch`` in all else.

    The masks take turns, a step each, over all epochs. What a mask leaves of the batch norms'
    statistics is thrown away, and the whole network's are re-estimated after the epoch: they fit
    the dense network, and no pruned one, which is recalibrated whenever it is scored.

    Args:
        dense: The traced network, on the device of the images.
        tracing: What ``trace`` said of it.
        masks: Bool ``(num_masks, num_filters)``, True = kept; at least one.
        images: Search-train.
        recipe: Of all epochs.
        epoch: In [0, recipe.epochs), equal to ``state.epochs_done``.
        seed: Of the images.
        state: What the epoch before returned, None before epoch 0; it is not changed.
        compute: How the passes are computed; CUDA graphs are not, since every step has new shapes.
        teacher: The dense network as it was, for distillation.

    Raises:
        ValueError: see ``train_epoch``; there are no masks, or they do not fit the network.
        RuntimeError: training diverged.
    """
    if not len(masks):
        raise ValueError("weights are adapted to masks, got none")
    check_axes(dense, tracing.axis_lengths)
    steps_done = epoch * images.num_training_batches(recipe.batch_size)
    turns = islice(cycle(masks), steps_done % len(masks), None)
    with _pruned_passes(dense, tracing, turns, compute):
        trained, report = train_epoch(
            dense,
            images,
            recipe,
            epoch=epoch,
            seed=seed,
            state=state,
            compute=compute,
            teacher=teacher,
        )
    few = islice(images.batches(_RECALIBRATION_BATCH), _RECALIBRATION_BATCHES)
    recalibrate_batchnorm(dense, few, dtype=compute.dtype)
    statistics = {
        name: buffer.to("cpu", copy=True)
        for name, buffer in dense.named_buffers()
        if name in trained.network
    }
    return replace(trained, network=trained.network | statistics), report


@contextmanager
def _pruned_passes(
    dense: nn.Module, tracing: Tracing, turns: Iterator[BoolArray], compute: ComputeConfig
) -> Iterator[None]:
    """For a while, each call of the network runs what the next mask leaves of it."""

    def forward(*inputs: Tensor) -> Tensor:
        kept = tracing.kept_indices(next(turns))
        smaller = select(dense, kept)
        smaller.__dict__.pop("forward")  # this one, copied with the rest
        logits: Tensor = functional_call(smaller, _parameters(dense, kept, compute), inputs)
        return logits

    dense.__dict__["forward"] = forward  # stands in front of the class's own
    try:
        yield
    finally:
        del dense.__dict__["forward"]


def _parameters(
    dense: nn.Module, kept: Mapping[Axis, IntArray], compute: ComputeConfig
) -> dict[str, Tensor]:
    """The pruned network's parameters as functions of the dense ones."""
    layout = torch.channels_last if compute.channels_last else torch.contiguous_format
    selected: dict[str, Tensor] = {}
    for name, parameter in dense.named_parameters():
        tensor: Tensor = parameter
        for axis in range(parameter.dim()):
            if (positions := kept.get((name, axis))) is not None:
                index = torch.from_numpy(positions).to(parameter.device)
                tensor = tensor.index_select(axis, index)
        selected[name] = tensor.contiguous(memory_format=layout) if tensor.dim() == 4 else tensor
    return selected
