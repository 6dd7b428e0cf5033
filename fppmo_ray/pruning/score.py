"""The score of a mask: prune, recalibrate, fine-tune a little, look at held-out images."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from fppmo_ray.distribution import BoolArray, IntArray
from fppmo_ray.pruning.extract import extract
from fppmo_ray.pruning.trace import Tracing
from fppmo_ray.training import (
    PLAIN_COMPUTE,
    ComputeConfig,
    Images,
    Metrics,
    Recipe,
    StepTraining,
    evaluate,
    fold_batchnorm,
    lay_out,
    recalibrate_batchnorm,
)

# Of recalibration: divides the usual image counts, and statistics of 250 images are steady.
_BATCH = 250


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """How much work a score is."""

    steps: int = 0
    """Fine-tuning steps; 0 = recalibrate only."""
    recalibrate_images: int = 1000
    """Search-train images that re-estimate the batch-norm statistics."""
    score_images: int = 2000
    """Held-out images that loss and accuracy are read on."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """A mask to score, and all that its score is a function of."""

    dense: nn.Module
    """The trained dense network; left as it is."""
    tracing: Tracing
    """Of the dense network."""
    keep: BoolArray
    """The mask, ``(num_filters,)``, True = kept."""
    search_train: Images
    """For recalibration and fine-tuning."""
    held_out: Images
    """That the score is read on: search-val, or choose-val for finalists."""
    fidelity: Fidelity
    """How much work to do."""
    recipe: Recipe
    """How the fine-tuning steps are done; without distillation, whose teacher would double the
    steps' cost."""
    seed: tuple[int, ...] = (0,)
    """Decides which images are drawn and their order."""
    compute: ComputeConfig = PLAIN_COMPUTE
    """How the passes are computed; two compute configurations differ by rounding."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a worker found, and how long it took."""

    val_loss: float
    val_accuracy: float
    seconds: float


def score(candidate: Candidate) -> Score:
    """Score one mask.

    Raises:
        RuntimeError: the fine-tuning steps diverged, or the loss is not finite.
    """
    begin = time.perf_counter()
    metrics = ScoreInRungs(candidate).measure_at(candidate.fidelity.steps)
    return Score(
        val_loss=metrics.loss,
        val_accuracy=metrics.accuracy,
        seconds=time.perf_counter() - begin,
    )


class ScoreInRungs:
    """A score that can be read on the way: pausing and reading change no bit of where it ends.

    ``network`` is the pruned network, as it stands.
    """

    def __init__(self, candidate: Candidate) -> None:
        dense, tracing, keep = candidate.dense, candidate.tracing, candidate.keep
        search_train, fidelity = candidate.search_train, candidate.fidelity
        rng = np.random.default_rng(candidate.seed)
        self._candidate = candidate
        self._recalibration = _first(
            rng.permutation(len(search_train)), fidelity.recalibrate_images
        )
        self._scoring = _first(rng.permutation(len(candidate.held_out)), fidelity.score_images)
        self.network = extract(dense, tracing, keep)
        lay_out(self.network, candidate.compute)
        self._training = StepTraining(
            self.network,
            search_train,
            replace(candidate.recipe, distillation_weight=0.0),
            steps=fidelity.steps,
            seed=int(rng.integers(2**31)),
            compute=candidate.compute,
        )

    def measure_at(self, rung: int) -> Metrics:
        """Train until ``rung`` steps are done in all, recalibrate, and look at held-out images.

        Raises:
            ValueError: the rung is passed already, or is more than the fidelity's steps.
            RuntimeError: the steps diverged, or the loss is not finite.
        """
        self.train_to(rung)
        self.recalibrate()
        return self.look()

    def train_to(self, rung: int) -> None:
        """Train until ``rung`` steps are done in all; see ``measure_at``."""
        self._training.run_to(rung)

    def recalibrate(self) -> None:
        """Re-estimate the batch-norm statistics, in place; what training learns is not touched."""
        candidate = self._candidate
        batches = candidate.search_train.batches(_BATCH, self._recalibration)
        recalibrate_batchnorm(self.network, batches, dtype=candidate.compute.dtype)

    def look(self) -> Metrics:
        """Loss and accuracy on the held-out images of the score."""
        network, compute = self.network.eval(), self._candidate.compute
        if compute.fold_batchnorm:
            network = fold_batchnorm(network)
        batches = self._candidate.held_out.batches(compute.scoring_batch, self._scoring)
        return evaluate(network, batches, dtype=compute.dtype)

    def state(self) -> dict[str, Any]:
        """Where the score stands; see ``StepTraining.state``."""
        return self._training.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from where an equal score stood; see ``StepTraining.restore``."""
        self._training.restore(state)


def _first(order: IntArray, wanted: int) -> IntArray:
    """The first of a permutation, sorted; all of them where there are fewer."""
    return np.sort(order[:wanted])
