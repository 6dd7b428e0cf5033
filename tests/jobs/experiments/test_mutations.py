"""The study of changed files, on a search that was made up; the job itself runs a real one."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from damage.changes import FILE_MUTATIONS, JSON_MUTATIONS, LINE_MUTATIONS
from damage.files import changed_files, read_outcome
from damage.journals import changed_lines, forged_lines, journal_outcome, kind_of, sealed
from damage.outcomes import OUTCOMES, Row

from fppmo_ray import SearchSettings
from fppmo_ray.distribution import Feedback, Proposal
from fppmo_ray.pruning import extract, save_network, trace
from fppmo_ray.service.journal.facts import (
    AllocationChosen,
    Chosen,
    ClockRead,
    ComputeChosen,
    DenseScored,
    EpochFinished,
    Fact,
    Finished,
    ImportanceMeasured,
    LatencyMeasured,
    Rescored,
    Started,
    Updated,
    WeightsFrozen,
)
from fppmo_ray.service.journal.journal import to_lines
from fppmo_ray.service.journal.run_directory import open_run
from fppmo_ray.training import capture, state_to_bytes
from fppmo_ray.training.networks import build_network, source_of

SETTINGS = SearchSettings(macs_cut=0.5, proposals=48).changed(capacity_weight=0)
KEEP = np.arange(10) % 3 > 0
SCORE = {"val_loss": 0.25, "val_accuracy": 0.5, "seconds": 1.0}


def facts_with(digests: dict[str, str]) -> list[Fact]:
    """One fact of each kind, which names these files."""
    state, array = "checkpoints/fppmo-epoch0.pt", "importance.npy"
    return [
        Started(
            search_id="abc",
            identity={"settings": SETTINGS.journaled()},
            versions={"torch": "2.13"},
            groups=["conv1"],
            num_filters=10,
            dense_macs=100,
        ),
        ComputeChosen(compute={"dtype": "float32"}, trials=[], why="as asked for"),
        LatencyMeasured(
            **{"artifact": "latency.json", "sha256": "01", "batch": 1, "dense_ms": 1.5},
            **{"median_error": 0.25, "device": "cpu"},
        ),
        ClockRead(keep=KEEP, milliseconds=1.25),
        WeightsFrozen(sha256="23"),
        DenseScored(
            **{"accuracy": 0.5, "half_interval": 0.1, "num_images": 100, "num_classes": 10},
            **{"chance": 0.1, "is_chance": False, "reordered_accuracy": 0.5},
        ),
        ImportanceMeasured(criterion="l1", artifact=array, sha256=digests[array]),
        AllocationChosen(budget=0, gamma=1.0, costs=[0.5, 0.25]),
        Proposal(proposal_id=0, generation=0, keep=KEEP, macs=50),
        Feedback(proposal_id=0, worker="0@host:1", at=9.5, **SCORE),
        Updated(generation=1, keep_share=[0.5]),
        Rescored(finalist="mode", keep=KEEP, split="choose_val", repeat=0, **SCORE),
        Chosen(finalist="mode", keep=KEEP),
        EpochFinished(
            **{"task": "fppmo", "epoch": 0, "train_loss": 0.5, "seconds": 1.0},
            **{"artifact": state, "sha256": digests[state]},
        ),
        Finished(artifacts=digests),
    ]


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a search on digits would leave."""
    folder = tmp_path_factory.mktemp("origin")
    torch.manual_seed(0)
    dense = build_network("digits_cnn", 10)
    tracing = trace(dense, torch.zeros(1, 1, 8, 8))
    keep = np.arange(tracing.space.num_filters) % 2 == 0
    smaller = extract(dense, tracing, keep)
    source = source_of("digits_cnn", 10)
    save_network(smaller, folder / "network", tracing=tracing, keep=keep, source=source)
    result = {"settings": {"macs_cut": 0.5}, "variants": [], "num_filters": 10}
    contents = {
        "result.json": json.dumps(result).encode(),
        "importance.npy": bytes(range(256)),
        "checkpoints/fppmo-epoch0.pt": state_to_bytes(capture(smaller, None, 1)),
        **{name: (folder / name).read_bytes() for name in ("network.pt", "network.json")},
    }
    with open_run(folder, resume=False) as run:
        run.record(
            facts_with({name: run.write_artifact(name, contents[name]) for name in contents})
        )
    return folder


def totals(rows: Iterable[Row]) -> dict[str, int]:
    rows = list(rows)
    return {name: sum(row.outcomes[name] for row in rows) for name in OUTCOMES}


def test_no_change_of_a_line_is_silent_or_a_traceback(origin: Path, tmp_path: Path) -> None:
    lines = (origin / "journal.jsonl").read_bytes().splitlines(keepends=True)
    assert {kind_of(line) for line in lines} == {kind.__name__ for kind in get_args(Fact)}
    rows = list(changed_lines(lines, tmp_path / "scratch", random.Random(0), 2))
    assert len(rows) == len(lines) * len(LINE_MUTATIONS)
    found = totals(rows)
    assert found["silent"] == found["traceback"] == 0
    assert found["refused"] > 15 * 12 * 2
    assert sum(found.values()) == len(rows) * 2


def test_no_forged_line_is_answered_by_a_traceback(origin: Path, tmp_path: Path) -> None:
    running = tmp_path / "running"
    shutil.copytree(origin, running, ignore=lambda *_: ["result.json"])
    rows = list(forged_lines(running, tmp_path / "scratch", random.Random(0), 2))
    assert {row.changed for row in rows} == {f"{kind.__name__}, forged" for kind in get_args(Fact)}
    found = totals(rows)
    assert found["refused"] + found["as it says"] == sum(found.values()) == 15 * 3 * 2
    assert found["refused"] > 15 * 2


def test_the_study_forges_checksums_that_fit(origin: Path) -> None:
    lines = (origin / "journal.jsonl").read_bytes()
    assert sealed(lines.splitlines(keepends=True)) == lines


def test_no_change_of_a_file_is_silent_or_a_traceback(origin: Path, tmp_path: Path) -> None:
    rows = list(changed_files(origin, tmp_path / "scratch", random.Random(0), 2))
    assert len({row.changed for row in rows}) == 5
    assert len(rows) == 5 * len(FILE_MUTATIONS) + 2 * len(JSON_MUTATIONS)
    assert totals(rows) == dict.fromkeys(OUTCOMES, 0) | {"refused": 2 * len(rows)}


def test_the_study_sees_what_is_silent(tmp_path: Path) -> None:
    facts = facts_with({"importance.npy": "", "checkpoints/fppmo-epoch0.pt": ""})
    original, other = to_lines(facts), to_lines([*facts[:3], *facts[4:]])
    assert journal_outcome(original, original, tmp_path / "a") == "unchanged"
    assert journal_outcome(other, original, tmp_path / "a") == "silent"
    assert journal_outcome(original[:-9], original, tmp_path / "a") == "as after a crash"
    assert read_outcome(lambda: b"other", b"content") == "silent"
    assert read_outcome(lambda: {}["key"], b"content") == "traceback"
