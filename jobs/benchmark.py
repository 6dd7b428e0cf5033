"""How fast the pieces are: the probability model, extraction, and scores on real workers.

    python jobs/benchmark.py
    python jobs/benchmark.py --scaling
    python jobs/benchmark.py --scoring --dtype bfloat16

Times are medians; what compares machines are the ratios.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from scaling import scaling_table
from scoring import random_dataset, scoring_table

from fppmo_ray import Placement, SearchSettings, extract, search, trace
from fppmo_ray.distribution import (
    ChannelGroup,
    Feedback,
    LayerCost,
    MaskOptimizer,
    OptimizerSettings,
    PruningSpace,
    Width,
)
from fppmo_ray.job import run_job
from fppmo_ray.service.result import read_history
from fppmo_ray.training import Recipe, build_network
from fppmo_ray.training.modes import DType

_POPULATION = 16
_GROUPS, _FILTERS = 100, 300  # 30,000 filters: a ResNet-152 has 25,000 inside its blocks


@dataclass(frozen=True)
class Figure:
    """A line of the table."""

    what: str
    value: str
    goal: str = ""


def main(
    proposals: int = 32,
    workers: int = 2,
    networks: tuple[str, ...] = ("resnet20",),
    *,
    scaling: bool = False,
    scoring: bool = False,
    steps: tuple[int, ...] = (0, 50),
    dtype: DType = "float32",
    device: Literal["cpu", "cuda"] = "cpu",
    repeats: int = 5,
) -> None:
    """Measure and print.

    Args:
        proposals: Recalibrate-only scores of random images, for the workers' figures.
        workers: Scoring workers of one CPU each.
        networks: Whose scores are timed: CIFAR ResNets, with ``scoring`` also resnet50.
        scaling: Measure only how the loop scales from 1 to 32 workers that pretend to score.
        scoring: Measure only what single scores cost, on one thread.
        steps: Fine-tuning steps of these scores.
        dtype: Of their passes.
        device: Where they are computed.
        repeats: Of each of their measurements.
    """
    if scaling:
        Console(width=110).print(scaling_table())
        return
    if scoring:
        torch.set_num_threads(1)
        table = scoring_table(networks, steps, dtype=dtype, device=device, repeats=repeats)
        Console(width=120).print(table)
        return
    table = Table("what", "measured", "goal", title=f"{torch.get_num_threads()} threads")
    for figure in [
        *_model_figures(),
        *_extract_figures(),
        *(
            figure
            for network in networks
            for figure in _score_figures(network, _search(proposals, workers, network))
        ),
    ]:
        table.add_row(figure.what, figure.value, figure.goal)
    Console(width=110).print(table)


def _median_seconds(run: Callable[[], object], repeats: int = 20) -> float:
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


def _model_figures() -> list[Figure]:
    with torch.random.fork_rng(devices=[]):
        tracing = trace(build_network("resnet110", 10), torch.zeros(1, 3, 32, 32))
    keep = np.random.default_rng(0).random(tracing.space.num_filters) < 0.5
    macs = _median_seconds(lambda: tracing.space.macs(keep), 200)
    return [
        Figure(
            f"ask + tell, population {_POPULATION}, {_GROUPS * _FILTERS:,} filters",
            f"{1e3 * _ask_and_tell():.1f} ms",
            "< 60 ms",
        ),
        Figure("space.macs, ResNet-110", f"{1e6 * macs:.0f} us", "< 200 us"),
    ]


def _ask_and_tell() -> float:
    """Median seconds of a generation, after the first."""
    optimizer = MaskOptimizer(
        _chain(),
        np.random.default_rng(0).uniform(0.5, 2, _GROUPS * _FILTERS),
        OptimizerSettings(macs_cut=0.57, num_proposals=12 * _POPULATION, lag=0),
    )
    seconds = []
    while not optimizer.finished:
        begin = time.perf_counter()
        for proposal in optimizer.ask():
            optimizer.tell(
                Feedback(
                    proposal_id=proposal.proposal_id,
                    val_loss=float(proposal.keep[::7].sum()),
                    val_accuracy=0.5,
                )
            )
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


def _chain() -> PruningSpace:
    groups = tuple(ChannelGroup(name=f"conv{i}", num_filters=_FILTERS) for i in range(_GROUPS))
    costs = tuple(
        LayerCost(
            layer=f"conv{i}",
            macs_per_pair=9 * 64,
            out_width=Width(terms=((i, 1),)),
            in_width=Width(terms=((i - 1, 1),)) if i else Width(constant=3),
        )
        for i in range(_GROUPS)
    )
    return PruningSpace(groups, costs).with_limits(min_keep=0.1)


def _extract_figures() -> list[Figure]:
    network = build_network("resnet56", 10)
    tracing = trace(network, torch.zeros(1, 3, 32, 32))
    keep = np.random.default_rng(0).random(tracing.space.num_filters) < 0.5
    seconds = _median_seconds(lambda: extract(network, tracing, keep))
    return [Figure("extract, ResNet-56", f"{1e3 * seconds:.1f} ms", "< 25 ms")]


def _search(proposals: int, workers: int, name: str) -> pd.DataFrame:
    """Scores of a search on random images."""
    dataset = random_dataset(8000, 32)
    network = build_network(name, 10)
    settings = SearchSettings(
        macs_cut=0.57,
        proposals=proposals,
        score_steps=0,
        score_images=480,
        rescore_seeds=1,
        recipe=Recipe(epochs=0),
    )
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder)
        search(network, dataset, settings, run_dir=run_dir, placement=Placement(workers=workers))
        return read_history(run_dir)


def _score_figures(network: str, history: pd.DataFrame) -> list[Figure]:
    span = history["at"].max() - history["at"].min()
    return [
        Figure(f"{network}: scores per second, all workers", f"{(len(history) - 1) / span:.2f}"),
        Figure("a worker's time outside scoring", f"{100 * _outside(history):.1f} %", "< 5 %"),
    ]


def _outside(history: pd.DataFrame) -> float:
    """Share of the time between a worker's first and last score that it did not score."""
    shares = []
    for _, scores in history.sort_values("at").groupby("worker"):
        if len(scores) > 1:
            span = scores["at"].iloc[-1] - scores["at"].iloc[0]
            shares.append(1 - scores["seconds"].iloc[1:].sum() / span)
    return statistics.fmean(shares)


if __name__ == "__main__":
    run_job(main)
