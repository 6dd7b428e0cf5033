"""Gradual pruning of a real network on a few digits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from simulated_run import all_of
from stage_masks import composed, folders

from fppmo_ray import (
    Baseline,
    Gradual,
    Numerics,
    Recipe,
    Resources,
    Sampler,
    Scoring,
    SearchResult,
    SearchSettings,
    Splits,
    load_dataset,
    run_search,
)
from fppmo_ray.distribution import Feedback, Proposal
from fppmo_ray.job import show_result
from fppmo_ray.service.journal.fact_lines import fact_to_json
from fppmo_ray.service.journal.facts import (
    Chosen,
    EpochFinished,
    WeightsFrozen,
)
from fppmo_ray.service.journal.run_directory import (
    JOURNAL,
    read_journal,
)
from fppmo_ray.training import build_network, evaluate, open_images, source_of

SHORT = SearchSettings(
    macs_cut=0.6,
    proposals=16,
    fine_tune=Recipe(epochs=2, batch_size=64, distillation_weight=0.5),
    gradual=Gradual(stages=0.4, stage_epochs=2),
    sampler=Sampler(population=4),
    scoring=Scoring(
        score_steps=1,
        recalibrate_images=128,
        score_recalibrate_images=128,
        score_images=100,
        rescore_seeds=2,
    ),
    baseline=Baseline(baseline_epochs=1),
    numerics=Numerics(dtype="float32"),
)


# A few digits: what is shown does not depend on how well they are told apart.
SPLITS = Splits(
    search_train=np.arange(192), search_val=np.arange(200, 300), choose_val=np.arange(300, 400)
)


def run(run_dir: Path, workers: int, *, resume: bool = False) -> SearchResult:
    return run_search(
        build_network("digits_cnn", 10, seed=0),
        load_dataset("digits"),
        SHORT,
        run_dir=run_dir,
        splits=SPLITS,
        resources=Resources(workers=workers),
        resume=resume,
        source=source_of("digits_cnn", 10),
    )


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_one_worker_two_workers_and_a_resumed_search_end_alike(tmp_path: Path) -> None:
    result = run(tmp_path / "one", 1)
    run(tmp_path / "two", 2)
    of_one = [decided(place) for place in folders(tmp_path / "one")]
    assert [decided(place) for place in folders(tmp_path / "two")] == of_one
    epochs = all_of(tmp_path / "one", EpochFinished)
    tasks = list(dict.fromkeys(fact.task for fact in epochs))
    assert tasks[:2] == ["baseline", "stage-1"]
    assert sorted(tasks[2:]) == ["dense", "fppmo", "importance-only"]

    for folder, mark in (("stage-2", b'"Feedback"'), (".", b'"stage-1"')):
        journal = tmp_path / "two" / folder / JOURNAL
        lines = journal.read_bytes().splitlines(keepends=True)
        cut = next(i for i, line in enumerate(lines) if mark in line)
        journal.write_bytes(b"".join(lines[: cut + 1]))
    run(tmp_path / "two", 2, resume=True)
    assert [decided(place) for place in folders(tmp_path / "two")] == of_one

    first, whole = composed(tmp_path / "one")
    assert not (whole & ~first).any()
    assert np.array_equal(result.best.keep, whole)
    assert 0.6 <= result.best.macs_cut < 0.62
    recipe = json.loads((tmp_path / "one" / "network.json").read_text())
    assert recipe["macs"] == result.best.macs
    dataset = load_dataset("digits")
    images = open_images(dataset.test, None, dataset, "cpu").batches(250)
    accuracy = evaluate(result.network(), images).accuracy
    assert accuracy == pytest.approx(result.best.test_accuracy, abs=1e-9)
    assert result.figures["epochs_between_stages"] == 2  # of one change of stages
    rows = {row["name"]: row for row in result.figures["variants"]}
    assert abs(rows["importance-only"]["macs_cut"] - result.best.macs_cut) < 0.02
    counted = sum(parameter.numel() for parameter in result.network().parameters())
    assert rows["fppmo"]["parameters"] == counted
    scores = result.figures["scores"]
    assert (scores["scored"], scores["failed"]) == (16, 0)
    assert scores["mean_seconds"] > 0
    assert result.figures["score_noise"]["repeats"] == 2
    show_result(tmp_path / "one")


def decided(run_dir: Path) -> set[str]:
    """Masks, scores, choices and losses."""
    seen = set()
    for fact in read_journal(run_dir):
        match fact:
            case Proposal() | Chosen() | WeightsFrozen():
                seen.add(repr(fact_to_json(fact)))
            case Feedback():
                seen.add(repr((fact.proposal_id, fact.val_loss)))
            case EpochFinished():
                seen.add(repr((fact.task, fact.epoch, fact.train_loss)))
    return seen
