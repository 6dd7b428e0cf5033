"""A searcher of three small layers, and trials that are scored by their masks alone."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
from ray.tune.search import Searcher

from fppmo_ray.distribution import (
    ChannelGroup,
    LayerCost,
    OptimizerSettings,
    PruningSpace,
    Width,
)
from fppmo_ray.service.journal.facts import unpack_mask
from fppmo_ray.service.tune import FPPMOSearch

GROUPS = tuple(ChannelGroup(name=f"conv{i}", num_filters=8) for i in range(3))
WIDTHS = [Width(constant=3), *(Width(terms=((i, 1),)) for i in range(3))]
SPACE = PruningSpace(
    GROUPS,
    tuple(
        LayerCost(layer=f"conv{i}", macs_per_pair=9, in_width=WIDTHS[i], out_width=WIDTHS[i + 1])
        for i in range(3)
    ),
).with_limits()
IMPORTANCE = 1.0 + np.arange(24.0) * 7 % 11
POPULATION = 4
NAN = {"val_loss": math.nan, "val_accuracy": 0.5}


def settings(**changes: Any) -> OptimizerSettings:
    values = {"macs_cut": 0.5, "num_proposals": 14, "population_size": POPULATION, "seed": 3}
    return OptimizerSettings(**values | changes)


def searcher(**changes: Any) -> FPPMOSearch:
    return FPPMOSearch(SPACE, IMPORTANCE, settings(**changes))


def score(config: dict[str, Any]) -> dict[str, Any]:
    """A result that depends on the mask alone, as Tune hands it over: flat, with more in it."""
    kept = float(np.linspace(1, 2, 24) @ unpack_mask(config["mask"], 24) / 36)
    return {
        "val_loss": 1 - kept,
        "val_accuracy": kept,
        "training_iteration": 1,
        "time_total_s": 1.0,
        "config/id": config["id"],
    }


def ask_all(search: Searcher, prefix: str = "t") -> dict[str, dict[str, Any]]:
    """Configs by trial id, until the searcher has no more for now."""
    configs: dict[str, dict[str, Any]] = {}
    while isinstance(config := search.suggest(f"{prefix}{len(configs)}"), dict):
        configs[f"{prefix}{len(configs)}"] = config
    return configs


def run_to_end(search: Searcher, known: dict[str, dict[str, Any]] | None = None) -> dict[int, str]:
    """The masks of all trials by id, ended in an order of no system."""
    shuffle = random.Random(0)
    live = dict(known or {})
    masks = {config["id"]: config["mask"] for config in live.values()}
    for number in range(1000):
        config = search.suggest(f"run-{number}")
        if isinstance(config, dict):
            live[f"run-{number}"] = config
            masks[config["id"]] = config["mask"]
        elif live:
            trial_id = shuffle.choice(sorted(live))
            search.on_trial_complete(trial_id, score(live.pop(trial_id)))
        else:
            break
    assert search.suggest("one-more") == Searcher.FINISHED
    return masks


def searcher_with_failed_generation(number: int) -> FPPMOSearch:
    """All generations before are scored, and none of this one's proposals is."""
    search = searcher(lag=0)
    for generation in range(number + 1):
        for trial_id, config in ask_all(search, f"generation {generation}, ").items():
            failed = config["generation"] == number
            search.on_trial_complete(trial_id, NAN if failed else score(config))
    return search
