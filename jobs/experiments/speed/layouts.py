"""Scores of a search on real workers: how many per second, and with how many threads each."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import pandas as pd
import ray
from rich.table import Table

from fppmo_ray import Numerics, Resources, Scoring, SearchSettings, run_search
from fppmo_ray.service.journal.artifacts import read_history
from fppmo_ray.training import Recipe, build_network
from speed.subject import MACS_CUT, Plan, random_dataset

_ON_TWO_CORES = (
    Resources(workers=1, cpus=2),
    Resources(workers=2, cpus=1),
    Resources(workers=2, cpus=2),
)
_ON_ONE_GPU = tuple(Resources(workers=count, gpus=1 / count) for count in (1, 2, 4))


def layouts_table(name: str, proposals: int, plan: Plan) -> Table:
    """Compare ways to share a machine's two cores, or its GPU; the plan's first steps count.

    Args:
        name: A CIFAR network.
        proposals: Scores of each layout per turn; those until all workers are up do not count.
        plan: How they are scored.
    """
    layouts = _ON_TWO_CORES if plan.device == "cpu" else _ON_ONE_GPU
    cpus = max(layout.workers * layout.cpus for layout in layouts)
    rates: list[list[float]] = [[] for _ in layouts]
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False)
    try:
        for _ in range(plan.repeats):
            for layout, measured in zip(layouts, rates, strict=True):
                measured.append(scores_per_second(random_search(name, proposals, plan, layout)))
    finally:
        ray.shutdown()
    table = Table(
        *("workers", "threads of each", "scores per second"),
        title=f"{name}, {plan.steps[0]} steps, {plan.compute.dtype}, medians of {plan.repeats}",
    )
    for layout, measured in zip(layouts, rates, strict=True):
        rate = f"{statistics.median(measured):.3f}"
        table.add_row(str(layout.workers), str(layout.cpus), rate)
    return table


def random_search(name: str, proposals: int, plan: Plan, resources: Resources) -> pd.DataFrame:
    """Return the history of a search on random images.

    Args:
        name: Name of the network.
        proposals: Number of scores.
        plan: How masks are scored.
        resources: The workers.
    """
    settings = SearchSettings(
        macs_cut=MACS_CUT,
        proposals=proposals,
        fine_tune=Recipe(epochs=0, batch_size=plan.batch_size),
        scoring=Scoring(
            score_steps=plan.steps[0],
            score_recalibrate_images=plan.recalibrate_images,
            score_images=plan.score_images,
            rescore_seeds=1,
        ),
        numerics=Numerics(dtype=plan.compute.dtype),
    )
    with tempfile.TemporaryDirectory() as folder:
        run_dir, dataset = Path(folder), random_dataset(8000, 32)
        run_search(build_network(name, 10), dataset, settings, run_dir=run_dir, resources=resources)
        return read_history(run_dir)


def scores_per_second(history: pd.DataFrame) -> float:
    """Of all workers together, from when each of them has done a score."""
    all_are_up = history.groupby("worker")["at"].min().max()
    later = history.loc[history["at"] > all_are_up, "at"]
    return float(len(later) / (later.max() - all_are_up))


def share_outside_scores(history: pd.DataFrame) -> float:
    """Share of the time between a worker's first and last score that it did not score."""
    shares = []
    for _, scores in history.sort_values("at").groupby("worker"):
        if len(scores) > 1:
            span = scores["at"].iloc[-1] - scores["at"].iloc[0]
            shares.append(1 - scores["seconds"].iloc[1:].sum() / span)
    return statistics.fmean(shares)
