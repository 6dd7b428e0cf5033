"""The worker of the recipes job: fine-tunes a pruned network by some recipe."""

from __future__ import annotations

import time
from functools import cache, partial
from typing import Any

from cells import Measured
from fine_tuning import HELD_OUT, Tuner, TuningTask
from torch import nn

from fppmo_ray.service.place import Place, here
from fppmo_ray.service.problem import Problem, claim_device, open_split


class RecipeWorker:
    """Runs as a Ray actor on the CPUs or the GPU it was given."""

    def __init__(self, problem: Problem, slot: int) -> None:
        self._slot = slot
        device = claim_device(problem)
        self._split = cache(partial(open_split, problem, device=device))
        self._tuner = Tuner(problem, device, self._split)

    def ready(self) -> Place:
        """Put the images on the device, then tell where the worker runs."""
        for split in ("search_train", *HELD_OUT):
            self._split(split)
        return here(self._slot)

    def measure(self, task: TuningTask) -> Measured | None:
        """Fine-tune for one more epoch; after the last look at the averaged and the last weights.

        Returns:
            None while there are more epochs to come.
        """
        tuned = self._tuner.train(task)
        if tuned is None:
            return None
        begin = time.perf_counter()
        figures = {
            "averaged": self._look(tuned.network),
            "last": self._look(tuned.unaveraged()),
            "epochs": tuned.epochs,
        }
        return Measured(figures=figures, seconds=tuned.seconds + time.perf_counter() - begin)

    def _look(self, network: nn.Module) -> dict[str, Any]:
        held_out = self._tuner.look_at_held_out(network)
        return {**held_out, "test": self._tuner.look(network, "test")}
