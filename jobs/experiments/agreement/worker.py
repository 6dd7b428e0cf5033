"""The worker of the fidelity job: it scores a mask at any depth, or fine-tunes it for long."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from cells import Measured
from fine_tuning import Tuned, Tuner, TuningTask, seen

from fppmo_ray.distribution import BoolArray
from fppmo_ray.pruning import Fidelity, score
from fppmo_ray.pruning.compute_trial import ComputeTrial
from fppmo_ray.service.pool.worker_group import WorkerInfo, worker_info
from fppmo_ray.service.problem import Problem
from fppmo_ray.training import ComputeConfig, DType, native_dtype

NumImages = Literal["many", "few"]
"""The number of images of a score: that of a search's finalists, or that of its proposals."""


@dataclass(frozen=True, kw_only=True)
class Depth:
    """How much work a score is, apart from settings that all scores share."""

    steps: int
    """Fine-tuning steps; 0 only recalibrates."""
    images: NumImages = "many"

    def __str__(self) -> str:
        kind = f"{self.steps} steps" if self.steps else "recalibrated"
        return f"{kind}, few images" if self.images == "few" else kind


def fidelity_of(problem: Problem, depth: Depth) -> Fidelity:
    """How much work a score of a depth is."""
    settings = problem.settings
    images = settings.fidelity() if depth.images == "few" else settings.rescore_fidelity()
    return replace(images, steps=depth.steps)


class FidelityWorker:
    """A Ray actor that scores masks and fine-tunes them, on its CPUs or its GPU.

    Args:
        problem: The network and its data; its settings say how many images a score takes.
        slot: Number of the worker in the pool.
    """

    def __init__(self, problem: Problem, slot: int) -> None:
        self._slot = slot
        self._problem = problem
        self._tuner = Tuner(problem)
        self._dense = copy.deepcopy(problem.network).to(self._tuner.device).eval()

    def __repr__(self) -> str:
        """What the Ray dashboard shows."""
        return f"FidelityWorker({self._slot}, {self._tuner.device.type})"

    def ready(self) -> WorkerInfo:
        """Put the images on the device, then tell where the worker runs."""
        self._tuner.open()
        return worker_info(self._slot)

    def native_dtype(self) -> DType:
        """Return the fastest dtype that this worker's processor has units for."""
        return native_dtype(self._tuner.device)

    def try_compute(self, compute: ComputeConfig, keep: BoolArray) -> ComputeTrial:
        """Measure how long a score of a mask takes with a compute configuration.

        Args:
            compute: How the passes are computed.
            keep: ``(num_filters,)``, True = kept.
        """
        torch.set_num_threads(compute.threads)
        return self._tuner.classification.try_compute(self._dense, keep, compute)

    def score(
        self, compute: ComputeConfig, keep: BoolArray, depth: Depth, seed: Sequence[int]
    ) -> Measured:
        """Return loss and accuracy on search-val, as a search would score the mask.

        Args:
            compute: How the passes are computed.
            keep: ``(num_filters,)``, True = kept.
            depth: How much work the score is.
            seed: Seed of the score's images and fine-tuning.
        """
        torch.set_num_threads(compute.threads)
        candidate = self._tuner.classification.candidate(
            self._dense, keep, seed=seed, split="search_val", compute=compute
        )
        scored = score(replace(candidate, fidelity=fidelity_of(self._problem, depth)))
        figures = {"val_loss": scored.val_loss, "val_accuracy": scored.val_accuracy}
        return Measured(figures=figures, seconds=scored.seconds)

    def truth(self, task: TuningTask) -> Measured | None:
        """Fine-tune for one more epoch; after the last, evaluate on held-out and test images.

        Args:
            task: What to fine-tune.

        Returns:
            None while more epochs are to come.
        """
        tuned = self._tuner.train(task)
        return None if tuned is None else seen(self._tuner, tuned, _look)


def _look(tuner: Tuner, tuned: Tuned) -> Mapping[str, Any]:
    return {
        **tuner.look_at_held_out(tuned.network),
        "test": tuner.look(tuned.network, "test"),
        "train_loss": [epoch["train_loss"] for epoch in tuned.epochs],
        "epoch_seconds": [round(epoch["seconds"], 3) for epoch in tuned.epochs],
    }
