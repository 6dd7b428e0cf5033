"""Rounds of adapted weights and stages of gradual pruning: the same search however it is cut."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pretend_training import PoolHere, PretendTrainer, TinyCNN
from rich.console import Console

from fppmo_ray import Recipe, SearchSettings, load_dataset
from fppmo_ray.distribution import unpack_mask
from fppmo_ray.pruning import extract
from fppmo_ray.service import rounds, search
from fppmo_ray.service.probability_model import ProbabilityModel
from fppmo_ray.service.problem import Problem, state_problem
from fppmo_ray.service.journal.facts import (
    Asked,
    Chosen,
    EpochFinished,
    Fact,
    Rescored,
    RoundStarted,
    Scored,
)
from fppmo_ray.service.journal.run_directory import JOURNAL, open_run, read_journal
from fppmo_ray.service.rounds import Context
from fppmo_ray.service.search import Found, find_mask, start_of

SETTINGS = SearchSettings(
    macs_cut=0.6,
    proposals=24,
    population=4,
    score_steps=0,
    rescore_seeds=2,
    recipe=Recipe(epochs=3),
)
ADAPTED = replace(SETTINGS, adapt_epochs=2, adapt_rounds=2)
STAGED = replace(SETTINGS, stages=(0.3, 0.6), stage_epochs=2)
BOTH = replace(STAGED, adapt_epochs=1, adapt_rounds=2, tune_from="adapted")


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights stay here, and so does the probability model."""

    class ModelHere(ProbabilityModel):
        def close(self) -> None: ...

    monkeypatch.setattr(rounds.ray, "put", lambda value: value)
    monkeypatch.setattr(search, "ModelHandle", ModelHere)


@pytest.fixture(scope="module")
def problem() -> Problem:
    torch.manual_seed(0)
    return state_problem(TinyCNN(), load_dataset("digits"), SETTINGS)


@pytest.fixture
def run(problem: Problem) -> Callable[..., tuple[Found, PoolHere]]:
    """Goes on with a search in this process, to all but its conclusion."""

    def go_on(
        run_dir: Path, settings: SearchSettings, seed: int = 0, num_workers: int = 2
    ) -> tuple[Found, PoolHere]:
        pool: Any = PoolHere(PretendTrainer(problem), seed, num_workers)
        with open_run(
            run_dir, resume=None, started=start_of(problem, settings, run_dir)
        ) as directory:
            context = Context(problem, settings, directory, pool, problem.compute)
            console = Console(quiet=True)
            return find_mask(context, score_timeout=None, console=console), pool

    return go_on


def told(run_dir: Path) -> list[str]:
    """What the journal says of the search, whatever the time, the order and the repetitions."""
    facts = [asdict(fact) | {"kind": type(fact).__name__} for fact in read_journal(run_dir)[1:]]
    for fact in facts:
        for name in ("seconds", "at", "worker"):
            fact.pop(name, None)
    return sorted({repr(sorted(fact.items())) for fact in facts})


def all_of(run_dir: Path, kind: type[Fact]) -> list[Any]:
    return [fact for fact in read_journal(run_dir) if isinstance(fact, kind)]


def rounds_of_generations(run_dir: Path) -> dict[int, set[int]]:
    generation_of = {fact.id: fact.generation for fact in all_of(run_dir, Asked)}
    seen: dict[int, set[int]] = {}
    for fact in all_of(run_dir, Scored):
        seen.setdefault(generation_of[fact.id], set()).add(fact.round)
    return seen


def test_every_generation_is_scored_on_the_weights_of_its_round(run, tmp_path: Path) -> None:
    found, pool = run(tmp_path, ADAPTED)
    assert rounds_of_generations(tmp_path) == {0: {1}, 1: {1}, 2: {1}, 3: {2}, 4: {2}, 5: {2}}
    assert [fact.round for fact in all_of(tmp_path, RoundStarted)] == [0, 1, 2]
    assert len({fact.weights_sha256 for fact in all_of(tmp_path, RoundStarted)}) == 3
    epochs = [(fact.task, fact.epoch) for fact in all_of(tmp_path, EpochFinished)]
    assert epochs == [(f"adaptation-{r}", e) for r in (1, 2) for e in (0, 1)]
    finalists = [work for work in pool.done if work.name.startswith("finalist")]
    assert {work.arguments[0].round for work in finalists} == {2}
    assert found.weights is found.others is found.given
    assert found.weights.round == 0


