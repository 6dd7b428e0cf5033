"""How fast the pieces are: the probability model, extraction, and scores on real workers.

    python jobs/experiments/benchmark.py
    python jobs/experiments/benchmark.py --scaling
    python jobs/experiments/benchmark.py --scoring --networks resnet20 resnet56 --dtype bfloat16
    python jobs/experiments/benchmark.py --layouts
    python jobs/experiments/benchmark.py --decoding

Times are medians; what compares machines are the ratios.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from speed.decoding import decoders_table, decoding_table
from speed.layouts import layouts_table, random_search, scores_per_second, share_outside_scores
from speed.scaling import scaling_table
from speed.scoring import scoring_tables
from speed.subject import Plan

from fppmo_ray import Resources, extract, trace
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
from fppmo_ray.training import build_network, keep_freed_memory

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
    layouts: bool = False,
    decoding: bool = False,
    plan: Plan = Plan(),  # noqa: B008  (a frozen value)
) -> None:
    """Measure and print.

    Args:
        proposals: Scores of a search on random images, for the workers' figures.
        workers: Scoring workers of one CPU each.
        networks: Whose scores are timed: CIFAR networks, with ``scoring`` also resnet50.
        scaling: Measure only how the loop scales from 1 to 32 simulated workers.
        scoring: Measure only what single scores cost.
        layouts: Measure only how workers and threads share two cores, or workers a GPU.
        decoding: Measure only how fast files like ImageNet's become batches.
        plan: How networks are scored. What runs on workers takes the first number of steps.
    """
    console = Console(width=120)
    if scaling:
        console.print(scaling_table())
    elif scoring:
        torch.set_num_threads(plan.compute.threads)
        if plan.device == "cpu":
            keep_freed_memory()  # as workers do
        console.print(*scoring_tables(networks, plan), sep="\n")
    elif decoding:
        torch.set_num_threads(1)
        console.print(decoding_table(plan.repeats), decoders_table(plan.repeats), sep="\n")
    elif layouts:
        for network in networks:
            console.print(layouts_table(network, proposals, plan))
    else:
        console.print(_pieces_table(networks, proposals, Resources(workers=workers), plan))


def _pieces_table(
    networks: tuple[str, ...], proposals: int, resources: Resources, plan: Plan
) -> Table:
    table = Table("what", "measured", "goal", title=f"{torch.get_num_threads()} threads")
    figures = [*_model_figures(), *_extract_figures()]
    for network in networks:
        figures += _score_figures(network, random_search(network, proposals, plan, resources))
    for figure in figures:
        table.add_row(figure.what, figure.value, figure.goal)
    return table


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


def _score_figures(network: str, history: pd.DataFrame) -> list[Figure]:
    outside = share_outside_scores(history)
    return [
        Figure(f"{network}: scores per second, all workers", f"{scores_per_second(history):.2f}"),
        Figure("a worker's time outside scoring", f"{100 * outside:.1f} %", "< 5 %"),
    ]


if __name__ == "__main__":
    run_job(main)
