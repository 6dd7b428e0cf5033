"""The choice of an engine, from trials that are written out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from fppmo_ray import Placement, SearchSettings, load_dataset
from fppmo_ray.pruning.engine_trial import EngineTrial
from fppmo_ray.service.engine_choice import choose_engine, settle_engine, ways_to_try
from fppmo_ray.service.pretend import pretend_run
from fppmo_ray.service.problem import Problem, state_problem
from fppmo_ray.service.record.facts import EngineChosen
from fppmo_ray.service.record.run_directory import read_journal
from fppmo_ray.training import PLAIN, Engine, build_network

BFLOAT16, FOLDED = {"dtype": "bfloat16"}, {"fold_batchnorm": True}
BOTH = Engine(dtype="bfloat16", fold_batchnorm=True)


def chosen(trials: Mapping[Engine, tuple[float, float] | str], ways: Sequence[Any]) -> Any:
    """The choice where engines take so many seconds and find such a loss, or do not run."""

    def measure(engine: Engine) -> EngineTrial:
        outcome = trials[engine]
        if isinstance(outcome, str):
            return EngineTrial(engine=engine, seconds=None, val_loss=None, error=outcome)
        return EngineTrial(engine=engine, seconds=outcome[0], val_loss=outcome[1])

    return choose_engine(PLAIN, [[way] for way in ways], measure)


def test_what_is_faster_is_kept_one_thing_after_the_other() -> None:
    trials = {
        PLAIN: (4.0, 2.0),
        Engine(dtype="bfloat16"): (2.0, 2.02),
        BOTH: (1.5, 2.03),
    }
    fact = chosen(trials, [BFLOAT16, FOLDED])
    assert Engine(**fact.engine) == BOTH
    assert [Engine(**trial["engine"]) for trial in fact.trials] == list(trials)
    assert fact.why == f"{BOTH}: 1.5 s a score; {PLAIN}: 4 s a score"


def test_what_is_hardly_faster_is_left() -> None:
    trials = {PLAIN: (4.0, 2.0), Engine(fold_batchnorm=True): (3.9, 2.0)}
    assert Engine(**chosen(trials, [FOLDED]).engine) == PLAIN


def test_an_engine_with_another_loss_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    trials = {PLAIN: (4.0, 2.0), Engine(dtype="bfloat16"): (1.0, 2.3)}
    with caplog.at_level(logging.WARNING):
        assert Engine(**chosen(trials, [BFLOAT16]).engine) == PLAIN
    assert "is not used: its loss is 2.3, that of float32" in caplog.text


def test_an_engine_that_does_not_run_is_named_and_left(caplog: pytest.LogCaptureFixture) -> None:
    trials = {PLAIN: (4.0, 2.0), Engine(fold_batchnorm=True): "cannot be followed"}
    with caplog.at_level(logging.WARNING):
        fact = chosen(trials, [FOLDED])
    assert Engine(**fact.engine) == PLAIN
    assert fact.trials[1]["error"] == "cannot be followed"
    assert "does not run here: cannot be followed" in caplog.text


def test_an_engine_that_is_left_out_is_told_without_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bfloat16 = Engine(dtype="bfloat16")
    trials = {
        PLAIN: EngineTrial(engine=PLAIN, seconds=4.0, val_loss=2.0),
        bfloat16: EngineTrial(engine=bfloat16, seconds=None, val_loss=None, left_out="it is slow"),
    }
    with caplog.at_level(logging.INFO):
        fact = choose_engine(PLAIN, [[BFLOAT16]], trials.__getitem__)
    assert Engine(**fact.engine) == PLAIN
    assert fact.trials[1]["left_out"] == "it is slow"
    [told] = [record for record in caplog.records if "it is slow" in record.message]
    assert told.levelno == logging.INFO


def test_a_network_that_cannot_be_scored_at_all_ends_the_search() -> None:
    with pytest.raises(RuntimeError, match=r"cannot be scored with float32.*: out of memory"):
        chosen({PLAIN: "out of memory"}, [FOLDED])


def problem(settings: SearchSettings, placement: Placement) -> Problem:
    network = build_network("digits_cnn", 10)
    return state_problem(network, load_dataset("digits"), settings, placement=placement)


@pytest.mark.parametrize(
    ("settings", "placement", "changes"),
    [
        ({}, {}, [[BFLOAT16], [FOLDED], []]),
        ({"dtype": "bfloat16"}, {}, [[], [FOLDED], []]),
        ({"engine": "plain"}, {}, [[BFLOAT16]]),
        ({"engine": "plain", "dtype": "float32"}, {}, [[]]),
        (
            {"dtype": "float32"},
            {"cpus_per_worker": 4},
            [[], [FOLDED], [{"threads": 2}, {"threads": 1}]],
        ),
        (
            {"score_steps": 4},
            {"gpus_per_worker": 1.0},
            [
                *([BFLOAT16], [{"channels_last": False}], [{"scoring_batch": 2500}]),
                *([FOLDED], [{"cuda_graphs": True}]),
            ],
        ),
        (  # no steps, no training passes to replay
            {"score_steps": 0},
            {"gpus_per_worker": 1.0},
            [[BFLOAT16], [{"channels_last": False}], [{"scoring_batch": 2500}], [FOLDED], []],
        ),
    ],
)
def test_what_is_asked_for_is_not_tried(
    settings: dict[str, Any], placement: dict[str, Any], changes: list[Any]
) -> None:
    asked = SearchSettings(macs_cut=0.5, **settings)
    assert ways_to_try(problem(asked, Placement(**placement)), asked) == changes


def test_measurements_begin_with_what_is_asked_for() -> None:
    asked = SearchSettings(macs_cut=0.5, dtype="bfloat16")
    engine = problem(asked, Placement(cpus_per_worker=3)).engine
    assert engine == Engine(dtype="bfloat16", threads=3)


def test_a_resumed_search_keeps_its_engine_whatever_would_be_measured_now(tmp_path: Path) -> None:
    asked = SearchSettings(macs_cut=0.5)
    fact = EngineChosen(engine=asdict(BOTH), trials=[], why="it was faster then")
    with pretend_run(tmp_path, asked.optimizer_settings()) as run:
        run.record([fact])
        nobody: Any = None  # to measure it
        assert settle_engine(problem(asked, Placement()), asked, run, nobody) == BOTH
    assert read_journal(tmp_path)[-1] == fact
