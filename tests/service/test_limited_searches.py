"""Searches on real Ray that limit parameters, latency or memory, and the record they leave."""

from __future__ import annotations

import io
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_process_ray import in_process_ray
from rich.console import Console

from fppmo_ray import (
    Baseline,
    Numerics,
    Recipe,
    Resources,
    Sampler,
    Scoring,
    SearchResult,
    SearchSettings,
    load_dataset,
    run_search,
)
from fppmo_ray.distribution import Proposal
from fppmo_ray.distribution.latency_table import LatencyTable
from fppmo_ray.report import print_result, print_status, write_report
from fppmo_ray.service import measured_latency
from fppmo_ray.service.image_task import image_classification
from fppmo_ray.service.journal.facts import LatencyMeasured
from fppmo_ray.service.journal.run_directory import JOURNAL, read_journal
from fppmo_ray.service.problem import Problem, build_problem
from fppmo_ray.training import build_network, source_of

DENSE = build_network("digits_cnn", 10)
SMALL = SearchSettings(
    macs_cut=0.5,
    proposals=8,
    fine_tune=Recipe(epochs=1, batch_size=64),
    sampler=Sampler(population=4),
    scoring=Scoring(
        rescore_seeds=1, recalibrate_images=64, score_recalibrate_images=64, score_images=64
    ),
    baseline=Baseline(baseline_epochs=1),
    numerics=Numerics(dtype="float32"),
)
BY_LATENCY = replace(SMALL, macs_cut=0.0, latency_cut=0.1, latency_batch=4)


def run(settings: SearchSettings, run_dir: Path, *, resume: bool = False) -> SearchResult:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the latency table is off")  # tests share cores
        return run_search(
            DENSE,
            load_dataset("digits"),
            settings,
            run_dir=run_dir,
            resources=Resources(workers=1),
            resume=resume,
            source=source_of("digits_cnn", 10),
        )


def problem_of(settings: SearchSettings) -> Problem:
    return build_problem(DENSE, image_classification(load_dataset("digits")), settings)


def masks_of(run_dir: Path) -> list[np.ndarray]:
    return [fact.keep for fact in read_journal(run_dir) if isinstance(fact, Proposal)]


def printed(run_dir: Path) -> str:
    text = io.StringIO()
    console = Console(file=text, width=200)
    print_result(run_dir, console)
    print_status(run_dir, console)
    return text.getvalue()