def test_the_first_generation_of_a_round_waits_while_the_one_before_is_scored(
    run, tmp_path: Path
) -> None:
    _, pool = run(tmp_path, ADAPTED, num_workers=1)
    names = [work.name for work in pool.done]
    ended = names.index("epoch 1 of adaptation-2")
    of_round = [names.index(f"proposal {i}") for i in range(12, 16)]
    before = [names.index(f"proposal {i}") for i in range(8, 12)]
    assert min(of_round) > ended
    assert min(before) < ended


def test_samples_of_the_last_round_rank_before_all_others(run, tmp_path: Path) -> None:
    run(tmp_path, ADAPTED)
    samples = {fact.finalist for fact in all_of(tmp_path, Rescored) if "sample" in fact.finalist}
    assert samples
    assert all(12 <= int(name.split()[1]) < 24 for name in samples)


def test_tuning_may_begin_with_adapted_weights(run, tmp_path: Path) -> None:
    found, _ = run(tmp_path, replace(ADAPTED, tune_from="adapted"))
    assert (found.weights.round, found.others.round, found.given.round) == (2, 2, 0)


def test_in_stages_masks_lie_within_the_choice_before_and_budgets_tighten(
    run, problem: Problem, tmp_path: Path
) -> None:
    found, _ = run(tmp_path, STAGED)
    space = problem.tracing.space
    choices = {fact.stage: fact for fact in all_of(tmp_path, Chosen)}
    assert sorted(choices) == [0, 1]
    kept = unpack_mask(choices[0].mask, space.num_filters)
    for fact in all_of(tmp_path, Asked):
        keep = unpack_mask(fact.mask, space.num_filters)
        if fact.generation < 3:
            assert 0.5 < fact.macs / space.dense_macs <= 0.7
        else:
            assert not (keep & ~kept).any()
            assert 0.25 < fact.macs / space.dense_macs <= 0.4
    assert not (found.choices[0].chosen.keep & ~kept).any()
    assert rounds_of_generations(tmp_path) == {g: {int(g >= 3)} for g in range(6)}
    assert {fact.stage for fact in all_of(tmp_path, Rescored)} == {0, 1}
    epochs = [(fact.task, fact.epoch) for fact in all_of(tmp_path, EpochFinished)]
    assert epochs == [("stage-0", 0), ("stage-0", 1)]


def test_the_next_stage_begins_with_the_tuned_network_and_zeros(
    run, problem: Problem, tmp_path: Path
) -> None:
    found, _ = run(tmp_path, STAGED)
    kept = unpack_mask(all_of(tmp_path, Chosen)[0].mask, problem.tracing.space.num_filters)
    dense = TinyCNN()
    dense.load_state_dict({k: torch.tensor(v) for k, v in found.weights.arrays.items()})
    [*_, last] = all_of(tmp_path, EpochFinished)
    state = torch.load(tmp_path / last.artifact, weights_only=True)["network"]
    for name, tensor in extract(dense, problem.tracing, kept).state_dict().items():
        assert torch.equal(state[name], tensor)
    gone = ~kept[:12]
    assert gone.any()
    assert not dense.conv1.weight[gone].any()


def test_gradual_pruning_is_compared_with_the_importance_alone_on_the_given_weights(
    run, problem: Problem, tmp_path: Path
) -> None:
    staged, _ = run(tmp_path / "staged", STAGED)
    plain, _ = run(tmp_path / "plain", SETTINGS)
    [choice], [other] = staged.choices, plain.choices
    assert np.array_equal(choice.importance_only.keep, other.importance_only.keep)
    assert (staged.weights.round, staged.others.round, staged.given.round) == (1, 0, 0)


@pytest.mark.parametrize(
    ("settings", "every"),
    [
        pytest.param(BOTH, 9, id="rounds in stages, cut at times"),
        pytest.param(ADAPTED, 1, id="rounds", marks=pytest.mark.slow),
        pytest.param(BOTH, 1, id="rounds in stages", marks=pytest.mark.slow),
    ],
)
def test_a_search_cut_after_any_fact_ends_like_an_undisturbed_one(
    run, tmp_path: Path, settings: SearchSettings, every: int
) -> None:
    undisturbed, _ = run(tmp_path, settings, num_workers=1)
    whole = told(tmp_path)
    lines = (tmp_path / JOURNAL).read_bytes().splitlines(keepends=True)
    for seed, length in enumerate(cuts(read_journal(tmp_path))[::every]):
        (tmp_path / JOURNAL).write_bytes(b"".join(lines[:length]))
        found, _ = run(tmp_path, settings, seed=seed, num_workers=1 + seed % 3)
        assert told(tmp_path) == whole, length
        for item, other in zip(found.choices, undisturbed.choices, strict=True):
            assert np.array_equal(item.chosen.keep, other.chosen.keep)
        assert found.weights.round == undisturbed.weights.round


