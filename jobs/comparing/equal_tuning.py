"""The same fine-tuning for every network of a comparison."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

from cells import Measured
from fine_tuning import Figures, Tuner, TuningTask
from torch import nn

from fppmo_ray.service.place import Place, here
from fppmo_ray.service.problem import Problem, claim_device, open_split
from fppmo_ray.service.weights import Arrays


class TuningWorker:
    """Runs as a Ray actor on the CPUs or the GPU it was given."""

    def __init__(self, problem: Problem, slot: int) -> None:
        self._slot = slot
        device = claim_device(problem)
        self._split = cache(partial(open_split, problem, device=device))
        self._tuner = Tuner(problem, device, self._split)

    def ready(self) -> Place:
        """Put the images on the device, then tell where the worker runs."""
        self._split("search_train")
        return here(self._slot)

    def measure(
        self, weights: Arrays, task: TuningTask, known: Mapping[str, Any]
    ) -> Measured | None:
        """Fine-tune for one more epoch; only after the last one look at the test images.

        Args:
            weights: Dense ones to begin from.
            task: What to fine-tune.
            known: Figures that are known already.

        Returns:
            None while there are more epochs to come.
        """
        tuned = self._tuner.train(task, weights)
        if tuned is None:
            return None
        begin = time.perf_counter()
        figures = {
            **known,
            "parameters": sum(parameter.numel() for parameter in tuned.network.parameters()),
            "epochs": tuned.epochs,
            "tuning_seconds": tuned.seconds,
            "before": self._look(self._tuner.untrained(task, weights)),
            "after": self._look(tuned.network),
        }
        return Measured(figures=figures, seconds=tuned.seconds + time.perf_counter() - begin)

    def _look(self, network: nn.Module) -> dict[str, Figures]:
        return {split: self._tuner.look(network, split) for split in ("choose_val", "test")}
