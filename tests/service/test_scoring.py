"""The loop itself, with a pool that answers at once and a model in this process."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from rich.console import Console

from fppmo_ray.distribution import Finalist, OptimizerSettings
from fppmo_ray.distribution.space import TensorSize, Width
from fppmo_ray.service.finalists import choose
from fppmo_ray.service.pool.work import Outcome, Work
from fppmo_ray.service.pool.worker_pool import WorkerPool
from fppmo_ray.service.pretend import (
    PRETEND_SPACE,
    Pace,
    PretendScore,
    PretendWorker,
    pretend_run,
)
from fppmo_ray.service.probability_model import ProbabilityModel
from fppmo_ray.service.journal.facts import Fact, Failed, Rescored, Scored, Updated
from fppmo_ray.service.journal.history import read_history
from fppmo_ray.service.journal.run_directory import RunDirectory
from fppmo_ray.service.scoring import Scoring, score_proposals
from fppmo_ray.service.settings import SearchSettings
from fppmo_ray.service.progress.progress import watch

SETTINGS = OptimizerSettings(macs_cut=0.5, num_proposals=24, population_size=8)


class PoolAtOnce:
    """All that is submitted has ended when it is asked for."""

    num_workers = num_ready = 1
    num_busy = num_queued = num_requeued = 0

    def __init__(self) -> None:
        self.works: list[Work] = []

    @property
    def num_unfinished(self) -> int:
        return len(self.works)

    def holds(self, tag: Any) -> bool:
        return tag in [work.tag for work in self.works]

    def submit(self, work: Work) -> None:
        self.works.append(work)

    def next_outcomes(self) -> list[Outcome]:
        works, self.works = self.works, []
        worker = PretendWorker(Pace(mean_seconds=0.0), 0)
        return [Outcome(work=work, value=worker.score(*work.arguments)) for work in works]


def scored_by(
    pool: PoolAtOnce,
    run_dir: Path,
    *,
    resume: bool = False,
    settings: OptimizerSettings = SETTINGS,
) -> list[Fact]:
    """The facts of a search by a pool."""
    importance = np.linspace(1, 2, PRETEND_SPACE.num_filters)
    scoring = Scoring(round=0, weights=None, rung=max(settings.rungs, default=0), timeout=None)
    with (
        pretend_run(run_dir, settings, resume=resume) as run,
        watch(run, settings, Console(quiet=True)) as progress,
    ):
        model = cast(Any, ProbabilityModel(PRETEND_SPACE, importance, settings))
        score_proposals(model, cast(WorkerPool, pool), run, scoring, progress)
        return run.facts


class PoolOfNumbers(PoolAtOnce):
    """Some scores are no numbers."""

    def next_outcomes(self) -> list[Outcome]:
        bad = {
            (3, 0): PretendScore(val_loss=math.nan, val_accuracy=0.1, seconds=1.0),
            (5, 0): PretendScore(val_loss=1.0, val_accuracy=math.inf, seconds=1.0),
        }
        return [
            replace(outcome, value=bad.get(outcome.work.tag, outcome.value))
            for outcome in super().next_outcomes()
        ]


def test_a_score_that_is_no_number_is_its_proposals_failure(tmp_path: Path) -> None:
    facts = scored_by(PoolOfNumbers(), tmp_path / "run")
    assert {fact.id: fact.error for fact in facts if isinstance(fact, Failed)} == {
        3: "the score is not finite: loss nan, accuracy 0.1",
        5: "the score is not finite: loss 1.0, accuracy inf",
    }
    assert sum(isinstance(fact, Scored) for fact in facts) == SETTINGS.num_proposals - 2


class PoolOfErrors(PoolAtOnce):
    """Nothing can be scored: a disk is full, say."""

    def next_outcomes(self) -> list[Outcome]:
        return [Outcome(work=item.work, error="no space") for item in super().next_outcomes()]


def test_scores_that_all_failed_are_tried_again_by_whoever_resumes(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"all 8 proposals of generation 0 failed.*no space"):
        scored_by(PoolOfErrors(), tmp_path)
    facts = scored_by(PoolAtOnce(), tmp_path, resume=True)
    assert sum(isinstance(fact, Failed) for fact in facts) == 16  # two generations were in flight
    assert sorted(fact.id for fact in facts if isinstance(fact, Scored)) == list(range(24))


IN_RUNGS = replace(SETTINGS, rungs=(1, 3))


def count(facts: Iterable[Fact], kind: type[Scored | Failed]) -> Counter[int | None]:
    """Facts of a kind by their rung."""
    return Counter(fact.rung for fact in facts if isinstance(fact, kind))


class PoolThatNotes(PoolAtOnce):
    """Remembers what was asked of its workers."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[Work] = []

    def submit(self, work: Work) -> None:
        self.all.append(work)
        super().submit(work)