def cuts(facts: Iterable[Fact]) -> list[int]:
    """After every fact but masks and scores, and after some of those."""
    return [
        number
        for number, fact in enumerate(facts, start=1)
        if number % 9 == 0 or not isinstance(fact, Asked | Scored)
    ]


def test_a_search_that_stopped_amid_adaptation_goes_on_after_its_last_epoch(
    run, tmp_path: Path
) -> None:
    """Unlike one whose journal was cut back, it still has its checkpoint."""
    settings = replace(ADAPTED, adapt_epochs=3)
    run(tmp_path / "whole", settings)

    class Stopped(RuntimeError):
        pass

    def stop(self: PretendTrainer, *arguments: Any) -> Any:
        if arguments[1].name == "adaptation-2" and arguments[2] == 2:
            raise Stopped
        return adapt(self, *arguments)

    adapt = PretendTrainer.adapt_epoch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PretendTrainer, "adapt_epoch", stop)
        with pytest.raises(Stopped):
            run(tmp_path / "stopped", settings)
    _, pool = run(tmp_path / "stopped", settings)
    assert [work.name for work in pool.done if "adaptation" in work.name] == [
        "epoch 2 of adaptation-2"
    ]
    assert told(tmp_path / "stopped") == told(tmp_path / "whole")


def test_checkpoints_of_past_rounds_go_and_those_that_scores_may_need_stay(
    run, tmp_path: Path
) -> None:
    run(tmp_path, replace(ADAPTED, adapt_rounds=6))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "adaptation-5-epoch1.pt",
        "adaptation-6-epoch1.pt",
    ]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"adapt_epochs": -1}, "adapt_epochs must be >= 0, got -1"),
        ({"adapt_rounds": 0}, "adapt_rounds must be >= 1, got 0"),
        ({"adapt_epochs": 1, "adapt_rounds": 7}, "adapt_rounds must be at most 6, .* got 7"),
        ({"tune_from": "adapted"}, "adapt_epochs must be > 0 to tune adapted weights"),
        ({"tune_from": "there"}, "tune_from must be one of"),
        ({"stages": (0.1, 0.2, 0.3)}, "4 stages need at least 2 generations.* --proposals 32"),
        ({"stages": (0.3, 0.2)}, r"stages must ascend within \(0, 0.6\].* got 0.3,0.2"),
        ({"stages": 0.7}, r"stages must ascend within \(0, 0.6\].* got 0.7"),
        ({"stages": 0.3, "macs_cut": (0.4, 0.6)}, "stages lead up to one macs_cut, got 2"),
    ],
)
def test_rounds_and_stages_that_make_no_search_are_refused(
    wrong: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        replace(SETTINGS, **wrong)


def test_stages_are_even_shares_of_the_generations() -> None:
    stages = replace(STAGED, proposals=27, adapt_epochs=1).stage_settings()
    assert [stage.macs_cut for stage in stages] == [0.3, 0.6]
    assert [(stage.first_generation, stage.num_proposals) for stage in stages] == [(0, 12), (3, 27)]
    assert [stage.round_starts for stage in stages] == [(0,), (3,)]
    assert replace(STAGED, stages=0.3).stage_settings() == STAGED.stage_settings()
    whole = BOTH.optimizer_settings()
    assert (whole.macs_cut, whole.num_proposals, whole.round_starts) == (0.6, 24, (0, 1, 3, 4))
    assert SETTINGS.stage_settings() == (SETTINGS.optimizer_settings(),)


def test_a_later_stage_is_no_resumption_and_counts_on(
    run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        run(tmp_path, STAGED)
        generations = [line for line in caplog.messages if line.startswith("generation")]
        assert sorted(line.split()[1] for line in generations) == ["0", "1", "2", "3", "4", "5"]
        assert not any("resumed" in line for line in caplog.messages)
        run(tmp_path, STAGED)
    assert caplog.messages.count("resumed with 24 of 24 scores") == 1
