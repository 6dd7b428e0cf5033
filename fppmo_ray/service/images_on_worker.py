"""Image classification in a worker's process: scores, trainings and evaluations."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor, nn

from fppmo_ray.distribution import BoolArray, IntArray
from fppmo_ray.pruning import Candidate, Score, Tracing, extract, score
from fppmo_ray.pruning.calibration import Calibration, DenseCalibration, Refit
from fppmo_ray.pruning.calibration.divergence import DenseAnswers
from fppmo_ray.pruning.calibration.features import last_feature_match
from fppmo_ray.pruning.compute_trial import ComputeTrial, Timed, try_compute, try_training
from fppmo_ray.pruning.distillation import distill_pruned
from fppmo_ray.service.journal.facts import DenseScored
from fppmo_ray.service.problem import Batches
from fppmo_ray.service.settings import SearchSettings
from fppmo_ray.service.worker_protocol import Tested, TrainingReport, TrainingTask
from fppmo_ray.training import (
    ComputeConfig,
    Dataset,
    Images,
    Shard,
    Splits,
    TrainingState,
    evaluate,
    open_images,
    recalibrate_batchnorm,
    train_epoch,
)
from fppmo_ray.training.device import device_module
from fppmo_ray.training.feature_match import FeatureMatch
from fppmo_ray.training.recipe import feature_weight_of

logger = logging.getLogger(__name__)

_RECALIBRATION_BATCH = 250
_EVALUATION_BATCH = 250
_TAYLOR_BATCHES = 8  # 1,000 images: the order of the filters hardly moves with more
_Z = 1.96  # of the normal distribution, for intervals of 95 %


class ImagesOnWorker:
    """Image classification in a worker's process.

    Args:
        dataset: Training and test images.
        splits: Rows of the training images.
        tracing: Tracing of the dense network.
        settings: Recipe, and how much work a score is.
        device: The worker's device.
        threads: CPUs that decode images and calibrate.
    """

    latency_batches: Sequence[int] = (1, 64)

    def __init__(
        self,
        dataset: Dataset,
        splits: Splits,
        tracing: Tracing,
        settings: SearchSettings,
        device: torch.device,
        *,
        threads: int,
    ) -> None:
        self._dataset = dataset
        self._splits = splits
        self._tracing = tracing
        self._settings = settings
        self._device = device
        self._threads = threads
        self.images = cache(self._open)
        """Returns the images of ``search_train``, ``search_val``, ``choose_val`` or ``test``, or
        those of search-train that calibrate (``calibration``)."""
        self._calibration = DenseCalibration(tracing, self._calibration_images, threads=threads)
        self._dense_answers: dict[str, DenseAnswers] = {}
        """The last dense network's answers, by split."""

    def load(self) -> None:
        """Put the images that every score looks at on the device."""
        for split in ("search_train", "search_val"):
            self.images(split)

    def inputs(self) -> tuple[Tensor, ...]:
        """Return one image of choose-val, on the device."""
        image, _ = next(iter(self.images("choose_val").batches(1)))
        return (image,)

    def candidate(
        self,
        dense: nn.Module,
        keep: BoolArray,
        *,
        seed: Sequence[int],
        split: str,
        compute: ComputeConfig,
    ) -> Candidate:
        """Return everything that the score of a mask depends on.

        Args:
            dense: The dense network.
            keep: The mask, ``(num_filters,)``.
            seed: Seed of everything random in the score.
            split: ``search_val`` for a proposal; ``choose_val`` for a finalist, on more images.
            compute: How passes are computed.
        """
        settings, is_proposal = self._settings, split != "choose_val"
        distils = settings.scoring.score_by == "divergence" and settings.scoring.score_steps > 0
        return Candidate(
            dense=dense,
            tracing=self._tracing,
            keep=keep,
            search_train=self.images("search_train"),
            held_out=self.images(split),
            fidelity=settings.fidelity() if is_proposal else settings.rescore_fidelity(),
            recipe=settings.fine_tune,
            seed=tuple(seed),
            compute=compute,
            refit=self._refit(dense),
            reconstruct=self._reconstruct(
                dense, settings.scoring.score_reconstruct_images if is_proposal else None
            ),
            answers=self._answers(dense, split),
            few_images=self.images("calibration") if distils else None,
        )

    def score(
        self,
        dense: nn.Module,
        keep: BoolArray,
        *,
        seed: Sequence[int],
        split: str,
        compute: ComputeConfig,
    ) -> Score:
        """Score the network that a mask leaves: see ``candidate`` and ``pruning.score``.

        Raises:
            RuntimeError: the GPU's memory is too small, for batches of a quarter of the size too.
        """
        candidate = self.candidate(dense, keep, seed=seed, split=split, compute=compute)
        try:
            return score(candidate)
        except torch.OutOfMemoryError as error:
            reason = str(error)  # the error itself would keep the score's memory
        smaller = replace(compute, scoring_batch=max(1, _RECALIBRATION_BATCH // 4))
        logger.warning("a score is tried again, %s: %s", smaller, reason)
        device_module(self._device).empty_cache()
        try:
            return score(
                replace(candidate, compute=smaller, recalibration_batch=smaller.scoring_batch)
            )
        except torch.OutOfMemoryError as error:
            raise RuntimeError(
                f"a score needs more memory than the GPU has, even {smaller}: {error}; let fewer "
                "workers share a GPU"
            ) from None

    @torch.no_grad()
    def score_dense(self, dense: nn.Module) -> DenseScored:
        """Evaluate the dense network on search-val.

        Args:
            dense: The dense network.

        Raises:
            RuntimeError: its answers are not finite.
        """
        batches = self.images("search_val").batches(_EVALUATION_BATCH)
        logits = torch.cat([dense(images) for images, _ in batches])
        if not logits.isfinite().all():
            raise RuntimeError(
                "the dense network answers with NaN or infinity; check its weights and its inputs"
            )
        labels = self.images("search_val").labels.cpu().numpy()
        return dense_scored(logits.argmax(1).cpu().numpy(), labels, logits.shape[1])

    def try_compute(
        self, dense: nn.Module, keep: BoolArray, compute: ComputeConfig, *, of: Timed = "score"
    ) -> ComputeTrial:
        """Measure a score or an epoch: see ``pruning.compute_trial``."""
        split = "search_val"
        candidate = self.candidate(dense, keep, seed=(0,), split=split, compute=compute)
        return try_compute(candidate) if of == "score" else try_training(candidate)

    def pruned(self, dense: nn.Module, keep: BoolArray, *, for_epochs: bool = False) -> nn.Module:
        """Return the extracted network, refitted and reconstructed if the settings say so.

        Its batch norms have its own statistics. See ``TaskOnWorker.pruned``.
        """
        network = extract(dense, self._tracing, keep)
        if (refit := self._refit(dense)) is not None:
            refit(network, keep)
        count = self._settings.scoring.recalibrate_images
        drawn = self.images("search_train").batches(_RECALIBRATION_BATCH, self._drawn(count))
        recalibrate_batchnorm(network, drawn)
        reconstruct = None if for_epochs else self._reconstruct(dense, None)
        if reconstruct is not None:
            reconstruct(network, keep)
        return network

    def calibration(self, dense: nn.Module) -> Calibration:
        """Return the calibration of a dense network on some images of search-train.

        Args:
            dense: The dense network.
        """
        return self._calibration.of(dense)

    def _calibration_images(self) -> tuple[Images, IntArray]:
        return self.images("search_train"), self._drawn(
            self._settings.calibration.calibration_images
        )

    def _refit(self, dense: nn.Module) -> Refit | None:
        return self._calibration.refit(dense) if self._settings.calibration.refit else None

    def _reconstruct(
        self, dense: nn.Module, num_images: int | None
    ) -> Callable[[nn.Module, BoolArray], None] | None:
        """Return what corrects the layers of a recalibrated network; None: nothing does.

        Args:
            dense: The dense network.
            num_images: How many calibration images to use; None: all.
        """
        if not self._settings.calibration.refit or num_images == 0:
            return None
        return partial(self._calibration.reconstruct, dense, num_images=num_images)

    def importance_batches(self, seed: int) -> Batches:
        """Return a few labelled batches of search-train.

        Args:
            seed: Seed of the images that are drawn.
        """
        images, batch = self.images("search_train"), self._settings.fine_tune.batch_size
        drawn = np.random.default_rng(seed).permutation(len(images))[: batch * _TAYLOR_BATCHES]
        return images.batches(batch, np.sort(drawn))

    def train_epoch(
        self,
        network: nn.Module,
        task: TrainingTask,
        epoch: int,
        state: TrainingState | None,
        *,
        teacher: nn.Module | None,
        compute: ComputeConfig,
        shard: Shard,
    ) -> tuple[TrainingState, TrainingReport]:
        """Train on search-train for one epoch of the recipe: see ``training.train_epoch``."""
        places: Sequence[FeatureMatch] = ()
        if teacher is not None and feature_weight_of(task.recipe) > 0:
            one = self.inputs()
            places = last_feature_match(network, teacher, self._tracing, task.keep, *one)
        new_state, report = train_epoch(
            network,
            self.images("search_train"),
            task.recipe,
            epoch=epoch,
            seed=task.seed,
            state=state,
            compute=compute,
            teacher=teacher,
            matches=places,
            shard=shard,
        )
        return new_state, TrainingReport(loss=report.loss, seconds=report.seconds)

    def distill(
        self, network: nn.Module, dense: nn.Module, keep: BoolArray, *, steps: int, seed: int
    ) -> None:
        """Distil on the calibration images, augmented; see ``TaskOnWorker.distill``."""
        few = self.images("calibration")
        distill_pruned(network, dense, self._tracing, keep, few, steps=steps, seed=seed)

    def evaluate(self, network: nn.Module, split: str, dense: nn.Module) -> Tested:
        """Return loss and accuracy of a network, and which images it classifies correctly.

        Args:
            network: On the worker's device.
            split: ``choose_val`` or ``test``.
            dense: Not used: labels say how good a network is.
        """
        network.eval()
        found = evaluate(network, self.images(split).batches(_EVALUATION_BATCH))
        assert found.right is not None  # ``evaluate`` always fills it in
        return Tested(figures=found.figures(), right=found.right.cpu().numpy())

    def _answers(self, dense: nn.Module, split: str) -> DenseAnswers | None:
        """Return the answers of a dense network, if the settings compare pruned networks with it.

        Args:
            dense: The dense network.
            split: The images.
        """
        if self._settings.scoring.score_by == "labels":
            return None
        known = self._dense_answers.get(split)
        if known is None or known.dense is not dense:
            known = self._dense_answers[split] = DenseAnswers(dense, self.images(split))
        return known

    def _drawn(self, count: int) -> IntArray:
        """Return positions in search-train, the same for every network.

        They are drawn at random because folders list their images by class.

        Args:
            count: How many; all if there are fewer.
        """
        num_images = len(self.images("search_train"))
        drawn: IntArray = np.random.default_rng(0).permutation(num_images)[:count]
        return drawn

    def _open(self, split: str) -> Images:
        dataset = self._dataset
        source = dataset.test if split == "test" else dataset.train
        if split == "test":
            rows = np.arange(len(source.labels))
        elif split == "calibration":
            rows = self._splits.search_train[
                self._drawn(self._settings.calibration.calibration_images)
            ]
        else:
            rows = getattr(self._splits, split)
        again = split in ("search_val", "choose_val", "calibration")  # what scores look at
        threads = self._threads
        return open_images(
            source, rows, dataset, self._device, decoding_threads=threads, keep=again
        )


def dense_scored(predicted: IntArray, labels: IntArray, num_classes: int) -> DenseScored:
    """Return how well predictions of a network agree with the labels.

    Args:
        predicted: Predicted class of every held-out image, ``(n,)``.
        labels: Its label, ``(n,)``.
        num_classes: Number of classes.
    """
    num_images = len(labels)
    chance = float(np.bincount(labels).max() / num_images)
    accuracy = float((predicted == labels).mean())
    centre, half = _interval(accuracy, num_images)
    return DenseScored(
        accuracy=accuracy,
        half_interval=half,
        num_images=num_images,
        num_classes=num_classes,
        chance=chance,
        is_chance=centre - half <= chance,
        reordered_accuracy=_reordered_accuracy(predicted, labels, num_classes),
    )


def _interval(share: float, count: int) -> tuple[float, float]:
    """Return centre and half width of Wilson's 95 % interval of a share."""
    scale = 1 + _Z**2 / count
    centre = (share + _Z**2 / (2 * count)) / scale
    half = _Z * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2)) / scale
    return centre, half


def _reordered_accuracy(predicted: IntArray, labels: IntArray, num_classes: int) -> float:
    """Return the accuracy if every class were the output that it is most often taken for."""
    counts = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(counts, (labels, predicted), 1)
    right, rows, columns = 0, set[int](), set[int]()
    # One to one: the most frequent pairs of a class and an output come first.
    for place in np.argsort(-counts, axis=None, kind="stable")[: np.count_nonzero(counts)]:
        row, column = divmod(int(place), num_classes)
        if row not in rows and column not in columns:
            rows.add(row)
            columns.add(column)
            right += int(counts[row, column])
    return right / len(labels)
