"""The same fine-tuning for every network of a comparison, resumable between epochs."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from cells import Measured
from torch import nn

from fppmo_ray.distribution import BoolArray
from fppmo_ray.durable_files import write_whole
from fppmo_ray.service.place import Place, here
from fppmo_ray.service.problem import Problem, claim_device, open_split, pruned_network
from fppmo_ray.service.weights import Arrays, load_arrays
from fppmo_ray.training import (
    Engine,
    Images,
    Recipe,
    TrainingState,
    evaluate,
    lay_out,
    train_epoch,
)
from fppmo_ray.training.training_state import read_checkpoint, restore, run_of, write_checkpoint

_BATCH = 250


@dataclass(frozen=True, kw_only=True, eq=False)
class TuningTask:
    """A network to fine-tune: the dense one (``keep`` None) or what a mask leaves of it."""

    keep: BoolArray | None
    recipe: Recipe
    seed: int
    engine: Engine
    folder: Path
    """Of its checkpoint, which all workers must see."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """What is known already: goes into the cell."""


class TuningWorker:
    """Runs as a Ray actor on the CPUs or the GPU it was given."""

    def __init__(self, problem: Problem, slot: int) -> None:
        self._slot = slot
        self._problem = problem
        self._device = claim_device(problem)
        self._images: dict[str, Images] = {}

    def ready(self) -> Place:
        """Put the images on the device, then tell where the worker runs."""
        self._split("search_train")
        return here(self._slot)

    def measure(self, weights: Arrays, task: TuningTask) -> Measured:
        """Fine-tune from these dense weights; only then look at the test images."""
        torch.set_num_threads(task.engine.threads)
        begin = time.perf_counter()
        network = self._network(weights, task)
        epochs = self._train(network, task)
        figures = {
            **task.figures,
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "epochs": epochs,
            "tuning_seconds": sum(epoch["seconds"] for epoch in epochs),
            "before": self._evaluations(self._network(weights, task)),
            "after": self._evaluations(network),
        }
        return Measured(figures=figures, seconds=time.perf_counter() - begin)

    def _train(self, network: nn.Module, task: TuningTask) -> list[dict[str, float]]:
        """Train in place, on from the checkpoint; how every epoch went.

        The curve is written before the checkpoint, so it never lacks an epoch of it.
        """
        task.folder.mkdir(parents=True, exist_ok=True)
        checkpoint, curve = task.folder / "checkpoint.pt", task.folder / "epochs.json"
        run = run_of(task.recipe, task.engine, task.seed)
        state = read_checkpoint(checkpoint, run)
        epochs: list[dict[str, float]] = []
        if state is not None:
            restore(state, network)
            epochs = json.loads(curve.read_bytes())[: state.epochs_done]
        teacher = self._dense() if task.recipe.distillation_weight > 0 else None
        for epoch in range(len(epochs), task.recipe.epochs):
            state, seen = self._train_epoch(network, task, epoch, state, teacher)
            epochs.append(seen)
            write_whole(curve, json.dumps(epochs).encode())
            write_checkpoint(checkpoint, state, run)
        return epochs

    def _train_epoch(
        self,
        network: nn.Module,
        task: TuningTask,
        epoch: int,
        state: TrainingState | None,
        teacher: nn.Module | None,
    ) -> tuple[TrainingState, dict[str, float]]:
        state, report = train_epoch(
            network,
            self._split("search_train"),
            task.recipe,
            epoch=epoch,
            seed=task.seed,
            state=state,
            engine=task.engine,
            teacher=teacher,
        )
        val = self._metrics(network, "choose_val")
        seen = {"train_loss": report.loss, "seconds": report.seconds}
        return state, seen | {"val_loss": val["loss"], "val_accuracy": val["accuracy"]}

    def _network(self, weights: Arrays, task: TuningTask) -> nn.Module:
        """The network before its first epoch: dense as it is, or pruned and recalibrated."""
        network = self._dense()
        load_arrays(network, weights)
        if task.keep is not None:
            images = self._split("search_train")
            network = pruned_network(self._problem, network, task.keep, images)
        lay_out(network, task.engine)
        return network

    def _dense(self) -> nn.Module:
        return copy.deepcopy(self._problem.network).to(self._device).eval()

    def _evaluations(self, network: nn.Module) -> dict[str, dict[str, float]]:
        return {name: self._metrics(network, name) for name in ("choose_val", "test")}

    def _metrics(self, network: nn.Module, split: str) -> dict[str, float]:
        """In float32, as the service evaluates its results, whatever the engine."""
        return asdict(evaluate(network, self._split(split).batches(_BATCH)))

    def _split(self, name: str) -> Images:
        if name not in self._images:
            self._images[name] = open_split(self._problem, name, self._device)
        return self._images[name]
