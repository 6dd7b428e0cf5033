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
from fppmo_ray.pruning import Candidate, Fidelity, score
from fppmo_ray.pruning.compute_trial import ComputeTrial, try_compute
from fppmo_ray.service.pool.place import Place, here
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
    """Return the work of a score of a given depth.

    Args:
        problem: Its fidelities say how many images proposals and finalists are scored on.
        depth: Fine-tuning steps, and whose number of images.
    """
    images = problem.fidelity if depth.images == "few" else problem.rescore_fidelity
    return replace(images, steps=depth.steps)


class FidelityWorker:
    """A Ray actor that scores masks and fine-tunes them, on its CPUs or its GPU.

    Args:
        problem: The network and its data.
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

    def ready(self) -> Place:
        """Put the images on the device; return where the worker runs."""
        self._tuner.open()
        return here(self._slot)

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
        return try_compute(self._candidate(keep, compute))

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
        candidate = self._candidate(keep, compute)
        fidelity = fidelity_of(self._problem, depth)
        scored = score(replace(candidate, fidelity=fidelity, seed=tuple(seed)))
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

    def _candidate(self, keep: BoolArray, compute: ComputeConfig) -> Candidate:
        problem = self._problem
        return Candidate(
            dense=self._dense,
            tracing=problem.tracing,
            keep=keep,
            search_train=self._tuner.split("search_train"),
            held_out=self._tuner.split("search_val"),
            fidelity=problem.fidelity,
            recipe=problem.recipe,
            compute=compute,
        )


def _look(tuner: Tuner, tuned: Tuned) -> Mapping[str, Any]:
    return {
        **tuner.look_at_held_out(tuned.network),
        "test": tuner.look(tuned.network, "test"),
        "train_loss": [epoch["train_loss"] for epoch in tuned.epochs],
        "epoch_seconds": [round(epoch["seconds"], 3) for epoch in tuned.epochs],
    }
