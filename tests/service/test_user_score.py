"""Scores by a user's function: what it may return, and what it does wrong."""

from __future__ import annotations

import math
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from blur_task import (
    FEW_WORKERS,
    SETTINGS,
    blur,
    task,
    weights_of,
)
from torch import nn

from fppmo_ray import (
    Resources,
    run_search,
)
from fppmo_ray.service.problem import build_problem
from fppmo_ray.service.user_functions import as_number
from fppmo_ray.service.worker import PruningWorker


def leaking_score(network: nn.Module, seed: int) -> float:
    """Depends on whatever an earlier call left behind, and leaves a lot."""
    found = (
        *(torch.rand(()).item(), np.random.rand(), random.random()),  # noqa: NPY002
        *(torch.is_grad_enabled(), torch.get_default_dtype().itemsize, torch.get_num_threads()),
        *("LEAKED" in os.environ, torch.are_deterministic_algorithms_enabled()),
    )
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    os.environ["LEAKED"] = "1"
    return math.fsum(math.sqrt(place + 2) * figure for place, figure in enumerate(found))


def test_a_score_does_not_depend_on_what_ran_before_in_the_process() -> None:
    leaking = task(score=leaking_score, fine_tune=None, recalibrate=None)
    problem = build_problem(blur(), leaking, SETTINGS)
    weights, keep = weights_of(problem.network, problem), np.ones(16, dtype=bool)
    threads = torch.get_num_threads()
    worker = PruningWorker(problem, 0)
    try:
        scores = [worker.rescore(weights, keep, (5,), "search_val").val_loss for _ in range(3)]
        other = worker.rescore(weights, keep, (6,), "search_val").val_loss
        figures = [worker.evaluate(weights, keep, None).test for _ in range(2)]
    finally:
        worker.native_dtype()
        worker.try_compute(problem.compute, keep)
        worker.time_masks(problem.compute, [keep], 1)  # restores the process
        torch.set_num_threads(threads)
    assert scores[0] == scores[1] == scores[2] != other
    assert figures[0] == figures[1]


@pytest.mark.parametrize(
    "found", [0.5, np.float32(0.5), np.array([0.5]), torch.tensor(0.5), torch.tensor([[0.5]])]
)
def test_a_score_may_be_any_number(found: Any) -> None:
    assert as_number(found, "score") == 0.5
    assert as_number(2, "score") == 2.0


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        (None, "NoneType"),
        (True, "bool"),
        (np.bool_(True), "bool"),
        (torch.tensor(True), "bool"),
        ("0.5", "str"),
        ((0.5, 0.6), "tuple"),
        ({"psnr": 0.5}, "dict"),
        (0.5j, "complex"),
        (torch.tensor(0.5j), "complex"),
        (torch.zeros(2), "Tensor"),
        (np.zeros(0), "ndarray"),
        (np.array(["a"]), "str"),
    ],
)
def test_a_score_of_another_type_is_named(found: Any, kind: str) -> None:
    with pytest.raises(ValueError, match=f"score of the task must return a number, got {kind}"):
        as_number(found, "score")


@pytest.mark.usefixtures("ray_here")
def test_a_score_that_is_never_a_number_ends_the_search_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="score of the task must return a number, got str"):
        run_search(
            *(blur(), task(score=lambda network, seed: "good"), SETTINGS),
            run_dir=tmp_path / "run",
            resources=FEW_WORKERS,
        )


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_first_score_that_hangs_ends_the_search_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"first score of the task failed: timed out twice aft"):
        run_search(
            *(blur(), task(score=lambda network, seed: time.sleep(600)), SETTINGS),
            run_dir=tmp_path / "run",
            resources=Resources(workers=1, score_timeout=1.0),
        )


def raises_index_error(network: nn.Module, seed: int) -> float:
    return [0.0][seed]


def exits(network: nn.Module, seed: int) -> float:
    sys.exit(3)


@pytest.mark.parametrize(
    ("score", "sentence"),
    [
        (raises_index_error, r"score of the task raised IndexError: list index out of range \(at "),
        (exits, r"score of the task raised SystemExit: 3 \(at .*test_user_score.py:\d+ in exits"),
        (lambda *_: torch.zeros(2), r"must return a number, got Tensor of shape \(2,\)"),
    ],
)
def test_what_a_users_function_does_wrong_is_said_with_its_line(score, sentence: str) -> None:
    worker = PruningWorker(build_problem(blur(), task(score=score), SETTINGS), 0)
    compute = worker._problem.compute
    with pytest.raises((RuntimeError, ValueError), match=sentence):
        worker.try_compute(compute, np.ones(16, dtype=bool))


@pytest.mark.usefixtures("local_ray")
def test_arrays_that_a_function_refers_to_are_copies_that_it_may_write_to() -> None:
    rows = np.arange(100_000)

    def shuffled(network: nn.Module, seed: int) -> float:
        np.random.default_rng(seed).shuffle(rows)
        return float(rows[0])

    arrived = ray.get(ray.put(task(score=shuffled)))
    arrived.score(blur(), 0)
    assert (rows == np.arange(100_000)).all()
    assert arrived.measure == "minus error"
