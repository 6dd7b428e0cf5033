"""The score of a mask: prune, recalibrate, fine-tune a little, look at held-out images."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from fppmo_ray.distribution import BoolArray, IntArray
from fppmo_ray.pruning.compensate import compensate
from fppmo_ray.pruning.extract import extract
from fppmo_ray.pruning.trace import Tracing
from fppmo_ray.training import Images, Recipe, evaluate, recalibrate_batchnorm, train_steps

_BATCH = 250  # divides the usual image counts; batch statistics of 250 32x32 images are steady
_COMPENSATE_IMAGES = 512


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """How much work a score is."""

    steps: int = 50
    """Fine-tuning steps; 0 = recalibrate only."""
    compensate: bool = False
    """Re-fit the layers behind removed channels by least squares first."""
    recalibrate_images: int = 1000
    """Search-train images that re-estimate the batch-norm statistics."""
    score_images: int = 2000
    """Held-out images that loss and accuracy are read on."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a worker found, and how long it took."""

    val_loss: float
    val_accuracy: float
    seconds: float


def score(
    dense: nn.Module,
    tracing: Tracing,
    keep: BoolArray,
    *,
    search_train: Images,
    held_out: Images,
    fidelity: Fidelity,
    recipe: Recipe,
    seed: tuple[int, ...],
) -> Score:
    """Score one mask as a function of weights, mask, fidelity, recipe and seed alone.

    Args:
        dense: The trained dense network; left as it is.
        tracing: Of the dense network.
        keep: The mask, ``(num_filters,)``, True = kept.
        search_train: Images for recalibration and fine-tuning.
        held_out: Images that the score is read on: search-val, or choose-val for finalists.
        fidelity: How much work to do.
        recipe: How the fine-tuning steps are done, and the arithmetic of all passes; without
            distillation, whose teacher would double the steps' cost.
        seed: Decides which images are drawn and their order.

    Raises:
        RuntimeError: the fine-tuning steps diverged, or the loss is not finite.
    """
    begin = time.perf_counter()
    rng = np.random.default_rng(seed)
    recalibration = _draw(rng, len(search_train), fidelity.recalibrate_images)
    scoring = _draw(rng, len(held_out), fidelity.score_images)
    pruned = extract(dense, tracing, keep)
    if recipe.channels_last:
        pruned.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch stubs
    if fidelity.compensate:
        few = recalibration[:_COMPENSATE_IMAGES]
        compensate(pruned, dense, tracing, keep, search_train.batches(_BATCH, few))
    if fidelity.steps:
        steps_recipe = replace(recipe, distillation_weight=0.0)
        train_steps(
            pruned,
            search_train,
            steps_recipe,
            steps=fidelity.steps,
            seed=int(rng.integers(2**31)),
        )
    dtype = recipe.dtype
    recalibrate_batchnorm(pruned, search_train.batches(_BATCH, recalibration), dtype=dtype)
    metrics = evaluate(pruned, held_out.batches(_BATCH, scoring), dtype=dtype)
    return Score(
        val_loss=metrics.loss,
        val_accuracy=metrics.accuracy,
        seconds=time.perf_counter() - begin,
    )


def _draw(rng: np.random.Generator, available: int, wanted: int) -> IntArray:
    """Sorted indices without repetition; all of them where fewer are available."""
    return np.sort(rng.permutation(available)[:wanted])
