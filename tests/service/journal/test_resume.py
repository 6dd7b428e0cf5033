"""The real search loop, resumed from whatever is left of its journal: the same masks and scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from example_facts import told
from simulated_training import PoolHere

from fppmo_ray.distribution import Feedback, OptimizerSettings, Proposal
from fppmo_ray.service.journal.run_directory import Resume, read_journal
from fppmo_ray.service.journal.storage import open_storage
from fppmo_ray.service.search_loop import ProbabilityModel
from fppmo_ray.testing.simulated_search import (
    SIMULATED_SPACE,
    Pace,
    SimulatedWorker,
    search_with,
    simulated_run,
)

SETTINGS = OptimizerSettings(macs_cut=0.5, num_proposals=32, population_size=8, seed=3)


@pytest.fixture(autouse=True)
def _without_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's metrics want a Ray."""
    monkeypatch.setattr(
        "fppmo_ray.service.progress.metrics_of", lambda search_id: lambda seen: None
    )


def score(
    run_dir: str | Path,
    *,
    resume: Resume,
    seed: int = 0,
    settings: OptimizerSettings = SETTINGS,
) -> None:
    """The loop of a search, to its end."""
    importance = np.linspace(1.0, 2.0, SIMULATED_SPACE.num_filters)
    model = ProbabilityModel(SIMULATED_SPACE, importance, settings)
    pool: Any = PoolHere(SimulatedWorker(Pace(mean_seconds=0), 0), seed, num_workers=3)
    with simulated_run(run_dir, settings, resume=resume) as run:
        search_with(run, model, pool, settings)


def trajectory(run_dir: str | Path) -> dict[int, tuple[bytes, float]]:
    """Mask and loss of every proposal; each is scored once."""
    facts = read_journal(run_dir)
    asked = [fact for fact in facts if isinstance(fact, Proposal)]
    masks = {fact.proposal_id: fact.keep.tobytes() for fact in asked}
    scored = [fact for fact in facts if isinstance(fact, Feedback)]
    assert len(asked) == len(masks) == 32
    assert len(scored) == len({fact.proposal_id for fact in scored}) == 32
    found = {fact.proposal_id: (masks[fact.proposal_id], fact.val_loss) for fact in scored}
    assert None not in {loss for _, loss in found.values()}
    return found  # type: ignore[return-value]


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """The file of an undisturbed search."""
    score(tmp_path, resume=False)
    return tmp_path / "journal.jsonl"


def test_a_journal_cut_at_any_byte_of_its_last_2_kb_reads_and_resumes_to_the_same_search(
    journal: Path,
) -> None:
    run_dir, content = journal.parent, journal.read_bytes()
    undisturbed, whole, resumed_from = trajectory(run_dir), told(read_journal(run_dir)), set()
    for length in range(len(content) - 2048, len(content) + 1):
        journal.write_bytes(content[:length])
        num_complete = content[:length].count(b"\n")
        assert told(read_journal(run_dir)) == whole[:num_complete]
        state = (num_complete, content[:length].endswith(b"\n"))
        if state not in resumed_from:  # every line's end, and a torn line behind it
            resumed_from.add(state)
            score(run_dir, resume=True, seed=length)
            assert trajectory(run_dir) == undisturbed
    assert len(resumed_from) > 20


def test_a_search_on_an_object_store_without_its_last_objects_resumes_to_the_same_search(
    journal: Path, s3_run_dir: Callable[[], str]
) -> None:
    run_dir = s3_run_dir()
    score(run_dir, resume=False)
    assert trajectory(run_dir) == trajectory(journal.parent)
    for lost in (1, 2, 5):
        drop_last_objects(run_dir, lost)
        score(run_dir, resume=True, seed=lost)
        assert trajectory(run_dir) == trajectory(journal.parent)


@pytest.mark.parametrize(
    ("settings", "every"),
    [
        pytest.param(SETTINGS, 1, id="one budget"),
        pytest.param(replace(SETTINGS, macs_cut=(0.3, 0.5, 0.7)), 16, id="three budgets"),
    ],
)
def test_a_search_cut_at_any_line_resumes_to_the_same_scores(
    tmp_path: Path, settings: OptimizerSettings, every: int
) -> None:
    score(tmp_path, resume=False, settings=settings)
    undisturbed = trajectory(tmp_path)
    for fact in read_journal(tmp_path):
        if isinstance(fact, Proposal) and len(settings.macs_cuts) > 1:
            assert fact.macs_cut in settings.macs_cuts
            assert fact.macs <= (1 - fact.macs_cut) * SIMULATED_SPACE.dense_macs
    journal = tmp_path / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    for length in range(0, len(lines), every):
        journal.write_bytes(b"".join(lines[:length]))
        score(tmp_path, resume=True, seed=length, settings=settings)
        assert trajectory(tmp_path) == undisturbed


def drop_last_objects(run_dir: str, count: int) -> None:
    storage = open_storage(run_dir)
    lease = max(storage.names("journal/claims"))
    names = storage.names(f"journal/{lease}")
    for name in names[1:][-count:]:
        storage.delete(f"journal/{lease}/{name}")
