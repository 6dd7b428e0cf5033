"""Trials of Tune that score without torch, and a driver of them that can be killed."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import tune

from fppmo_ray.distribution import (
    ChannelGroup,
    LayerCost,
    OptimizerSettings,
    PruningSpace,
    Width,
)
from fppmo_ray.service.tune import FPPMOSearch

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

NUM_FILTERS = 24
PROPOSALS = 12


def make_searcher() -> FPPMOSearch:
    """Three generations of four masks of 24 filters."""
    groups = (ChannelGroup(name="conv", num_filters=NUM_FILTERS),)
    width = Width(terms=((0, 1),))
    cost = LayerCost(layer="conv", macs_per_pair=9, in_width=Width(constant=3), out_width=width)
    return FPPMOSearch(
        PruningSpace(groups, (cost,)).with_limits(),
        1.0 + np.arange(NUM_FILTERS) * 7 % 11,
        OptimizerSettings(macs_cut=0.5, num_proposals=PROPOSALS, population_size=4, lag=0),
    )


def loss_of(config: dict[str, Any]) -> float:
    """Between 0 and 1, different for all masks."""
    return sum(config["mask"].encode()) % 997 / 997


class Scripted(tune.Trainable):
    """Four rungs; ``troubles`` says which ids are bad, raise, hang, report NaN or die once.

    Args of ``setup``: troubles by id, and a folder in which deaths leave a mark.
    """

    def setup(self, config: dict[str, Any], troubles: dict[int, str], marks: Path) -> None:
        self._troubles, self._marks, self._config, self._rung = troubles, marks, config, 0

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._config, self._rung = new_config, 0
        return True

    def step(self) -> dict[str, Any]:
        trouble = self._troubles.get(self._config["id"])
        mark = self._marks / f"died-{self._config['id']}"
        if trouble == "dies once" and not mark.exists():
            mark.touch()
            os._exit(1)
        while trouble == "hangs":
            time.sleep(60)
        if trouble == "raises":
            raise RuntimeError("this mask cannot be scored")
        self._rung += 1
        loss = loss_of(self._config) + (2 if trouble == "bad" else 0)
        return {
            "val_loss": float("nan") if trouble == "NaN" else loss,
            "val_accuracy": 0.5,
            "steps": self._rung,
            "done": self._rung == 4,
        }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        (Path(checkpoint_dir) / "rung").write_text(str(self._rung))

    def load_checkpoint(self, checkpoint: Any) -> None:
        self._rung = int((Path(checkpoint) / "rung").read_text())


def scripted(troubles: dict[int, str], marks: Path) -> type[tune.Trainable]:
    """The trainable, with half a CPU so that Ray's other actors have room."""
    trainable = tune.with_parameters(Scripted, troubles=troubles, marks=marks)
    with_half: type[tune.Trainable] = tune.with_resources(trainable, {"cpu": 0.5})
    return with_half


def make_tuner(folder: Path, troubles: dict[int, str], **config: Any) -> tune.Tuner:
    """A tuner that asks until the searcher has finished; ``config`` goes to ``TuneConfig``."""
    searcher = config.pop("search_alg", None) or make_searcher()
    concurrent = config.pop("max_concurrent_trials", 1)
    failures, callbacks = config.pop("max_failures", 0), config.pop("callbacks", None)
    return tune.Tuner(
        scripted(troubles, folder),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=-1,
            reuse_actors=True,
            max_concurrent_trials=concurrent,  # a second worker takes seconds to start
            **config,
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=str(folder),
            verbose=0,
            callbacks=callbacks,
            failure_config=tune.FailureConfig(max_failures=failures),
        ),
    )


def drive(folder: Path) -> None:
    """A driver of its own Ray, whose proposal 5 hangs: for whoever means to kill it."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    make_tuner(folder, {5: "hangs"}, max_concurrent_trials=2).fit()


if __name__ == "__main__":
    drive(Path(sys.argv[1]))