@pytest.fixture(scope="module")
def by_latency(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "latency"
    with in_process_ray():
        run(BY_LATENCY, run_dir)
    return run_dir


@pytest.mark.slow
def test_a_search_removes_the_parameters_and_the_memory_that_are_asked_for(
    ray_here: None, tmp_path: Path
) -> None:
    result = run(replace(SMALL, macs_cut=0.2, params_cut=0.6, memory_cut=0.3), tmp_path)
    dense, *others = result.figures["variants"]
    assert dense["cuts"]["params"] == {"left": dense["parameters"], "cut": 0.0}
    for row in others:
        assert row["cuts"]["params"]["left"] == row["parameters"] <= 0.4 * dense["parameters"]
        assert row["cuts"]["params"]["cut"] >= 0.6
        assert row["cuts"]["memory"]["cut"] >= 0.3
        assert row["cuts"]["memory"]["left"] == row["activation_bytes"]
        assert row["macs_cut"] >= 0.2
    assert sum(p.numel() for p in result.network().parameters()) == others[-1]["parameters"]
    space = problem_of(SMALL).space
    masks = masks_of(tmp_path)
    assert len(masks) == 8
    assert all(space.parameters(keep) <= 0.4 * space.dense_parameters for keep in masks)
    assert "parameters cut" in printed(tmp_path)
    assert "activations cut" in printed(tmp_path)


@pytest.mark.slow
def test_a_search_for_latency_alone_keeps_every_mask_within_its_table(by_latency: Path) -> None:
    [fact] = [fact for fact in read_journal(by_latency) if isinstance(fact, LatencyMeasured)]
    content = json.loads((by_latency / fact.artifact).read_bytes())
    assert (content["batch"], content["device"]) == (fact.batch, fact.device) == (4, "cpu")
    table = LatencyTable.from_json(content["table"])
    assert fact.dense_ms == table.dense_ns / 1e6
    space = problem_of(SMALL).space
    masks = masks_of(by_latency)
    assert len(masks) == 8
    assert all(table.total(space.widths(keep)) <= 0.9 * table.dense_ns for keep in masks)


@pytest.mark.slow
def test_what_was_cut_is_told_by_the_table_and_as_measured(
    by_latency: Path, tmp_path: Path
) -> None:
    figures = SearchResult(by_latency, DENSE).figures
    dense, *others = figures["variants"]
    assert dense["cuts"]["latency"]["measured_cut"] == 0
    assert all(row["cuts"]["latency"]["predicted_cut"] >= 0.1 for row in others)
    assert all(row["cuts"]["latency"]["measured_ms"] > 0 for row in others)
    assert figures["latency_table"]["batch"] == 4
    page, *_ = write_report(by_latency, tmp_path / "report.html")
    for text in (printed(by_latency), page.read_text()):
        assert "latency cut, by the table" in text
        assert "table is off by" in text


@pytest.mark.slow
def test_a_resumed_search_reads_the_table_and_measures_no_other(
    ray_here: None, by_latency: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (by_latency / JOURNAL).read_bytes().splitlines(keepends=True)
    scored = [index for index, line in enumerate(lines) if b'"Feedback"' in line]
    (tmp_path / JOURNAL).write_bytes(b"".join(lines[: scored[2] + 1]))
    for artifact in [*by_latency.glob("*.json"), *by_latency.glob("*.npy")]:
        if artifact.name != "result.json":
            (tmp_path / artifact.name).write_bytes(artifact.read_bytes())
    (tmp_path / "checkpoints").mkdir()
    for artifact in (by_latency / "checkpoints").iterdir():
        (tmp_path / "checkpoints" / artifact.name).write_bytes(artifact.read_bytes())

    def refuse(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(measured_latency, "_measure", refuse)
    resumed = run(BY_LATENCY, tmp_path, resume=True)
    assert np.array_equal(resumed.best.keep, SearchResult(by_latency, DENSE).best.keep)
    assert len([f for f in read_journal(tmp_path) if isinstance(f, LatencyMeasured)]) == 1


@pytest.mark.slow
def test_a_table_that_is_not_the_journal_s_is_refused(
    ray_here: None, by_latency: Path, tmp_path: Path
) -> None:
    lines = (by_latency / JOURNAL).read_bytes().splitlines(keepends=True)
    end = next(index for index, line in enumerate(lines) if b'"LatencyMeasured"' in line)
    (tmp_path / JOURNAL).write_bytes(b"".join(lines[: end + 1]))
    (tmp_path / "latency.json").write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"latency.json is not the file that the journal names"):
        run(BY_LATENCY, tmp_path, resume=True)


def test_a_search_without_such_limits_is_told_as_before_there_were_any() -> None:
    names = {"params_cut", "latency_cut", "memory_cut", "latency_batch"}
    plain = problem_of(replace(SMALL, latency_batch=8)).identity()["settings"]
    assert not names & plain.keys()
    assert plain == SMALL.on("cpu", has_images=True).journaled()
    limited = problem_of(BY_LATENCY).identity()["settings"]
    assert {name: limited[name] for name in names & limited.keys()} == {
        "latency_cut": 0.1,
        "latency_batch": 4,
    }


def test_cuts_out_of_reach_are_refused_before_anything_runs() -> None:
    for name in ("params_cut", "memory_cut"):
        settings = SMALL.changed(macs_cut=0.0, min_keep=0.5, **{name: 0.99})
        with pytest.raises(ValueError, match=rf"{name} must be at most 0\.\d+, got 0\.99"):
            problem_of(settings)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"macs_cut": 0.0}, r"macs_cut must be in \(0, 1\), got 0\.0.* beside another cut"),
        ({"latency_cut": 30.0}, r"latency_cut must be in \(0, 1\), got 30\.0; 0\.3 removes 30 %"),
        ({"params_cut": 0.0}, r"params_cut must be in \(0, 1\), got 0\.0"),
        ({"latency_cut": 0.3, "latency_batch": 0}, "latency_batch must be >= 1, got 0"),
        ({"params_cut": 0.5, "stages": 0.3}, "stages lead up to a macs_cut alone, got params_cut"),
    ],
)
def test_wrong_cuts_are_refused_with_a_sentence(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        SMALL.changed(**wrong)


def test_whoever_compares_at_equal_macs_refuses_other_cuts() -> None:
    with pytest.raises(ValueError, match="at equal MACs here, got params_cut; give macs_cut alone"):
        replace(SMALL, params_cut=0.5).only_macs_cut()