def test_in_rungs_all_are_scored_with_few_steps_and_the_best_third_with_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pool = PoolThatNotes()
    with caplog.at_level(logging.INFO):
        facts = scored_by(pool, tmp_path, settings=IN_RUNGS)
    assert count(facts, Scored) == {1: 24, 3: 3 * 3}
    assert [fact.generation for fact in facts if isinstance(fact, Updated)] == [1, 2, 3]
    shallow = {
        fact.id: fact.val_loss for fact in facts if isinstance(fact, Scored) and fact.rung == 1
    }
    deep = {fact.id for fact in facts if isinstance(fact, Scored) and fact.rung == 3}
    for begin in (0, 8, 16):
        ids = sorted(range(begin, begin + 8), key=shallow.__getitem__)
        assert deep & {*ids} == {*ids[:3]}
    for proposal_id in deep:
        few, many = (work for work in pool.all if work.tag[0] == proposal_id)
        assert (few.arguments[-1], many.arguments[-1]) == (1, 3)
        assert np.array_equal(few.arguments[1], many.arguments[1])
        assert few.arguments[2] == many.arguments[2]  # the seed: common random numbers
        assert few.kind != many.kind  # time limits are learned of each
        assert many.name == f"proposal {proposal_id} at 3 steps"
    assert [line.split("  ")[0] for line in caplog.messages] == [
        f"generation {i}" for i in range(3)
    ]


