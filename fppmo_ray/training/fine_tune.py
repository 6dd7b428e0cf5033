"""Training: one epoch of a recipe, or all of them.

Everything random comes from the seed: order, crops and flips from ``Images``, dropout from torch's
own generators, which are seeded here and left as they were. On a CPU, with the same number of
threads, equal arguments give equal weights to the bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from fppmo_ray.training.checkpoints import (
    TrainingState,
    capture,
    read_checkpoint,
    restore,
    training_identity,
    write_checkpoint,
)
from fppmo_ray.training.compute import PLAIN_COMPUTE, ComputeConfig, lay_out
from fppmo_ray.training.ddp import WHOLE, Shard, average_buffers, mean_over_replicas, wrap_ddp
from fppmo_ray.training.images import Images, Seed
from fppmo_ray.training.recipe import Recipe, learning_rate_at
from fppmo_ray.training.sgd import TorchGenerators, make_optimizer, train_on_batches


@dataclass(frozen=True, kw_only=True)
class EpochReport:
    """How training went in one epoch, on augmented images and changing weights."""

    epoch: int
    """Counted from 0."""
    loss: float
    """Mean training loss, with smoothing and distillation where the recipe has them."""
    accuracy: float
    """Share of images classified rightly, in [0, 1]."""
    learning_rate: float
    """Of the first step."""
    seconds: float
    """Wall time of the steps."""


def train_epoch(
    network: nn.Module,
    images: Images,
    recipe: Recipe,
    *,
    epoch: int,
    seed: Seed,
    state: TrainingState | None,
    compute: ComputeConfig = PLAIN_COMPUTE,
    teacher: nn.Module | None = None,
    shard: Shard = WHOLE,
) -> tuple[TrainingState, EpochReport]:
    """Train for one epoch of a recipe, in place.

    The result is a function of the arguments' values alone: it does not matter whether earlier
    epochs ran in this process or on another machine.

    Args:
        network: On the device of the images. Its weights count only where ``state`` is None.
        images: Search-train.
        recipe: Of the whole run.
        epoch: In [0, recipe.epochs), equal to ``state.epochs_done``.
        seed: Of the whole run.
        state: What the epoch before returned, None before epoch 0; it is not changed.
        compute: How the passes are computed.
        teacher: The dense network, for distillation.
        shard: The part of every batch that this process trains on; torch.distributed must be up
            where there are several, and each must make this call.

    Raises:
        ValueError: ``epoch`` is not the state's next, or lies outside the recipe; the state is
            another network's; the recipe wants a teacher and there is none; a batch cannot be
            parted evenly.
        RuntimeError: training diverged.
    """
    expected = 0 if state is None else state.epochs_done
    if epoch != expected or not epoch < recipe.epochs:
        raise ValueError(
            f"the state's next epoch is {expected} of a recipe of {recipe.epochs} "
            f"(counted from 0), got epoch {epoch}"
        )
    lay_out(network, compute)
    optimizer = make_optimizer(network, recipe)
    per_epoch = images.num_training_batches(recipe.batch_size)
    num_steps = recipe.epochs * per_epoch
    first_step = epoch * per_epoch
    if state is not None:
        restore(state, network, optimizer)
    rates = (learning_rate_at(recipe, (first_step + step) / num_steps) for step in range(per_epoch))
    batches = images.training_batches(recipe.batch_size, seed=seed, epoch=epoch, shard=shard)
    begin = time.perf_counter()
    with TorchGenerators(images, _own_seed(seed, shard), epoch).in_use():
        means = train_on_batches(
            wrap_ddp(network, shard),
            optimizer,
            zip(rates, batches, strict=True),
            recipe,
            dtype=compute.dtype,
            teacher=teacher,
            place=f"epoch {epoch}, ",
        )
    loss, accuracy = mean_over_replicas(means, shard, images.labels.device)
    report = EpochReport(
        epoch=epoch,
        loss=loss,
        accuracy=accuracy,
        learning_rate=learning_rate_at(recipe, first_step / num_steps),
        seconds=time.perf_counter() - begin,
    )
    average_buffers(network, shard)
    return capture(network, optimizer, epoch + 1), report


def _own_seed(seed: Seed, shard: Shard) -> Seed:
    """Of dropout: replicas drop other units, and the first what a process alone would drop."""
    if not shard.index:
        return seed
    return (*([seed] if isinstance(seed, int) else seed), shard.index)


def fine_tune(
    network: nn.Module,
    images: Images,
    recipe: Recipe,
    *,
    seed: Seed,
    compute: ComputeConfig = PLAIN_COMPUTE,
    teacher: nn.Module | None = None,
    checkpoint: Path | None = None,
    on_epoch: Callable[[EpochReport], None] | None = None,
) -> TrainingState:
    """Train for all epochs of a recipe, in place, going on from a checkpoint if there is one.

    Args:
        network: On the device of the images.
        images: Search-train.
        recipe: How to train.
        seed: Of all that is random.
        compute: How the passes are computed.
        teacher: The dense network, for distillation.
        checkpoint: File that is written after every epoch and, if it exists, read at the start.
        on_epoch: Called after every epoch that was trained here.

    Returns:
        The final state.

    Raises:
        ValueError: the checkpoint is corrupt or of another recipe, compute, seed or network; the
            recipe wants a teacher and there is none.
        RuntimeError: training diverged; the checkpoint is that of the last good epoch.
    """
    run = training_identity(recipe, compute, seed)
    state = read_checkpoint(checkpoint, run) if checkpoint is not None else None
    if state is not None:
        restore(state, network)
    for epoch in range(state.epochs_done if state is not None else 0, recipe.epochs):
        state, report = train_epoch(
            network,
            images,
            recipe,
            epoch=epoch,
            seed=seed,
            state=state,
            compute=compute,
            teacher=teacher,
        )
        if checkpoint is not None:
            write_checkpoint(checkpoint, state, run)
        if on_epoch is not None:
            on_epoch(report)
    return state if state is not None else capture(network, None, 0)
