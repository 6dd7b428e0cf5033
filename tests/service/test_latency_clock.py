"""Searches whose latency is measured by a user's function."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fppmo_ray import FunctionTask, Resources, Sampler, Scoring, SearchSettings, run_search
from fppmo_ray.pruning import trace
from fppmo_ray.report.result_rows import table_sentence
from fppmo_ray.service.journal.facts import ClockRead, LatencyMeasured, Started
from fppmo_ray.service.journal.run_directory import open_run, read_journal
from fppmo_ray.service.measured_latency import journaled_clock

SETTINGS = SearchSettings(
    latency_cut=0.3,
    proposals=4,
    sampler=Sampler(population=2, importance="l1"),
    scoring=Scoring(rescore_seeds=1),
)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.Conv2d(8, 1, 1))


def by_filters(given: nn.Module) -> float:
    return 1 + sum(one.out_channels for one in given.modules() if isinstance(one, nn.Conv2d))


def task() -> FunctionTask:
    return FunctionTask(
        example_inputs=torch.zeros(1, 1, 8, 8),
        score=lambda given, seed: -float(given(torch.ones(1, 1, 8, 8)).detach().square().mean()),
    )


def searched(run_dir: Path, **given: Any) -> Any:
    resources = Resources(workers=1)
    return run_search(network(), task(), SETTINGS, run_dir=run_dir, resources=resources, **given)


def test_a_search_meets_its_cut_by_the_users_clock(ray_here: None, tmp_path: Path) -> None:
    figures = searched(tmp_path, latency=by_filters).figures
    dense, *others = figures["variants"]
    assert dense["cuts"]["latency"]["measured_ms"] == 22.0  # 1 + 12 + 8 + 1
    for row in others:
        latency = row["cuts"]["latency"]
        assert latency["measured_ms"] == sum(row["widths"].values()) + 2
        assert latency["measured_cut"] >= 0.3
        assert latency["predicted_ms"] == pytest.approx(latency["measured_ms"], rel=1e-5)
    assert table_sentence(figures).startswith("latency by by_filters; its table is off by 0.0 %")
    facts = read_journal(tmp_path)
    [measured] = [fact for fact in facts if isinstance(fact, LatencyMeasured)]
    assert str(measured) == "dense 22 ms by by_filters; the table is off by 0.0 % (median)"
    with pytest.raises(ValueError, match="latency was 'by_filters', now None"):
        searched(tmp_path)


def test_a_search_that_is_resumed_does_not_read_the_clock_again(tmp_path: Path) -> None:
    dense, calls = network().eval(), []

    def clock(given: nn.Module) -> float:
        calls.append(by_filters(given))
        return calls[-1]

    tracing = trace(dense, torch.zeros(1, 1, 8, 8))
    problem: Any = SimpleNamespace(network=dense, tracing=tracing)
    keep = np.ones(20, dtype=bool)
    started = Started(
        search_id="a", identity={}, versions={}, groups=[], num_filters=20, dense_macs=1
    )
    for _ in range(2):
        with open_run(tmp_path, resume="auto", started=started) as run:
            read = journaled_clock(clock, problem, run)
            assert read is not None
            assert [read(keep), read(keep)] == [22.0, 22.0]
    assert calls == [22]
    assert sum(isinstance(fact, ClockRead) for fact in read_journal(tmp_path)) == 1


@pytest.mark.parametrize(
    ("changes", "latency", "sentence"),
    [
        ({"latency_cut": None, "macs_cut": 0.3}, by_filters, "give latency_cut too"),
        ({"latency_batch": 8}, by_filters, "leave latency_batch at 1, got 8"),
        ({}, 3.5, r"must be a function \(network\) -> milliseconds, got 3.5"),
    ],
)
def test_a_clock_that_does_not_go_with_the_settings_is_refused(
    tmp_path: Path, changes: dict[str, Any], latency: Any, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        run_search(
            *(network(), task(), SETTINGS.changed(**changes)),
            run_dir=tmp_path,
            latency=latency,
            resources=Resources(workers=1),
        )
