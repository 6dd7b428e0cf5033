"""The latency table of a search, measured by a worker that is written out."""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from simulated_training import PoolHere

from fppmo_ray import SearchSettings, load_dataset
from fppmo_ray.distribution.costs import Width
from fppmo_ray.distribution.latency_table import LatencyTable, LayerLatency
from fppmo_ray.pruning.latency import MeasuredLatency, TimedMask
from fppmo_ray.service.image_task import image_classification
from fppmo_ray.service.journal.facts import LatencyMeasured
from fppmo_ray.service.journal.run_directory import read_journal
from fppmo_ray.service.measured_latency import with_latency
from fppmo_ray.service.problem import Problem, build_problem
from fppmo_ray.testing.simulated_search import simulated_run
from fppmo_ray.training import PLAIN_COMPUTE, build_network

SETTINGS = SearchSettings(latency_cut=0.3, latency_batch=2)
PROBLEM = build_problem(
    build_network("digits_cnn", 10), image_classification(load_dataset("digits")), SETTINGS
)
SPACE = PROBLEM.space
WIDEST = SPACE.groups[0].num_filters
LAYER = LayerLatency(
    layer="first",
    out_width=Width(terms=((0, 1),)),
    in_width=Width(constant=1),
    out_points=(1, WIDEST),
    in_points=(1,),
    ns=((0,), (1_000_000,)),
)
assert SPACE.activations is not None
TABLE = LatencyTable(
    num_groups=len(SPACE.groups),
    layers=(LAYER,),
    written=SPACE.activations.written(),
    fs_per_byte=0,
    constant_ns=500_000,
    dense_ns=1_500_000,
)


class OneWorker:
    """Finds the same whatever it is asked for."""

    def __init__(self, *errors: float) -> None:
        checks = [TimedMask(measured_ns=1000, predicted_ns=round(1000 * (1 + e))) for e in errors]
        self.found = MeasuredLatency(table=TABLE, checks=tuple(checks), device="cpu")
        self.asked: list[Any] = []

    def measure_latency_table(self, *arguments: Any) -> MeasuredLatency:
        self.asked.append(arguments)
        return self.found


def limited(folder: Path, worker: OneWorker | None, settings: SearchSettings = SETTINGS) -> Problem:
    pool: Any = PoolHere(worker)
    problem = replace(PROBLEM, settings=settings)
    with simulated_run(folder, settings.optimizer_settings(), resume="auto") as run:
        return with_latency(problem, run, pool, PLAIN_COMPUTE)


def test_the_table_is_measured_once_kept_and_read_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    worker = OneWorker(0.01, -0.02, 0.3)
    with caplog.at_level(logging.INFO, "fppmo_ray"), warnings.catch_warnings():
        warnings.simplefilter("error")  # the median is below what is warned of
        first = limited(tmp_path, worker).space.latency
    assert worker.asked == [(PLAIN_COMPUTE, 2, 0)]
    assert first == TABLE
    assert limited(tmp_path, None).space.latency == TABLE
    [fact] = [fact for fact in read_journal(tmp_path) if isinstance(fact, LatencyMeasured)]
    assert (fact.batch, fact.dense_ms, fact.device) == (2, 1.5, "cpu")
    assert fact.median_error == pytest.approx(0.02)
    assert "the table is off by 2.0 % (median)" in caplog.text


def test_a_table_that_is_far_off_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"off by 20 % \(median of 3 masks\), so cuts of latency"):
        limited(tmp_path, OneWorker(0.0, 0.2, 0.3))


def test_a_cut_that_this_device_cannot_reach_is_refused_with_what_can_be(tmp_path: Path) -> None:
    least = TABLE.total(SPACE.min_widths)
    reachable = int((1 - least / 1_500_000) * 1e4) / 1e4
    with pytest.raises(ValueError, match=f"latency_cut must be at most {reachable}, got 0.9: the"):
        limited(tmp_path, OneWorker(0.0), replace(SETTINGS, latency_cut=0.9))


def test_without_a_limit_nothing_is_measured(tmp_path: Path) -> None:
    found = limited(tmp_path, None, SearchSettings(macs_cut=0.5))
    assert found.tracing is PROBLEM.tracing
    assert [fact for fact in read_journal(tmp_path) if isinstance(fact, LatencyMeasured)] == []
