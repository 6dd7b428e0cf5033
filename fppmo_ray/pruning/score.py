"""The score of a mask: prune, recalibrate, fine-tune a little, look at held-out images."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from fppmo_ray.distribution import BoolArray, IntArray
from fppmo_ray.pruning.compensate import compensate
from fppmo_ray.pruning.extract import extract
from fppmo_ray.pruning.trace import Tracing
from fppmo_ray.training import (
    Images,
    Metrics,
    Recipe,
    StepTraining,
    evaluate,
    recalibrate_batchnorm,
)

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
    stretches = ScoreInRungs(
        dense,
        tracing,
        keep,
        search_train=search_train,
        held_out=held_out,
        fidelity=fidelity,
        recipe=recipe,
        seed=seed,
    )
    metrics = stretches.measure_at(fidelity.steps)
    return Score(
        val_loss=metrics.loss,
        val_accuracy=metrics.accuracy,
        seconds=time.perf_counter() - begin,
    )


class ScoreInRungs:
    """A score that can be read on the way: pausing and reading change no bit of where it ends.

    ``network`` is the pruned network, as it stands. The arguments are those of ``score``.
    """

    def __init__(
        self,
        dense: nn.Module,
        tracing: Tracing,
        keep: BoolArray,
        *,
        search_train: Images,
        held_out: Images,
        fidelity: Fidelity,
        recipe: Recipe,
        seed: tuple[int, ...],
    ) -> None:
        rng = np.random.default_rng(seed)
        self._search_train, self._held_out = search_train, held_out
        self._recalibration = _draw(rng, len(search_train), fidelity.recalibrate_images)
        self._scoring = _draw(rng, len(held_out), fidelity.score_images)
        self._dtype = recipe.dtype
        self.network = extract(dense, tracing, keep)
        if recipe.channels_last:
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch stubs
        if fidelity.compensate:
            few = self._recalibration[:_COMPENSATE_IMAGES]
            compensate(self.network, dense, tracing, keep, search_train.batches(_BATCH, few))
        self._training = StepTraining(
            self.network,
            search_train,
            replace(recipe, distillation_weight=0.0),
            steps=fidelity.steps,
            seed=int(rng.integers(2**31)),
        )

    def measure_at(self, rung: int) -> Metrics:
        """Train until ``rung`` steps are done in all, recalibrate, and look at held-out images.

        Recalibration is in place: it does not touch what training learns.

        Raises:
            ValueError: the rung is passed already, or is more than the fidelity's steps.
            RuntimeError: the steps diverged, or the loss is not finite.
        """
        self._training.run_to(rung)
        recalibration = self._search_train.batches(_BATCH, self._recalibration)
        recalibrate_batchnorm(self.network, recalibration, dtype=self._dtype)
        return evaluate(
            self.network, self._held_out.batches(_BATCH, self._scoring), dtype=self._dtype
        )

    def state(self) -> dict[str, Any]:
        """Where the score stands; see ``StepTraining.state``."""
        return self._training.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from where an equal score stood; see ``StepTraining.restore``."""
        self._training.restore(state)


def _draw(rng: np.random.Generator, available: int, wanted: int) -> IntArray:
    """Sorted indices without repetition; all of them where fewer are available."""
    return np.sort(rng.permutation(available)[:wanted])
