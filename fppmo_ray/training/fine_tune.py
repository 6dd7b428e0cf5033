"""Train a network for one epoch of a recipe, or for all of them.

All randomness comes from the seed: order, crops and flips from ``Images``, dropout from torch's own
generators, which are seeded here and restored afterwards. On a CPU with a fixed number of threads,
equal arguments give bit-equal weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
from fppmo_ray.training.feature_match import FeatureMatch
from fppmo_ray.training.images import Images, Seed
from fppmo_ray.training.recipe import Recipe, learning_rate_at
from fppmo_ray.training.sgd import TorchGenerators, make_optimizer, train_on_batches


@dataclass(frozen=True, kw_only=True)
class EpochReport:
    """Training loss and accuracy of one epoch, on augmented images and changing weights."""

    epoch: int
    """Number of the epoch, counted from 0."""
    loss: float
    """Mean training loss, including smoothing and distillation where the recipe has them."""
    accuracy: float
    """Share of images classified correctly, in [0, 1]."""
    learning_rate: float
    """Learning rate of the epoch's first step."""
    seconds: float
    """Wall time of the training steps."""


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
    matches: Sequence[FeatureMatch] = (),
    shard: Shard = WHOLE,
) -> tuple[TrainingState, EpochReport]:
    """Train for one epoch of a recipe, in place.

    The result depends on the arguments' values alone. Earlier epochs may have run in this process
    or on another machine.

    Args:
        network: A network on the device of the images. Its weights are used only where ``state`` is
            None.
        images: Search-train images.
        recipe: Recipe of the whole run.
        epoch: Number of the epoch in [0, recipe.epochs), equal to ``state.epochs_done``.
        seed: Random seed of the whole run.
        state: The state that the previous epoch returned, None before epoch 0; it is not changed.
        compute: How the passes are computed.
        teacher: The dense network, for distillation; None where the recipe's weight is 0.
        matches: Where the features of both are compared.
        shard: The part of every batch that this process trains on. With several processes,
            torch.distributed must be initialised and each process must make this call.

    Returns:
        The state after the epoch, and a report of the training.

    Raises:
        ValueError: ``epoch`` is not the state's next one, or outside the recipe; the state belongs
            to another network; the recipe needs a teacher and there is none; a batch cannot be
            divided evenly.
        RuntimeError: training diverged.
    """
    expected = 0 if state is None else state.epochs_done
    if epoch != expected or not epoch < recipe.epochs:
        raise ValueError(
            f"the state's next epoch is {expected} of a recipe of {recipe.epochs} "
            f"(counted from 0), got epoch {epoch}"
        )
    if shard.count > 1:
        compute = replace(compute, cuda_graphs=False)  # the exchange of gradients is not captured
    # Rebuild the optimizer and restore it, so that any process can train any epoch.
    lay_out(network, compute)
    optimizer = make_optimizer(network, recipe)
    if state is not None:
        restore(state, network, optimizer)
    # The schedule is laid over the steps of all epochs.
    per_epoch = images.num_training_batches(recipe.batch_size)
    num_steps = recipe.epochs * per_epoch
    first_step = epoch * per_epoch
    rates = (learning_rate_at(recipe, (first_step + step) / num_steps) for step in range(per_epoch))
    batches = images.training_batches(recipe.batch_size, seed=seed, epoch=epoch, shard=shard)
    begin = time.perf_counter()
    with TorchGenerators(images, _own_seed(seed, shard), epoch).in_use():
        means = train_on_batches(
            wrap_ddp(network, shard, min(recipe.batch_size, len(images))),
            optimizer,
            zip(rates, batches, strict=True),
            recipe,
            compute=compute,
            teacher=teacher,
            matches=matches,
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
    """Dropout seed of this replica; process 0 uses the seed of a single-process training."""
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
    matches: Sequence[FeatureMatch] = (),
    checkpoint: Path | None = None,
    on_epoch: Callable[[EpochReport], None] | None = None,
) -> TrainingState:
    """Train for all epochs of a recipe, in place, resuming from a checkpoint if there is one.

    Args:
        network: A network on the device of the images.
        images: Search-train images.
        recipe: Recipe of the run.
        seed: Random seed of the run.
        compute: How the passes are computed.
        teacher: The dense network, for distillation; None where the recipe's weight is 0.
        matches: Where the features of both are compared.
        checkpoint: File that is written after every epoch and, if it exists, read at the start.
        on_epoch: Function called with the report of every epoch trained in this call.

    Returns:
        The state after the last epoch.

    Raises:
        ValueError: the checkpoint is corrupt or belongs to another recipe, compute configuration,
            seed or network; the recipe needs a teacher and there is none.
        RuntimeError: training diverged; the checkpoint holds the last good epoch.
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
            matches=matches,
        )
        if checkpoint is not None:
            write_checkpoint(checkpoint, state, run)
        if on_epoch is not None:
            on_epoch(report)
    return state if state is not None else capture(network, None, 0)