def test_a_history_has_a_row_for_every_proposal_and_rung(tmp_path: Path) -> None:
    facts = scored_by(PoolAtOnce(), tmp_path, settings=IN_RUNGS)
    history = read_history(tmp_path)
    assert [*zip(history["id"], history["rung"], history["val_loss"], strict=True)] == sorted(
        (fact.id, fact.rung, fact.val_loss) for fact in facts if isinstance(fact, Scored)
    )
    assert (history["generation"] == history["id"] // 8).all()


class PoolOfDeepErrors(PoolAtOnce):
    """Nothing can be scored with many steps: a time limit is too short, say."""

    def next_outcomes(self) -> list[Outcome]:
        return [
            outcome if outcome.work.tag[1] < 3 else Outcome(work=outcome.work, error="too long")
            for outcome in super().next_outcomes()
        ]


def test_deep_scores_that_all_failed_are_tried_again_by_whoever_resumes(tmp_path: Path) -> None:
    sentence = r"all 3 proposals of generation 0 failed at rung 3.*too long"
    with pytest.raises(RuntimeError, match=sentence):
        scored_by(PoolOfDeepErrors(), tmp_path / "disturbed", settings=IN_RUNGS)
    facts = scored_by(PoolAtOnce(), tmp_path / "disturbed", resume=True, settings=IN_RUNGS)
    assert count(facts, Failed) == {3: 6}  # of two generations
    assert count(facts, Scored) == {1: 24, 3: 9}
    scored_by(PoolAtOnce(), tmp_path / "undisturbed", settings=IN_RUNGS)
    losses = [
        read_history(tmp_path / name)["val_loss"].tolist() for name in ("disturbed", "undisturbed")
    ]
    assert losses[0] == losses[1]


def test_a_failure_without_a_rung_is_one_of_the_searchs_scores(tmp_path: Path) -> None:
    facts = scored_by(PoolOfNumbers(), tmp_path)
    journal = tmp_path / "journal.jsonl"
    lines = journal.read_text().replace('","rung":0}', '"}')  # as journals were once
    assert lines != journal.read_text()
    journal.write_text(lines)
    assert len(scored_by(PoolAtOnce(), tmp_path, resume=True)) == len(facts)
    assert read_history(tmp_path)["error"].notna().sum() == 2


class PoolOfLostFinalist(PoolAtOnce):
    """The second piece of work gives no number."""

    def next_outcomes(self) -> list[Outcome]:
        first, second, *others = super().next_outcomes()
        nothing = PretendScore(val_loss=math.nan, val_accuracy=math.nan, seconds=0.0)
        return [first, replace(second, value=nothing), *others]


def test_a_finalist_whose_score_is_no_number_is_out(tmp_path: Path) -> None:
    settings = SearchSettings(macs_cut=0.5, rescore_seeds=1, capacity_weight=0)
    scoring = Scoring(round=0, weights=None, rung=0, timeout=None)
    # Without the filters with odd numbers the pretended loss is least: it would be chosen.
    keep = np.arange(PRETEND_SPACE.num_filters) % 2 == 0
    finalists = [
        Finalist("mode", np.arange(len(keep)) % 4 != 3),
        Finalist("sample 3", keep),
        Finalist("importance-only", np.roll(keep, 1)),
    ]
    with pretend_run(tmp_path, SETTINGS) as run:
        pool = cast(WorkerPool, PoolOfLostFinalist())
        [choice] = choose(finalists, pool, run, settings, scoring, PRETEND_SPACE)
        assert (choice.chosen.name, choice.importance_only.name) == ("mode", "importance-only")
        rescored = [(fact.finalist, fact.split) for fact in run.all(Rescored)]
        assert rescored == [
            ("mode", "choose_val"),
            ("importance-only", "choose_val"),
            ("importance-only", "search_val"),
        ]


def test_finalists_may_be_scored_deeper_than_proposals(tmp_path: Path) -> None:
    settings = SearchSettings(
        macs_cut=0.5, score_steps=2, rescore_steps=7, rescore_seeds=1, capacity_weight=0
    )
    scoring = Scoring(round=0, weights=None, rung=2, timeout=None)
    keep = np.arange(PRETEND_SPACE.num_filters) % 2 == 0
    finalists = [Finalist("mode", keep), Finalist("importance-only", np.roll(keep, 1))]
    with pretend_run(tmp_path, SETTINGS) as run:
        choose(finalists, cast(WorkerPool, PoolAtOnce()), run, settings, scoring, PRETEND_SPACE)
        assert [(fact.finalist, fact.split, fact.rung) for fact in run.all(Rescored)] == [
            ("mode", "choose_val", 7),
            ("importance-only", "choose_val", 7),
            ("importance-only", "search_val", 2),  # like a proposal, for the noise of a score
        ]


class CountingPool(PoolAtOnce):
    """Counts the scores."""

    scores = 0

    def submit(self, work: Work) -> None:
        self.scores += 1
        super().submit(work)


def test_every_budget_has_its_own_choice_and_a_cut_journal_leads_to_the_same(
    tmp_path: Path,
) -> None:
    settings = SearchSettings(macs_cut=(0.4, 0.6), rescore_seeds=2, capacity_weight=0)
    scoring = Scoring(round=0, weights=None, rung=0, timeout=None)
    # The fewer filters with odd numbers, the better; the tight budget's "mode" is the best of all.
    half = np.arange(PRETEND_SPACE.num_filters) % 2 == 0
    most, few = np.ones_like(half), half & (np.arange(len(half)) % 4 == 0)
    finalists = [
        Finalist("mode", most, 0.4),
        Finalist("sample 3", half, 0.4),
        Finalist("importance-only", most, 0.4),
        Finalist("mode", few, 0.6),
        Finalist("importance-only", most, 0.6),
    ]

    def chosen(resume: bool) -> tuple[list[tuple[float | None, str]], int]:
        pool = CountingPool()
        with pretend_run(tmp_path, SETTINGS, resume=resume) as run:
            choices = choose(
                finalists, cast(WorkerPool, pool), run, settings, scoring, PRETEND_SPACE
            )
        return [(choice.macs_cut, choice.chosen.name) for choice in choices], pool.scores

    # Two of everything, and the importance-only mask, which both have, on search-val as well.
    assert chosen(resume=False) == ([(0.4, "sample 3"), (0.6, "mode")], 2 * (4 + 1))
    journal = tmp_path / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    for missing, scores in ((1, 0), (2, 0), (5, 3)):
        journal.write_bytes(b"".join(lines[:-missing]))
        assert chosen(resume=True) == ([(0.4, "sample 3"), (0.6, "mode")], scores)
        assert sorted(journal.read_bytes().splitlines()) == sorted(b"".join(lines).splitlines())


def test_all_that_has_ended_is_written_at_once_and_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    told: list[int] = []
    record, advance = RunDirectory.record, ProbabilityModel.advance

    def count_scores(run: RunDirectory, facts: Iterable[Fact]) -> None:
        new = list(facts)
        if scores := sum(isinstance(fact, Scored) for fact in new):
            written.append(scores)
        record(run, new)

    def count_feedback(model: ProbabilityModel, feedback: Any) -> Any:
        told.append(len(feedback))
        return advance(model, feedback)

    monkeypatch.setattr(RunDirectory, "record", count_scores)
    monkeypatch.setattr(ProbabilityModel, "advance", count_feedback)
    scored_by(PoolAtOnce(), tmp_path / "run")
    assert written == [16, 8]  # two generations are in flight, then comes the third
    assert told == [0, 16, 8]


def test_among_finalists_of_like_loss_the_one_that_leaves_more_parameters_is_chosen(
    tmp_path: Path,
) -> None:
    group = Width(terms=((0, 1),))
    size = TensorSize(tensor="w", per_pair=9, out_width=group, in_width=Width(constant=1))
    space = replace(PRETEND_SPACE, tensor_sizes=(size,))
    few, many = np.zeros((2, space.num_filters), dtype=bool)
    few[:2], many[:4] = True, True
    finalists = [Finalist("mode", few), Finalist("importance-only", many)]
    scoring = Scoring(round=0, weights=None, rung=0, timeout=None)
    for weight, name in ((0.0, "mode"), (2.0, "importance-only")):
        settings = SearchSettings(macs_cut=0.5, rescore_seeds=1, capacity_weight=weight)
        with pretend_run(tmp_path / name, SETTINGS) as run:
            pool = cast(WorkerPool, PoolOfEqualScores())
            [choice] = choose(finalists, pool, run, settings, scoring, space)
        assert choice.chosen.name == name


def test_parameters_are_of_no_account_where_accuracies_rank() -> None:
    by_loss = SearchSettings(macs_cut=0.5, capacity_weight=2.0)
    assert by_loss.optimizer_settings().capacity_weight == 2
    by_accuracy = replace(by_loss, rank_by="val_accuracy")
    assert by_accuracy.optimizer_settings().capacity_weight == 0


class PoolOfEqualScores(PoolAtOnce):
    def next_outcomes(self) -> list[Outcome]:
        same = PretendScore(val_loss=1.0, val_accuracy=0.5, seconds=0.0)
        return [replace(outcome, value=same) for outcome in super().next_outcomes()]
