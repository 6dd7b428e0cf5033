"""A whole search in stages with adapted weights, on real Ray and the digits network."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fppmo_ray import (
    Placement,
    Recipe,
    SearchResult,
    SearchSettings,
    Splits,
    load_dataset,
    search,
)
from fppmo_ray.distribution import unpack_mask
from fppmo_ray.service.journal.facts import Asked, Chosen, EpochFinished, RoundStarted, Scored
from fppmo_ray.service.journal.run_directory import JOURNAL, read_journal
from fppmo_ray.training import build_network, evaluate, open_images, source_of

SETTINGS = SearchSettings(
    macs_cut=0.6,
    stages=0.4,
    stage_epochs=2,
    adapt_epochs=2,
    proposals=16,
    population=4,
    score_steps=1,
    recalibrate_images=128,
    score_recalibrate_images=128,
    score_images=100,
    rescore_seeds=1,
    baseline_epochs=1,
    dtype="float32",
    recipe=Recipe(epochs=2, batch_size=64, distillation_weight=0.5),
)


# A few digits: what is shown does not depend on how well they are told apart.
SPLITS = Splits(
    search_train=np.arange(192), search_val=np.arange(200, 300), choose_val=np.arange(300, 400)
)


def run(run_dir: Path, workers: int, *, resume: bool = False) -> SearchResult:
    return search(
        build_network("digits_cnn", 10, seed=0),
        load_dataset("digits"),
        SETTINGS,
        run_dir=run_dir,
        splits=SPLITS,
        placement=Placement(workers=workers),
        resume=resume,
        source=source_of("digits_cnn", 10),
    )


def told(run_dir: Path) -> set[str]:
    """Scores, rounds, choices and losses."""
    told = set()
    for fact in read_journal(run_dir):
        match fact:
            case Asked() | Chosen() | RoundStarted():
                told.add(repr(fact))
            case Scored():
                told.add(repr((fact.id, fact.round, fact.val_loss)))
            case EpochFinished():
                told.add(repr((fact.task, fact.epoch, fact.train_loss)))
    return told


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_one_worker_two_workers_and_a_resumed_search_end_alike(tmp_path: Path) -> None:
    result = run(tmp_path / "one", 1)
    run(tmp_path / "two", 2)
    assert told(tmp_path / "two") == told(tmp_path / "one")
    facts = read_journal(tmp_path / "one")
    tasks = dict.fromkeys(fact.task for fact in facts if isinstance(fact, EpochFinished))
    assert list(tasks)[:4] == ["baseline", "adaptation-2", "stage-0", "adaptation-4"]
    assert [fact.round for fact in facts if isinstance(fact, RoundStarted)] == [1, 2, 3, 4]

    journal = tmp_path / "two" / JOURNAL
    lines = journal.read_bytes().splitlines(keepends=True)
    cut = next(i for i, line in enumerate(lines) if b'"task":"adaptation-4"' in line)
    journal.write_bytes(b"".join(lines[:cut]))
    run(tmp_path / "two", 2, resume=True)
    assert told(tmp_path / "two") == told(tmp_path / "one")

    first, last = (fact for fact in facts if isinstance(fact, Chosen))
    num_filters = result.figures["num_filters"]
    inner, outer = (unpack_mask(fact.mask, num_filters) for fact in (last, first))
    assert not (inner & ~outer).any()
    assert np.array_equal(result.best.keep, inner)
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
