"""The search loop itself, with workers and a probability model in this process."""

from __future__ import annotations

import ast
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from inline_pool import InlinePool

import fppmo_ray.service
from fppmo_ray.distribution import Feedback, MaskOptimizer, OptimizerSettings, Proposal
from fppmo_ray.pruning import Score
from fppmo_ray.service import search_loop
from fppmo_ray.service.journal.artifacts import read_history
from fppmo_ray.service.journal.fact_lines import fact_to_json
from fppmo_ray.service.journal.facts import Fact, Updated
from fppmo_ray.service.journal.run_directory import RunDirectory
from fppmo_ray.service.pool.call import Call
from fppmo_ray.service.pool.worker_pool import WorkerPool
from fppmo_ray.service.progress import watch
from fppmo_ray.service.search_loop import ProbabilityModel, score_proposals
from fppmo_ray.service.setting_groups import Scoring
from fppmo_ray.service.settings import SearchSettings
from fppmo_ray.service.worker import feedback_of
from fppmo_ray.testing.simulated_search import (
    SIMULATED_SPACE,
    Pace,
    SimulatedWorker,
    simulated_run,
)

SETTINGS = OptimizerSettings(macs_cut=0.5, num_proposals=24, population_size=8)
IMPORTANCE = np.linspace(1, 2, SIMULATED_SPACE.num_filters)


def simulated_worker() -> SimulatedWorker:
    return SimulatedWorker(Pace(mean_seconds=0.0), 0)


def searched(pool: InlinePool, run_dir: Path, *, resume: bool = False) -> list[Fact]:
    """Return the facts of a search by a pool."""

    def score_call(proposal: Proposal) -> Call[SimulatedWorker, Feedback]:
        return Call(f"proposal {proposal.proposal_id}", lambda worker: worker.score(proposal))

    merit = SETTINGS.merit(SIMULATED_SPACE)
    with (
        simulated_run(run_dir, SETTINGS, resume=resume) as run,
        watch(run, SETTINGS, merit) as progress,
    ):
        model = ProbabilityModel(SIMULATED_SPACE, IMPORTANCE, SETTINGS)
        score_proposals(model, cast(WorkerPool, pool), run, score_call, progress)
        return run.facts


def told(facts: Iterable[Fact]) -> list[dict[str, Any]]:
    """Return all that facts say but times, in the order of their text."""
    rows = [fact_to_json(fact) for fact in facts]
    kept = [{k: v for k, v in row.items() if k not in ("at", "seconds")} for row in rows]
    return sorted(kept, key=json.dumps)


def feedback_in(facts: Iterable[Fact]) -> list[Feedback]:
    return [fact for fact in facts if isinstance(fact, Feedback)]


def test_a_search_records_what_its_worker_answers_and_one_update_per_generation(
    tmp_path: Path,
) -> None:
    facts = searched(InlinePool(simulated_worker()), tmp_path)
    proposals = [fact for fact in facts if isinstance(fact, Proposal)]
    assert [item.proposal_id for item in proposals] == list(range(24))
    assert [item.generation for item in proposals] == [0] * 8 + [1] * 8 + [2] * 8
    worker = simulated_worker()
    for proposal, feedback in zip(proposals, feedback_in(facts), strict=True):
        expected = worker.score(proposal)
        assert (feedback.proposal_id, feedback.val_loss) == (
            proposal.proposal_id,
            expected.val_loss,
        )
        assert (feedback.worker, feedback.error) == ("0@here:1", None)
        assert feedback.at is not None
    assert [fact.generation for fact in facts if isinstance(fact, Updated)] == [1, 2, 3]


BAD_SCORES = {
    3: Score(val_loss=math.nan, val_accuracy=0.1, seconds=1.0),
    5: Score(val_loss=1.0, val_accuracy=math.inf, seconds=1.0),
    7: Score(val_loss=-math.inf, val_accuracy=None, seconds=1.0),
    9: Score(val_loss=-1.7e308, val_accuracy=None, seconds=1.0),
}


class WorkerOfBadScores:
    def score(self, proposal: Proposal) -> Feedback:
        good = Score(val_loss=1.0, val_accuracy=0.5, seconds=1.0)
        found = BAD_SCORES.get(proposal.proposal_id, good)
        return feedback_of(proposal.proposal_id, found, steps=2)


def test_a_score_that_is_not_finite_is_a_failure_of_its_proposal(tmp_path: Path) -> None:
    feedback = feedback_in(searched(InlinePool(WorkerOfBadScores()), tmp_path / "run"))
    assert {item.proposal_id: item.error for item in feedback if item.failed} == {
        3: "the score is not finite: loss nan, accuracy 0.1",
        5: "the score is not finite: loss 1.0, accuracy inf",
        7: "the score is not finite: inf",
        9: "the score is beyond 1e+100 in size: 1.7e+308",
    }
    assert Counter(item.val_loss for item in feedback) == {None: 4, 1.0: 20}
    assert {item.steps for item in feedback} == {2}


