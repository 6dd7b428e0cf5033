"""Fine-tuning on a study's workers, one epoch per call, so that a stop loses at most an epoch."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import Measured
from torch import nn

from fppmo_ray.distribution import BoolArray
from fppmo_ray.durable_files import write_whole
from fppmo_ray.pruning.calibration.features import last_feature_match
from fppmo_ray.service.image_task import ImageClassification
from fppmo_ray.service.pool.worker_group import WorkerInfo, worker_info
from fppmo_ray.service.problem import Problem
from fppmo_ray.service.worker import claim_device
from fppmo_ray.service.worker_protocol import Arrays, load_arrays
from fppmo_ray.training import (
    ComputeConfig,
    Recipe,
    TrainingState,
    evaluate,
    lay_out,
    train_epoch,
)
from fppmo_ray.training.checkpoints import (
    read_checkpoint,
    restore,
    training_identity,
    write_checkpoint,
)
from fppmo_ray.training.feature_match import FeatureMatch

_BATCH = 250
HELD_OUT = ("search_val", "choose_val")

Epochs = list[dict[str, float]]
"""How training went: training loss, seconds, and loss and accuracy on choose-val."""
Figures = dict[str, float]
"""Loss and accuracy."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TuningTask:
    """A network to fine-tune: the dense one (``keep`` None), or what a mask leaves of it."""

    keep: BoolArray | None
    recipe: Recipe
    seed: int
    compute: ComputeConfig
    folder: Path
    """Folder of its checkpoint and its curve, which all workers must see."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Tuned:
    """A network after the last epoch of its task."""

    task: TuningTask
    weights: Arrays | None
    """Dense weights that training began from; None: the problem's."""
    network: nn.Module
    """The fine-tuned network."""
    epochs: Epochs

    @property
    def seconds(self) -> float:
        """Seconds of the training steps."""
        return sum(epoch["seconds"] for epoch in self.epochs)


def classification_of(problem: Problem) -> ImageClassification:
    """Return the problem's task, which is image classification in every study."""
    assert isinstance(problem.task, ImageClassification)
    return problem.task


