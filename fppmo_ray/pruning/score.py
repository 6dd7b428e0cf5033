"""The score of a mask: extract, refit, fine-tune, recalibrate, evaluate on held-out images."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from fppmo_ray.distribution import BoolArray, IntArray
from fppmo_ray.distribution.proposal import fault_of
from fppmo_ray.pruning.calibration import Refit
from fppmo_ray.pruning.calibration.divergence import TEMPERATURE, DenseAnswers
from fppmo_ray.pruning.calibration.features import last_feature_match
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
from fppmo_ray.training.distill import FEW_IMAGES
from fppmo_ray.training.feature_match import FeatureMatch

# Recalibration batch: it divides the usual image counts, and statistics of 250 images are steady.
_BATCH = 250


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """How much work a score is."""

    steps: int = 0
    """Fine-tuning steps; 0 = recalibrate only."""
    recalibrate_images: int = 1000
    """Search-train images that re-estimate the batch-norm statistics."""
    score_images: int = 2000
    """Held-out images on which loss and accuracy are computed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """A mask to score, with everything that its score depends on."""

    dense: nn.Module
    """The trained dense network; not changed."""
    tracing: Tracing
    """What ``trace`` returned for the dense network."""
    keep: BoolArray
    """The mask, ``(num_filters,)``, True = kept."""
    search_train: Images
    """Images for recalibration and fine-tuning."""
    held_out: Images
    """Images of the score: search-val, or choose-val for finalists."""
    fidelity: Fidelity
    """How much work to do."""
    recipe: Recipe
    """Recipe of the fine-tuning steps by labels. Its distillation is not used, since the teacher
    would double the steps' cost."""
    seed: tuple[int, ...] = (0,)
    """Random seed that decides which images are drawn and their order."""
    compute: ComputeConfig = PLAIN_COMPUTE
    """How the passes are computed; two compute configurations differ by rounding."""
    recalibration_batch: int = _BATCH
    """Images per pass that re-estimates statistics; the estimate depends on it a little."""
    refit: Refit | None = None
    """Refits the extracted network before it is fine-tuned or recalibrated; None: its weights stay
    those of the dense network."""
    reconstruct: Callable[[nn.Module, BoolArray], None] | None = None
    """Corrects the layers of the recalibrated network one after the other, before a distillation,
    or where no steps are done; None: they stay as they are."""
    answers: DenseAnswers | None = None
    """The dense network's answers to the held-out images: the loss is then the divergence from
    them. None: the loss is the cross-entropy with the labels."""
    few_images: Images | None = None
    """The calibration images: the steps are then a distillation of the dense network's answers to
    them, by ``FEW_IMAGES`` and after the recalibration. None: the steps are by labels."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """The figures of a scored mask, and how long the score took."""

    val_loss: float
    """Mean loss on held-out images: cross-entropy, or divergence from the dense network's answers.
    Minus the score of a user's own task."""
    val_accuracy: float | None
    """Accuracy in [0, 1]; None where nothing is classified."""
    seconds: float
    """Time that the score took."""

    @property
    def error(self) -> str | None:
        """A sentence if a figure is not finite, which makes the score a failure; else None."""
        fault = fault_of(self.val_loss) or fault_of(self.val_accuracy or 0.0)
        if fault is None:
            return None
        if self.val_accuracy is None:
            return f"the score is {fault}: {-self.val_loss}"
        return f"the score is {fault}: loss {self.val_loss}, accuracy {self.val_accuracy}"


def score(candidate: Candidate) -> Score:
    """Return the score of one mask.

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
    """A score that can be measured after fewer steps too, without changing its end by one bit.

    ``network`` is the pruned network in its present state.

    Args:
        candidate: The mask to score.
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
        if candidate.refit is not None:
            candidate.refit(self.network, keep)
        lay_out(self.network, candidate.compute)
        few, labels_alone = candidate.few_images, replace(candidate.recipe, distillation_weight=0.0)
        self._training = StepTraining(
            self.network,
            search_train if few is None else few,
            labels_alone if few is None else FEW_IMAGES,
            steps=fidelity.steps,
            seed=int(rng.integers(2**31)),
            compute=candidate.compute,
            teacher=None if few is None else dense,
            matches=() if few is None else _matches(self.network, candidate, few),
        )
        if few is not None:
            self.recalibrate()  # and not after the distillation, which it would cost two points
            self._reconstruct()

    def measure_at(self, rung: int) -> Metrics:
        """Train until ``rung`` steps are done in total, recalibrate, and evaluate.

        A distillation is recalibrated before its first step instead.

        Raises:
            ValueError: more than ``rung`` steps are done already, or the fidelity has fewer.
            RuntimeError: the steps diverged, or the loss is not finite.
        """
        self.train_to(rung)
        if self._candidate.few_images is None:
            self.recalibrate()
            if not rung:
                self._reconstruct()
        return self.look()

    def train_to(self, rung: int) -> None:
        """Train until ``rung`` steps are done in total; see ``measure_at``."""
        self._training.run_to(rung)

    def recalibrate(self) -> None:
        """Re-estimate the batch-norm statistics, in place; later training is not affected."""
        candidate = self._candidate
        batches = candidate.search_train.batches(candidate.recalibration_batch, self._recalibration)
        recalibrate_batchnorm(self.network, batches, dtype=candidate.compute.dtype)

    def _reconstruct(self) -> None:
        if self._candidate.reconstruct is not None:
            self._candidate.reconstruct(self.network, self._candidate.keep)

    def look(self) -> Metrics:
        """Return loss and accuracy on the held-out images of the score."""
        network, compute = self.network.eval(), self._candidate.compute
        if compute.fold_batchnorm:
            network = fold_batchnorm(network)
        batches = self._candidate.held_out.batches(compute.scoring_batch, self._scoring)
        answers = self._candidate.answers
        targets = None if answers is None else answers.logits(self._scoring)
        return evaluate(
            network, batches, dtype=compute.dtype, targets=targets, temperature=TEMPERATURE
        )

    def state(self) -> dict[str, Any]:
        """Return the training state, for ``restore``; see ``StepTraining.state``."""
        return self._training.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of an equal score; see ``StepTraining.restore``."""
        self._training.restore(state)


def _matches(network: nn.Module, candidate: Candidate, images: Images) -> list[FeatureMatch]:
    one, _ = next(iter(images.batches(1)))
    return last_feature_match(network, candidate.dense, candidate.tracing, candidate.keep, one)


def _first(order: IntArray, wanted: int) -> IntArray:
    """The first indices of a permutation, sorted; all of them if there are fewer."""
    return np.sort(order[:wanted])