def test_a_call_that_failed_is_a_failure_of_its_proposal(tmp_path: Path) -> None:
    def error_of(call: Call[Any, Any]) -> str | None:
        return "ValueError('odd')" if call.name == "proposal 9" else None

    facts = searched(InlinePool(simulated_worker(), error_of), tmp_path)
    failures = [item for item in feedback_in(facts) if item.failed]
    assert [(item.proposal_id, item.error) for item in failures] == [(9, "ValueError('odd')")]
    assert len(feedback_in(facts)) == 24


def test_generations_that_failed_as_a_whole_are_scored_again_after_a_resume(
    tmp_path: Path,
) -> None:
    full_disk = InlinePool(simulated_worker(), lambda call: "no space")
    with pytest.raises(RuntimeError, match=r"all 8 proposals of generation 0 failed.*no space"):
        searched(full_disk, tmp_path / "disturbed")
    feedback = feedback_in(
        searched(InlinePool(simulated_worker()), tmp_path / "disturbed", resume=True)
    )
    assert sum(item.failed for item in feedback) == 16  # two generations were in flight
    assert sorted(item.proposal_id for item in feedback if not item.failed) == list(range(24))
    searched(InlinePool(simulated_worker()), tmp_path / "undisturbed")
    losses = [
        read_history(tmp_path / name)["val_loss"].tolist() for name in ("disturbed", "undisturbed")
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("together", [3, 4096])
def test_a_resumed_search_scores_only_what_its_journal_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    monkeypatch.setattr(search_loop, "_REPLAYED_TOGETHER", together)
    whole = searched(InlinePool(simulated_worker()), tmp_path)
    journal = tmp_path / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    last_scores = [number for number, line in enumerate(lines) if b'"Feedback"' in line][-5:]
    journal.write_bytes(b"".join(lines[: last_scores[0]]))
    pool = InlinePool(simulated_worker())
    again = searched(pool, tmp_path, resume=True)
    assert [call.name for call in pool.submitted] == [f"proposal {i}" for i in range(19, 24)]
    losses = [[item.val_loss for item in feedback_in(facts)] for facts in (whole, again)]
    assert losses[0] == losses[1]
    assert told(again) == told(whole)


def test_a_model_that_proposes_other_masks_than_the_journal_holds_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched(InlinePool(simulated_worker()), tmp_path)
    ask = MaskOptimizer.ask

    def other_masks(optimizer: MaskOptimizer) -> list[Proposal]:
        return [
            Proposal(
                proposal_id=proposal.proposal_id,
                generation=proposal.generation,
                keep=~proposal.keep,
                macs=proposal.macs,
            )
            for proposal in ask(optimizer)
        ]

    monkeypatch.setattr(MaskOptimizer, "ask", other_masks)
    sentence = "replaying the journal gives another mask for proposal 0; resume with the package"
    with pytest.raises(ValueError, match=sentence):
        searched(InlinePool(simulated_worker()), tmp_path, resume=True)


def test_all_feedback_that_has_arrived_is_written_at_once_and_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    told: list[int] = []
    record: Callable[..., None] = RunDirectory.record
    step: Callable[..., Any] = ProbabilityModel.step

    def count_written(run: RunDirectory, facts: Iterable[Fact]) -> None:
        new = list(facts)
        if count := len(feedback_in(new)):
            written.append(count)
        record(run, new)

    def count_told(model: ProbabilityModel, feedback: Any) -> Any:
        assert sum(written) == sum(told) + len(feedback)  # durable before the model is told
        told.append(len(feedback))
        return step(model, feedback)

    monkeypatch.setattr(RunDirectory, "record", count_written)
    monkeypatch.setattr(ProbabilityModel, "step", count_told)
    searched(InlinePool(simulated_worker()), tmp_path / "run")
    assert written == [16, 8]  # two generations are in flight, then comes the third
    assert told == [0, 16, 8]


def test_parameters_do_not_count_where_accuracies_rank() -> None:
    by_loss = SearchSettings(macs_cut=0.5, scoring=Scoring(capacity_weight=2.0))
    assert by_loss.optimizer_settings().capacity_weight == 2
    by_accuracy = SearchSettings(
        macs_cut=0.5, scoring=Scoring(capacity_weight=2.0, rank_by="val_accuracy")
    )
    assert by_accuracy.optimizer_settings().capacity_weight == 0


def test_only_the_tasks_own_modules_the_entry_and_tune_name_a_kind_of_task() -> None:
    service = Path(fppmo_ray.service.__file__).parent
    may_name = {"task.py", "function_task.py", "image_task.py", "search.py"}
    kinds = {"ImageClassification", "FunctionTask", "ImagesOnWorker", "FunctionsOnWorker"}
    for path in service.rglob("*.py"):
        place = path.relative_to(service)
        if place.parts[0] == "tune" or str(place) in may_name:
            continue
        tree = ast.parse(path.read_text())  # docstrings may explain both kinds
        named = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        named |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        named |= {node.name for node in ast.walk(tree) if isinstance(node, ast.alias)}
        assert not named & kinds, place
