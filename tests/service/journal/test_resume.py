"""The real search loop, resumed from whatever is left of its journal: the same masks and scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pretend_training import PoolHere

from fppmo_ray.distribution import OptimizerSettings
from fppmo_ray.service.pretend import PRETEND_SPACE, Pace, PretendWorker
from fppmo_ray.service.probability_model import ProbabilityModel
from fppmo_ray.service.journal.facts import Asked, Fact, Scored
from fppmo_ray.service.journal.run_directory import open_run, read_journal
from fppmo_ray.service.journal.storage import open_storage
from fppmo_ray.service.scoring import Scoring, score_proposals

SETTINGS = OptimizerSettings(macs_cut=0.5, num_proposals=32, population_size=8, seed=3)


class Unseen:
    """Progress that nobody looks at."""

    def begin(self, *_: object) -> None: ...

    def ended(self, *_: object) -> None: ...


def score(
    run_dir: str | Path, *, resume: bool, seed: int = 0, settings: OptimizerSettings = SETTINGS
) -> None:
    """The loop of a search, to its end."""
    importance = np.linspace(1.0, 2.0, PRETEND_SPACE.num_filters)
    model: Any = ProbabilityModel(PRETEND_SPACE, importance, settings)
    pool: Any = PoolHere(PretendWorker(Pace(mean_seconds=0), 0), seed, num_workers=3)
    unseen: Any = Unseen()
    scoring = Scoring(round=0, weights=None, rung=0, timeout=None)
    with open_run(run_dir, resume=resume) as run:
        score_proposals(model, pool, run, scoring, unseen)


def trajectory(run_dir: str | Path) -> dict[int, tuple[str, float]]:
    """Mask and loss of every proposal; each is scored once."""
    facts: list[Fact] = read_journal(run_dir)
    masks = {fact.id: fact.mask for fact in facts if isinstance(fact, Asked)}
    scored = [fact for fact in facts if isinstance(fact, Scored)]
    assert len(masks) == len(scored) == len({fact.id for fact in scored}) == 32
    return {fact.id: (masks[fact.id], fact.val_loss) for fact in scored}


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """The file of an undisturbed search."""
    score(tmp_path, resume=False)
    return tmp_path / "journal.jsonl"


def test_a_journal_cut_at_any_byte_of_its_last_2_kb_reads_and_resumes_to_the_same_search(
    journal: Path,
) -> None:
    run_dir, content, whole = journal.parent, journal.read_bytes(), read_journal(journal.parent)
    undisturbed, resumed_from = trajectory(run_dir), set()
    for length in range(len(content) - 2048, len(content) + 1):
        journal.write_bytes(content[:length])
        num_complete = content[:length].count(b"\n")
        assert read_journal(run_dir) == whole[:num_complete]
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


def test_a_search_in_rungs_cut_at_any_line_resumes_to_the_same_scores(tmp_path: Path) -> None:
    in_rungs = replace(SETTINGS, rungs=(1, 3))
    score(tmp_path, resume=False, settings=in_rungs)
    undisturbed = scores_by_rung(tmp_path)
    assert len(undisturbed) == 32 + 4 * 3
    journal = tmp_path / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    for length in range(len(lines)):
        journal.write_bytes(b"".join(lines[:length]))
        score(tmp_path, resume=True, seed=length, settings=in_rungs)
        assert scores_by_rung(tmp_path) == undisturbed


def test_a_search_for_several_budgets_cut_at_any_line_resumes_to_the_same_scores(
    tmp_path: Path,
) -> None:
    for_three = replace(SETTINGS, macs_cut=(0.3, 0.5, 0.7), rungs=(1, 3))
    score(tmp_path, resume=False, settings=for_three)
    undisturbed = scores_by_rung(tmp_path)
    assert len(undisturbed) == 32 + 4 * 6  # two of each budget's two or three go on
    asked = [fact for fact in read_journal(tmp_path) if isinstance(fact, Asked)]
    assert all(fact.macs <= (1 - fact.macs_cut) * PRETEND_SPACE.dense_macs for fact in asked)
    journal = tmp_path / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    for length in range(0, len(lines), 16):
        journal.write_bytes(b"".join(lines[:length]))
        score(tmp_path, resume=True, seed=length, settings=for_three)
        assert scores_by_rung(tmp_path) == undisturbed


def scores_by_rung(run_dir: Path) -> dict[tuple[int, int], tuple[str, float]]:
    """Mask and loss of every score; none is made twice."""
    facts = read_journal(run_dir)
    masks = {fact.id: fact.mask for fact in facts if isinstance(fact, Asked)}
    scored = [fact for fact in facts if isinstance(fact, Scored)]
    scores = {(fact.id, fact.rung): (masks[fact.id], fact.val_loss) for fact in scored}
    assert len(scores) == len(scored)
    return scores


def drop_last_objects(run_dir: str, count: int) -> None:
    storage = open_storage(run_dir)
    epoch = max(storage.names("journal/claims"))
    names = storage.names(f"journal/{epoch}")
    for name in names[1:][-count:]:
        storage.delete(f"journal/{epoch}/{name}")
