"""The choice of a compute configuration, from trials that are written out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inline_pool import InlinePool

from fppmo_ray import (
    FunctionTask,
    Numerics,
    Recipe,
    Resources,
    Scoring,
    SearchSettings,
    load_dataset,
)
from fppmo_ray.distribution import BoolArray
from fppmo_ray.pruning.compute_trial import ComputeTrial
from fppmo_ray.service.compute_choice import (
    changes_to_try,
    choose_compute,
    choose_fastest,
    decide,
)
from fppmo_ray.service.image_task import image_classification
from fppmo_ray.service.journal.facts import ComputeChosen
from fppmo_ray.service.journal.run_directory import read_journal
from fppmo_ray.service.pool.call import Call
from fppmo_ray.service.problem import Problem, build_problem
from fppmo_ray.service.worker import PruningWorker
from fppmo_ray.testing.simulated_search import simulated_run
from fppmo_ray.training import PLAIN_COMPUTE, ComputeConfig, DType, build_network, native_dtype

BFLOAT16, FOLDED = {"dtype": "bfloat16"}, {"fold_batchnorm": True}
BOTH = ComputeConfig(dtype="bfloat16", fold_batchnorm=True)


def chosen(trials: Mapping[ComputeConfig, tuple[float, float] | str], ways: Sequence[Any]) -> Any:
    """The choice among configurations of these seconds and losses, or these errors."""

    def measure(compute: ComputeConfig) -> ComputeTrial:
        outcome = trials[compute]
        if isinstance(outcome, str):
            return ComputeTrial(compute=compute, seconds=None, val_loss=None, error=outcome)
        return ComputeTrial(compute=compute, seconds=outcome[0], val_loss=outcome[1])

    return choose_fastest(PLAIN_COMPUTE, [[way] for way in ways], measure, of="score")


def test_each_change_that_is_faster_is_kept_one_after_the_other() -> None:
    trials = {
        PLAIN_COMPUTE: (4.0, 2.0),
        ComputeConfig(dtype="bfloat16"): (2.0, 2.02),
        BOTH: (1.5, 2.03),
    }
    fact = chosen(trials, [BFLOAT16, FOLDED])
    assert ComputeConfig(**fact.compute) == BOTH
    assert [ComputeConfig(**trial["compute"]) for trial in fact.trials] == list(trials)
    assert fact.why == f"{BOTH}: 1.5 s a score; {PLAIN_COMPUTE}: 4 s a score"


def test_a_change_that_is_hardly_faster_is_not_used() -> None:
    trials = {PLAIN_COMPUTE: (4.0, 2.0), ComputeConfig(fold_batchnorm=True): (3.9, 2.0)}
    assert ComputeConfig(**chosen(trials, [FOLDED]).compute) == PLAIN_COMPUTE


def test_a_compute_configuration_with_another_loss_is_not_used(
    caplog: pytest.LogCaptureFixture,
) -> None:
    trials = {PLAIN_COMPUTE: (4.0, 2.0), ComputeConfig(dtype="bfloat16"): (1.0, 2.3)}
    with caplog.at_level(logging.WARNING):
        assert ComputeConfig(**chosen(trials, [BFLOAT16]).compute) == PLAIN_COMPUTE
    assert "is not used: its loss is 2.3, that of float32" in caplog.text


def test_a_compute_configuration_that_fails_is_named_and_not_used(
    caplog: pytest.LogCaptureFixture,
) -> None:
    trials = {PLAIN_COMPUTE: (4.0, 2.0), ComputeConfig(fold_batchnorm=True): "cannot be followed"}
    with caplog.at_level(logging.WARNING):
        fact = chosen(trials, [FOLDED])
    assert ComputeConfig(**fact.compute) == PLAIN_COMPUTE
    assert fact.trials[1]["error"] == "cannot be followed"
    assert "fails: cannot be followed" in caplog.text


def test_a_network_that_cannot_be_scored_at_all_ends_the_search() -> None:
    with pytest.raises(RuntimeError, match=r"cannot be scored with float32.*: out of memory"):
        chosen({PLAIN_COMPUTE: "out of memory"}, [FOLDED])


def problem(settings: SearchSettings, resources: Resources) -> Problem:
    network = build_network("digits_cnn", 10)
    task = image_classification(load_dataset("digits"))
    return build_problem(network, task, settings, resources=resources)


@pytest.mark.parametrize(
    ("settings", "resources", "native", "changes"),
    [
        ({}, {}, "bfloat16", [[BFLOAT16], [FOLDED], []]),
        ({}, {}, "float32", [[], [FOLDED], []]),
        ({"dtype": "bfloat16"}, {}, "bfloat16", [[], [FOLDED], []]),
        (
            {"dtype": "float32"},
            {"cpus": 4},
            "bfloat16",
            [[], [FOLDED], [{"threads": 2}, {"threads": 1}]],
        ),
        (
            {"score_steps": 4},
            {"gpus": 1.0},
            "bfloat16",
            [
                *([BFLOAT16], [{"channels_last": False}], [{"scoring_batch": 2500}]),
                *([FOLDED], [{"cuda_graphs": True}]),
            ],
        ),
        (  # no steps, no training passes to replay
            {"score_steps": 0},
            {"gpus": 1.0},
            "bfloat16",
            [[BFLOAT16], [{"channels_last": False}], [{"scoring_batch": 2500}], [FOLDED], []],
        ),
    ],
)
def test_autotune_tries_no_other_dtype_than_the_one_asked_for_or_without_units(
    settings: dict[str, Any], resources: dict[str, Any], native: DType, changes: list[Any]
) -> None:
    asked = SearchSettings(macs_cut=0.5).changed(autotune=True, **settings)
    assert changes_to_try(problem(asked, Resources(**resources)), native, of="score") == changes


@pytest.mark.parametrize(
    ("resources", "changes"),
    [
        (Resources(cpus=2), [[BFLOAT16], [], [{"threads": 1}]]),
        (
            Resources(gpus=1.0),
            [[BFLOAT16], [{"channels_last": False}], [], [], [{"cuda_graphs": True}]],
        ),
        (
            Resources(gpus=1.0, fine_tune_workers=4),
            [[BFLOAT16], [{"channels_last": False}], [], [], []],
        ),
    ],
)
def test_trainings_are_tried_with_what_changes_their_speed(
    resources: Resources, changes: list[Any]
) -> None:
    asked = SearchSettings(
        macs_cut=0.5, numerics=Numerics(autotune=True), scoring=Scoring(score_steps=0)
    )
    assert changes_to_try(problem(asked, resources), "bfloat16", of="epoch") == changes


def test_the_configuration_asked_for_has_the_dtype_and_the_threads_of_a_worker() -> None:
    asked = SearchSettings(macs_cut=0.5, numerics=Numerics(dtype="bfloat16"))
    compute = problem(asked, Resources(cpus=3)).compute
    assert compute == ComputeConfig(dtype="bfloat16", threads=3)


class FoldingWorker:
    """Has units for bfloat16 or not, and computes faster with folded norms.

    Args:
        native: The fastest dtype that it has units for.
    """

    def __init__(self, native: DType) -> None:
        self._native = native

    def native_dtype(self) -> DType:
        return self._native

    def try_compute(self, compute: ComputeConfig, keep: BoolArray) -> ComputeTrial:
        seconds = 1.0 if compute.fold_batchnorm else 2.0
        return ComputeTrial(compute=compute, seconds=seconds, val_loss=2.0)

    def try_training(self, compute: ComputeConfig, keep: BoolArray) -> ComputeTrial:
        seconds = 10.0 if compute.dtype == "bfloat16" else 20.0
        return ComputeTrial(compute=compute, seconds=seconds, val_loss=2.0)


@pytest.mark.parametrize(
    ("settings", "native", "compute", "called"),
    [
        ({}, "bfloat16", ComputeConfig(dtype="bfloat16"), ["native_dtype"]),
        ({}, "float32", ComputeConfig(dtype="float32"), ["native_dtype"]),
        ({"dtype": "float32"}, "bfloat16", ComputeConfig(dtype="float32"), []),
        ({"dtype": "bfloat16"}, "float32", ComputeConfig(dtype="bfloat16"), []),
        (
            {"autotune": True},
            "float32",
            ComputeConfig(fold_batchnorm=True),
            ["native_dtype", "try_compute", "try_compute", "try_training"],
        ),
        (
            {"autotune": True, "fine_tune": Recipe(epochs=0), "dtype": "bfloat16"},
            "bfloat16",
            ComputeConfig(dtype="bfloat16", fold_batchnorm=True),
            ["native_dtype", "try_compute", "try_compute"],
        ),
    ],
)
def test_the_worker_s_processor_decides_on_the_dtype_and_nothing_is_timed_without_autotune(
    tmp_path: Path,
    settings: dict[str, Any],
    native: DType,
    compute: ComputeConfig,
    called: list[str],
) -> None:
    asked = SearchSettings(macs_cut=0.5).changed(**settings)
    pool: Any = InlinePool(FoldingWorker(native))
    with simulated_run(tmp_path, asked.optimizer_settings()) as run:
        assert choose_compute(problem(asked, Resources()), run, pool)[0] == compute
        assert [call.kind for call in pool.submitted] == called
        [fact] = run.all(ComputeChosen)
        assert fact.compute == asdict(compute)


def test_scores_and_trainings_get_the_configuration_that_each_is_fastest_with(
    tmp_path: Path,
) -> None:
    asked = SearchSettings(macs_cut=0.5, numerics=Numerics(autotune=True))
    pool: Any = InlinePool(FoldingWorker("bfloat16"))
    with simulated_run(tmp_path, asked.optimizer_settings()) as run:
        chosen = choose_compute(problem(asked, Resources()), run, pool)
        assert chosen == (ComputeConfig(fold_batchnorm=True), ComputeConfig(dtype="bfloat16"))
        assert choose_compute(problem(asked, Resources()), run, pool) == chosen  # as journaled
        [fact] = run.all(ComputeChosen)
    assert [trial["of"] for trial in fact.trials] == ["score"] * 3 + ["epoch"] * 2
    assert fact.why.endswith(
        "float32, channels last, scored by 250, 1 thread: 2 s a score; "
        "bfloat16, channels last, scored by 250, 1 thread: 10 s an epoch; "
        "float32, channels last, scored by 250, 1 thread: 20 s an epoch"
    )


def test_autotune_times_scores_on_a_worker_and_journals_all_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    asked = SearchSettings(
        macs_cut=0.5,
        fine_tune=Recipe(epochs=1),
        numerics=Numerics(autotune=True),
        scoring=Scoring(score_images=100),
    )
    asked_problem = problem(asked, Resources())
    pool: Any = InlinePool(PruningWorker(asked_problem, 0))
    with simulated_run(tmp_path, asked.optimizer_settings()) as run:
        compute, training = choose_compute(asked_problem, run, pool)
        [fact] = run.all(ComputeChosen)
    native = native_dtype(torch.device("cpu"))
    dtypes = ["float32", *["bfloat16"] * (native == "bfloat16")]
    tried = [ComputeConfig(**trial["compute"]) for trial in fact.trials if trial["of"] == "score"]
    assert [trial.dtype for trial in tried[: len(dtypes)]] == dtypes
    assert len(tried) == len(dtypes) + 1  # and folded batch norms
    assert compute in tried
    trained = [ComputeConfig(**trial["compute"]) for trial in fact.trials if trial["of"] == "epoch"]
    assert [compute.dtype for compute in trained] == dtypes
    assert training in trained
    assert all(trial["seconds"] > 0 for trial in fact.trials)


def test_a_resumed_search_keeps_its_compute_configuration_without_measuring(
    tmp_path: Path,
) -> None:
    asked = SearchSettings(macs_cut=0.5)
    fact = ComputeChosen(compute=asdict(BOTH), trials=[], why="it was faster then")
    with simulated_run(tmp_path, asked.optimizer_settings()) as run:
        run.record([fact])
        nobody: Any = None  # to measure it
        assert choose_compute(problem(asked, Resources()), run, nobody) == (BOTH, BOTH)
    assert read_journal(tmp_path)[-1] == fact


def problem_of_functions(settings: SearchSettings) -> Problem:
    example, network = torch.zeros(1, 1, 8, 8), build_network("digits_cnn", 10)
    task = FunctionTask(example_inputs=example, score=lambda network, seed: 0.0)
    return build_problem(network, task, settings)


def test_a_task_of_functions_is_scored_once_so_that_its_errors_show_at_the_start(
    tmp_path: Path,
) -> None:
    asked = SearchSettings(macs_cut=0.5)
    of_functions = problem_of_functions(asked)
    pool: Any = InlinePool(FoldingWorker("bfloat16"))
    with simulated_run(tmp_path / "good", asked.optimizer_settings()) as run:
        assert choose_compute(of_functions, run, pool)[0] == ComputeConfig(dtype="float32")
        assert [call.name for call in pool.submitted] == ["first score of the task"]
    broken: Any = InlinePool(FoldingWorker("bfloat16"), lambda call: "ValueError('odd')")
    with simulated_run(tmp_path / "bad", asked.optimizer_settings()) as run:
        with pytest.raises(RuntimeError, match=r"first score of the task failed: ValueError"):
            choose_compute(of_functions, run, broken)
        assert not run.all(ComputeChosen)


def lost(call: Call[Any, Any], times: int) -> str | None:
    """Count losses as the pool does, and return the error that the call ends with."""
    return [call.count_loss(0, "the worker died", is_node_lost=False) for _ in range(times)][-1]


def test_a_first_mask_that_ends_every_worker_does_not_end_the_search(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = SearchSettings(macs_cut=0.5)
    of_functions = problem_of_functions(asked)
    pool: Any = InlinePool(
        FoldingWorker("bfloat16"), lambda call: lost(call, 3) if call is pool.submitted[0] else None
    )
    with simulated_run(tmp_path / "run", asked.optimizer_settings()) as run:
        choose_compute(of_functions, run, pool)
        assert len(run.all(ComputeChosen)) == 1
    assert "lost its worker 3 times" in caplog.text
    assert "the dense network is scored instead" in caplog.text
    deadly: Any = InlinePool(FoldingWorker("bfloat16"), lambda call: lost(call, 3))
    with (
        simulated_run(tmp_path / "deadly", asked.optimizer_settings()) as run,
        pytest.raises(RuntimeError, match="first score of the task failed: lost its worker 3 ti"),
    ):
        choose_compute(of_functions, run, deadly)
    assert len(deadly.submitted) == 2  # a mask, then the dense network


def test_a_compute_configuration_that_ends_its_workers_is_not_used(tmp_path: Path) -> None:
    asked = SearchSettings(macs_cut=0.5, numerics=Numerics(autotune=True))
    pool: Any = InlinePool(
        FoldingWorker("float32"), lambda call: lost(call, 3) if "folded" in call.name else None
    )
    chosen = decide(problem(asked, Resources()), pool, np.ones(4, dtype=bool))
    errors = {trial["compute"]["fold_batchnorm"]: trial["error"] for trial in chosen.trials}
    assert errors[False] is None
    assert (errors[True] or "").startswith("lost its worker 3 times")
    assert not chosen.compute["fold_batchnorm"]
