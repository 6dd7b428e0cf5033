"""Searches against each other: what a variant is, how one is gone on with, and the table."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cells
import numpy as np
import pytest
import ray
import search_worker
import searches
from rich.console import Console
from search_worker import SearchTask, SearchWorker
from searches import VARIANTS, searches_table, way_of
from small_problem import small_problem
from trained import Trained

from fppmo_ray import Numerics, Resources, Sampler, Scoring, SearchSettings
from fppmo_ray.distribution import MaskOptimizer
from fppmo_ray.distribution.rules import Elite, LayerES
from fppmo_ray.pruning import importance
from fppmo_ray.service.problem import Problem
from fppmo_ray.service.worker import PruningWorker
from fppmo_ray.service.worker_protocol import WeightsSnapshot, digest, to_arrays
from fppmo_ray.training import PLAIN_COMPUTE

for module in (cells, search_worker):  # Ray's workers do not find them
    ray.cloudpickle.register_pickle_by_value(module)

SETTINGS = SearchSettings(
    macs_cut=0.57,
    proposals=8,
    sampler=Sampler(population=4),
    numerics=Numerics(dtype="float32"),
    scoring=Scoring(
        score_by="labels",
        score_images=16,
        score_recalibrate_images=32,
        recalibrate_images=32,
        rescore_seeds=1,
    ),
).on("cpu", has_images=False)


def test_a_variant_is_the_default_but_for_what_it_names() -> None:
    way = way_of("population=8,filter-step=1,sigma=0.6:0.1", SETTINGS)
    assert way.settings == SETTINGS.changed(population=8)
    assert way.rule == LayerES(filter_step=1.0, sigma=(0.6, 0.1))
    assert way_of("rule=elite,step=0.3", SETTINGS).rule == Elite(step=0.3)
    assert way_of("default", SETTINGS).settings == SETTINGS
    for variant in VARIANTS:
        way_of(variant, replace(SETTINGS, proposals=64))


@pytest.mark.parametrize(
    ("variant", "complaint"),
    [
        ("lag", "expected default or SETTING=VALUE, got 'lag'"),
        ("lag=few", "expected a number for lag, got 'few'"),
        ("speed=1", r"expected settings of a search or steps of rule layer_es \(.*\), got speed"),
        ("rule=elite,sigma=1:2", r"steps of rule elite \(step\), got sigma"),
        ("population=1", "population must be at least 2"),
    ],
)
def test_a_variant_that_is_none_is_refused(variant: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        way_of(variant, SETTINGS)


@pytest.fixture(scope="module")
def problem(few_images: Path, weights: Path) -> Problem:
    return small_problem(few_images, weights, SETTINGS)


def test_a_search_in_parts_is_that_of_the_service(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_worker, "_SCORES_A_CALL", 3)
    rule = LayerES(filter_step=2.0)
    settings = replace(SETTINGS, seed=5, proposals=12)
    task = SearchTask(settings=settings, rule=rule, compute=PLAIN_COMPUTE, folder=tmp_path)
    assert [SearchWorker(problem, 0).measure(task) for _ in range(3)] == [None] * 3
    measured = SearchWorker(problem, 0).measure(task)
    assert measured is not None

    tracing = problem.tracing
    start = importance(problem.network, tracing, settings.sampler.importance)
    optimizer = MaskOptimizer(
        tracing.space, start, replace(settings.optimizer_settings(), rule=rule)
    )
    service, arrays = PruningWorker(problem, 0), to_arrays(problem.network)
    weights = WeightsSnapshot(sha256=digest(arrays), arrays=arrays, compute=PLAIN_COMPUTE)
    losses = []
    while proposals := optimizer.ask():
        for item in proposals:
            feedback = service.score(weights, item)
            losses.append(feedback.val_loss)
            optimizer.tell(feedback)
    means = np.array(losses).reshape(3, 4).mean(axis=1)
    assert measured.figures["generations"] == pytest.approx(means, abs=1e-4)
    widths = {item.name: tracing.space.widths(item.keep) for item in optimizer.finalists(0)}
    found = measured.figures["found"]
    assert found.keys() == widths.keys()
    assert all(found[name]["widths"] == widths[name].tolist() for name in widths)
    assert measured.figures["scores"] == 12


def record(variant: str, seed: int, mode: float) -> cells.Record:
    found: dict[str, Any] = {
        "mode": {"loss": mode, "accuracy": 1 - mode / 4},
        "importance-only": {"loss": 2.0, "accuracy": 0.4},
    }
    return cells.Record(
        key={"variant": variant, "seed": seed},
        figures={"found": found, "scores": 64},
        **{"seconds": 20.0, "versions": {}, "date": "", "cpu": ""},
    )


def test_searches_are_paired_over_seeds_and_the_best_comes_first() -> None:
    records = [
        record("default", 0, 1.0),
        record("default", 1, 1.2),
        record("lag=0", 0, 0.8),
        record("lag=0", 1, 0.8),
        record("population=8", 1, 1.3),
    ]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(searches_table(records))
    rows = [line for line in console.export_text().splitlines() if "│" in line]
    cut = [[cell.strip() for cell in row.strip("│ ").split("│")] for row in rows]
    assert [row[:6] for row in cut] == [
        ["lag=0", "2", "64", "0.800", "-0.30 [-1.57, +0.97]", "80.00"],  # -0.2 and -0.4
        ["default", "2", "64", "1.100", "", "72.50"],
        ["population=8", "1", "64", "1.300", "+0.10 (n = 1)", "67.50"],
    ]
    assert [row[6:] for row in cut] == [["0.800", "2.000", "20"]] + [
        [mode, "2.000", "20"] for mode in ("1.100", "1.300")
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:channel groups left whole")
@pytest.mark.usefixtures("local_ray")
def test_the_job_does_what_is_missing(
    few_images: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.npy"
    np.save(rows, np.arange(300, 400))
    trained = Trained(data=few_images, weights=weights, search_val_rows=rows, network="resnet20")

    def run(*variants: str) -> dict[str, Any]:
        searches.main(
            trained,
            SETTINGS,
            Resources(workers=1),
            searches.Plan(variants=variants, seeds=(0,)),
            cells=tmp_path / "results",
        )
        files = (tmp_path / "results").glob("*.json")
        return {file.stem: json.loads(file.read_text()) for file in files}

    first = run("default")
    assert sorted(first) == ["compute", "default-s0"]
    second = run("default", "lag=0")
    assert first.items() <= second.items()
    assert not any((tmp_path / "results" / "under-way").iterdir())
    assert "lag=0" in capsys.readouterr().out


def test_searches_on_scores_that_train_are_refused(tmp_path: Path) -> None:
    trained = Trained(data=tmp_path, weights=tmp_path, search_val_rows=tmp_path)
    with pytest.raises(ValueError, match="compared at --score-steps 0"):
        searches.main(
            trained,
            SETTINGS.changed(score_steps=2),
            Resources(),
            searches.Plan(),
            cells=tmp_path,
        )