class Tuner:
    """Fine-tunes networks of a problem, and evaluates them, on the device of this process.

    Args:
        problem: Its dense network is pruned, or teaches.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self.device = claim_device(problem)
        self.classification = classification_of(problem).open(
            problem.tracing, problem.settings, self.device, threads=problem.threads
        )
        """The problem's task on the device."""
        self.split = self.classification.images
        """Returns the images of a split, which the first call puts on the device."""

    def open(self) -> None:
        """Put the images of all splits except the test on the device."""
        for split in ("search_train", *HELD_OUT):
            self.split(split)

    def train(self, task: TuningTask, weights: Arrays | None = None) -> Tuned | None:
        """Train for one more epoch from the checkpoint on.

        The curve is written before the checkpoint, so it never lacks an epoch of it.

        Args:
            task: What to train.
            weights: Dense weights to begin from; by default the problem's.

        Returns:
            None while more epochs are to come.
        """
        torch.set_num_threads(task.compute.threads)
        task.folder.mkdir(parents=True, exist_ok=True)
        checkpoint, curve = task.folder / "checkpoint.pt", task.folder / "epochs.json"
        run = training_identity(task.recipe, task.compute, task.seed)
        network = self.untrained(task, weights)
        state = read_checkpoint(checkpoint, run)
        epochs: Epochs = []
        if state is not None:
            restore(state, network)
            epochs = json.loads(curve.read_bytes())[: state.epochs_done]
        if len(epochs) < task.recipe.epochs:
            state, seen = self._train_epoch(network, task, len(epochs), state)
            epochs.append(seen)
            write_whole(curve, json.dumps(epochs).encode())
            write_checkpoint(checkpoint, state, run)
        if len(epochs) < task.recipe.epochs:
            return None
        return Tuned(
            task=task,
            weights=weights,
            network=network,
            epochs=epochs,
        )

    def untrained(self, task: TuningTask, weights: Arrays | None = None) -> nn.Module:
        """Return the network before its first epoch: dense, or pruned and recalibrated.

        Args:
            task: The task that would train it.
            weights: Dense weights to begin from; by default the problem's.
        """
        network = self._dense()
        if weights is not None:
            load_arrays(network, weights)
        if task.keep is not None:
            network = self.classification.pruned(network, task.keep, for_epochs=True)
        lay_out(network, task.compute)
        return network

    def look(self, network: nn.Module, split: str) -> Figures:
        """Return loss and accuracy in float32, as the service evaluates its results.

        Args:
            network: A network of the problem.
            split: Name of the split to evaluate on.
        """
        return evaluate(network, self.split(split).batches(_BATCH)).figures()

    def look_at_held_out(self, network: nn.Module) -> dict[str, Figures]:
        """Return figures of search-val, of choose-val, and of both as one set, ``held_out``."""
        parts = {split: self.look(network, split) for split in HELD_OUT}
        sizes = [len(self.split(split)) for split in HELD_OUT]
        return {"held_out": _pooled(list(parts.values()), sizes), **parts}

    def _train_epoch(
        self, network: nn.Module, task: TuningTask, epoch: int, state: TrainingState | None
    ) -> tuple[TrainingState, dict[str, float]]:
        teacher = self._dense() if task.recipe.distillation_weight > 0 else None
        matches: list[FeatureMatch] = []
        if teacher is not None:
            tracing, one = self._problem.tracing, self.classification.inputs()
            matches = last_feature_match(network, teacher, tracing, task.keep, *one)
        state, report = train_epoch(
            network,
            self.split("search_train"),
            task.recipe,
            epoch=epoch,
            seed=task.seed,
            state=state,
            compute=task.compute,
            teacher=teacher,
            matches=matches,
        )
        val = self.look(network, "choose_val")
        seen = {"train_loss": report.loss, "seconds": report.seconds}
        return state, seen | {"val_loss": val["loss"], "val_accuracy": val["accuracy"]}

    def _dense(self) -> nn.Module:
        return copy.deepcopy(self._problem.network).to(self.device).eval()


Look = Callable[[Tuner, Tuned], Mapping[str, Any]]
"""What a job wants to know of a network at the end: figures that JSON holds."""


class TuningWorker:
    """A Ray actor that fine-tunes networks on its CPUs or its GPU.

    Args:
        problem: The network and its data.
        slot: Number of the worker in the pool.
    """

    def __init__(self, problem: Problem, slot: int) -> None:
        self._slot = slot
        self._tuner = Tuner(problem)

    def ready(self) -> WorkerInfo:
        """Put the images on the device, then tell where the worker runs."""
        self._tuner.open()
        return worker_info(self._slot)

    def measure(
        self, task: TuningTask, look: Look, weights: Arrays | None = None
    ) -> Measured | None:
        """Fine-tune for one more epoch; after the last, read the figures.

        Args:
            task: What to fine-tune.
            look: Reads the figures; a function of a module.
            weights: Dense weights to begin from; by default the problem's.

        Returns:
            None while more epochs are to come.
        """
        tuned = self._tuner.train(task, weights)
        return None if tuned is None else seen(self._tuner, tuned, look)


def seen(tuner: Tuner, tuned: Tuned, look: Look) -> Measured:
    """Return the figures of a fine-tuned network with the time of training and evaluation.

    Args:
        tuner: The tuner that holds the images.
        tuned: The network after its last epoch.
        look: Reads the figures.
    """
    begin = time.perf_counter()
    figures = look(tuner, tuned)
    return Measured(figures=figures, seconds=tuned.seconds + time.perf_counter() - begin)


def _pooled(parts: Sequence[Figures], sizes: Sequence[int]) -> Figures:
    return {
        name: float(np.average([part[name] for part in parts], weights=sizes)) for name in parts[0]
    }
