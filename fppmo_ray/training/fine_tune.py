"""Training: some steps, one epoch, or all of a recipe.

Everything random comes from the seed: order, crops and flips from ``Images``, dropout from torch's
own generators, which are seeded here and left as they were. On a CPU, with the same number of
threads, equal arguments give equal weights to the bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import SGD

from fppmo_ray.training.images import Batch, Images, Seed, derive_seed
from fppmo_ray.training.modes import arithmetic, in_mode
from fppmo_ray.training.recipe import Recipe, learning_rate_at, training_loss
from fppmo_ray.training.training_state import (
    TrainingState,
    capture,
    read_checkpoint,
    restore,
    write_checkpoint,
)

_CHECK_EVERY = 32  # steps between looks at the loss: each one waits for the device
_NETWORK_RANDOMNESS = 1  # tells dropout's seed from that of the images


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


def train_steps(
    network: nn.Module,
    images: Images,
    recipe: Recipe,
    *,
    steps: int,
    seed: Seed,
    teacher: nn.Module | None = None,
) -> None:
    """Train for some steps, in place, with the schedule laid over just these.

    Args:
        network: On the device of the images.
        images: Search-train.
        recipe: Its ``epochs`` play no part.
        steps: Batches to train on, at least 0.
        seed: Of all that is random.
        teacher: The dense network, for distillation.

    Raises:
        ValueError: ``steps`` is negative, or the recipe wants a teacher and there is none.
        RuntimeError: training diverged.
    """
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    optimizer = _optimizer(network, recipe)
    epochs = (images.training_batches(recipe.batch_size, seed=seed, epoch=e) for e in count())
    batches = islice(chain.from_iterable(epochs), steps)
    rates = (learning_rate_at(recipe, step / steps) for step in range(steps))
    with _seeded(images, derive_seed(seed, 0, _NETWORK_RANDOMNESS)):
        _descend(network, optimizer, zip(rates, batches, strict=True), recipe, teacher, "")


def train_epoch(
    network: nn.Module,
    images: Images,
    recipe: Recipe,
    *,
    epoch: int,
    seed: Seed,
    state: TrainingState | None,
    teacher: nn.Module | None = None,
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
        teacher: The dense network, for distillation.

    Raises:
        ValueError: ``epoch`` is not the state's next, or lies outside the recipe; the state is
            another network's; the recipe wants a teacher and there is none.
        RuntimeError: training diverged.
    """
    expected = 0 if state is None else state.epochs_done
    if epoch != expected or not epoch < recipe.epochs:
        raise ValueError(
            f"the state's next epoch is {expected} of a recipe of {recipe.epochs} "
            f"(counted from 0), got epoch {epoch}"
        )
    optimizer = _optimizer(network, recipe)
    if state is not None:
        restore(state, network, optimizer)
    per_epoch = images.num_training_batches(recipe.batch_size)
    num_steps = recipe.epochs * per_epoch
    first_step = epoch * per_epoch
    rates = (learning_rate_at(recipe, (first_step + step) / num_steps) for step in range(per_epoch))
    batches = images.training_batches(recipe.batch_size, seed=seed, epoch=epoch)
    place = f"epoch {epoch}, "
    begin = time.perf_counter()
    with _seeded(images, derive_seed(seed, epoch, _NETWORK_RANDOMNESS)):
        loss, accuracy = _descend(
            network, optimizer, zip(rates, batches, strict=True), recipe, teacher, place
        )
    report = EpochReport(
        epoch=epoch,
        loss=loss,
        accuracy=accuracy,
        learning_rate=learning_rate_at(recipe, first_step / num_steps),
        seconds=time.perf_counter() - begin,
    )
    return capture(network, optimizer, epoch + 1), report


def fine_tune(
    network: nn.Module,
    images: Images,
    recipe: Recipe,
    *,
    seed: Seed,
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
        teacher: The dense network, for distillation.
        checkpoint: File that is written after every epoch and, if it exists, read at the start.
        on_epoch: Called after every epoch that was trained here.

    Returns:
        The final state.

    Raises:
        ValueError: the checkpoint is corrupt or of another recipe, seed or network; the recipe
            wants a teacher and there is none.
        RuntimeError: training diverged; the checkpoint is that of the last good epoch.
    """
    state = read_checkpoint(checkpoint, recipe, seed) if checkpoint is not None else None
    if state is not None:
        restore(state, network)
    for epoch in range(state.epochs_done if state is not None else 0, recipe.epochs):
        state, report = train_epoch(
            network, images, recipe, epoch=epoch, seed=seed, state=state, teacher=teacher
        )
        if checkpoint is not None:
            write_checkpoint(checkpoint, state, recipe, seed)
        if on_epoch is not None:
            on_epoch(report)
    return state if state is not None else capture(network, None, 0)


def _optimizer(network: nn.Module, recipe: Recipe) -> SGD:
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    network.to(memory_format=layout)  # type: ignore[call-overload]  # missing in torch's stubs
    return SGD(
        [parameter for parameter in network.parameters() if parameter.requires_grad],
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=True,
    )


def _descend(
    network: nn.Module,
    optimizer: SGD,
    rated_batches: Iterable[tuple[float, Batch]],
    recipe: Recipe,
    teacher: nn.Module | None,
    place: str,
) -> tuple[float, float]:
    """One step per batch at its learning rate; mean loss and accuracy."""
    totals = torch.zeros(2, dtype=torch.float64)
    num_images = 0
    with in_mode(network, training=True), _answering(teacher, recipe) as answers:
        for step, (rate, (images, labels)) in enumerate(rated_batches):
            optimizer.param_groups[0]["lr"] = rate
            with arithmetic(images.device, recipe.dtype):
                logits = network(images)
                teacher_logits = answers(images)
            loss = training_loss(logits, labels, recipe, teacher_logits)
            _step(optimizer, loss, recipe.clip_norm)
            num_right = (logits.detach().argmax(1) == labels).sum()
            sums = torch.stack([loss.detach() * len(labels), num_right]).double()
            totals = totals.to(sums.device) + sums
            num_images += len(labels)
            if step % _CHECK_EVERY == _CHECK_EVERY - 1:
                _check_finite(totals, rate, f"{place}step {step}")
    if not num_images:
        return math.nan, math.nan
    _check_finite(totals, rate, f"{place}step {step}")
    loss_sum, right_sum = totals.tolist()
    return loss_sum / num_images, right_sum / num_images


def _step(optimizer: SGD, loss: Tensor, clip_norm: float | None) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip_norm)
    optimizer.step()


def _check_finite(totals: Tensor, rate: float, place: str) -> None:
    loss_sum = float(totals[0])
    if not math.isfinite(loss_sum):
        raise RuntimeError(
            f"fine-tuning diverged: the loss became {loss_sum} by {place}, at learning rate "
            f"{rate:.3g}; lower the learning rate or set clip_norm"
        )


@contextmanager
def _answering(
    teacher: nn.Module | None, recipe: Recipe
) -> Iterator[Callable[[Tensor], Tensor | None]]:
    """The teacher's logits for images, or None for every image where it has no weight."""
    if recipe.distillation_weight == 0:
        yield lambda images: None
        return
    if teacher is None:
        raise ValueError(
            f"a recipe with distillation_weight {recipe.distillation_weight} needs a teacher; "
            "pass the dense network, or set the weight to 0"
        )
    with in_mode(teacher, training=False):
        yield torch.no_grad()(teacher)


@contextmanager
def _seeded(images: Images, seed: int) -> Iterator[None]:
    """Torch's own generators at ``seed`` for a while."""
    device = images.labels.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
