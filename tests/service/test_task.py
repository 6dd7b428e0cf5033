"""Searches whose task is the user's own: a regression, by plain functions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from fppmo_ray import (
    Placement,
    Recipe,
    SearchResult,
    SearchSettings,
    Splits,
    Task,
    recalibrate_batchnorm,
    search,
)
from fppmo_ray.report import print_result, print_status, write_comparison, write_report
from fppmo_ray.service.pool.work import Outcome, Work
from fppmo_ray.service.journal.facts import EpochFinished, Scored, Started
from fppmo_ray.service.journal.run_directory import read_journal
from fppmo_ray.service.scoring import score_error
from fppmo_ray.service.task import settings_of_task
from fppmo_ray.service.task_problem import TaskProblem, state_task
from fppmo_ray.service.weights import to_arrays
from fppmo_ray.service.workers.assignments import Basis, TaskMaskScore
from fppmo_ray.service.workers.task_worker import TaskWorker

SETTINGS = SearchSettings(
    macs_cut=0.4, proposals=8, population=4, rescore_seeds=2, importance="l1", seed=3
)
FEW_WORKERS = Placement(workers=1)


def blurred(images: Tensor) -> Tensor:
    return nn.functional.avg_pool2d(images, 3, stride=1, padding=1)


def images(seed: int) -> Tensor:
    return torch.rand(16, 1, 6, 6, generator=torch.Generator().manual_seed(seed % 1000))


def minus_error(network: nn.Module, seed: int) -> float:
    assert not network.training
    given = images(seed)
    with torch.no_grad():
        return -float((network(given) - blurred(given)).square().mean())


def train(network: nn.Module) -> None:
    assert network.training
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for step in range(40):
        given = images(step)
        loss = (network(given) - blurred(given)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def recalibrate(network: nn.Module) -> None:
    recalibrate_batchnorm(network, [(images(0), torch.zeros(16))])


def blur() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Conv2d(8, 1, 3, padding=1),
    )
    train(network.train())
    return network


def task(**changed: Any) -> Task:
    given: dict[str, Any] = {
        "example_inputs": torch.zeros(1, 1, 6, 6),
        "score": minus_error,
        "fine_tune": train,
        "recalibrate": recalibrate,
        "measure": "minus error",
    }
    return Task(**(given | changed))


@pytest.fixture(scope="module")
def finished(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    run_dir = tmp_path_factory.mktemp("task") / "run"
    return search(blur(), task(), SETTINGS, run_dir=run_dir, placement=FEW_WORKERS)


def test_a_regression_ends_with_a_smaller_network_that_was_fine_tuned(
    finished: SearchResult,
) -> None:
    best = finished.best
    assert best.macs_cut >= 0.4
    assert sum(best.widths.values()) < 16
    assert best.test_score > best.test_score_before
    network = finished.network()
    seed = np.random.SeedSequence((3, 0, 3)).generate_state(1)[0]  # of the last look, without test
    assert minus_error(network, int(seed)) == pytest.approx(best.test_score, rel=1e-4)


def test_every_score_is_what_the_users_function_returns(finished: SearchResult) -> None:
    history = finished.history
    assert (history["score"] == -history["val_loss"]).all()
    assert history["val_accuracy"].isna().all()
    assert history["score"].between(-1, 0, inclusive="neither").all()


def test_the_journal_tells_scores_and_one_fine_tuning_without_a_loss(
    finished: SearchResult,
) -> None:
    facts = read_journal(finished.run_dir)
    assert all(fact.val_accuracy is None for fact in facts if isinstance(fact, Scored))
    epochs = [fact for fact in facts if isinstance(fact, EpochFinished)]
    assert [(fact.epoch, fact.train_loss) for fact in epochs] == [(0, None)] * 3
    [started] = [fact for fact in facts if isinstance(fact, Started)]
    assert started.identity["task"]["measure"] == "minus error"
    assert started.identity["task"]["score"].endswith("minus_error")
    assert "data" not in started.identity


def test_the_table_and_the_page_name_the_users_measure(
    finished: SearchResult, tmp_path: Path
) -> None:
    console = Console(record=True, width=160)
    print_result(finished.run_dir, console)
    print_status(finished.run_dir, console)
    text = console.export_text()
    assert "minus error on test" in text
    assert f"{finished.best.test_score:#.5g}" in text
    assert "accuracy" not in text
    page = write_report(finished.run_dir, tmp_path / "report.html")[0].read_text()
    assert "minus error on search-val" in page
    assert f"{finished.best.test_score:#.5g}" in page


def test_a_search_is_not_compared_with_one_of_another_measure(
    finished: SearchResult, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(finished.run_dir, other)
    told = (other / "journal.jsonl").read_text()
    assert told.count('"minus error"') == 1
    (other / "journal.jsonl").write_text(told.replace('"minus error"', '"dB"'))
    with pytest.raises(ValueError, match=r"with the same measure.*by minus error.*by dB"):
        write_comparison([finished.run_dir, other], tmp_path / "both.html")


@pytest.mark.slow
def test_the_same_search_gives_the_same_masks_and_scores(
    finished: SearchResult, tmp_path: Path
) -> None:
    again = search(blur(), task(), SETTINGS, run_dir=tmp_path / "run", placement=Placement())
    columns = ["id", "macs", "score"]
    assert again.history[columns].equals(finished.history[columns])
    assert (again.best.keep == finished.best.keep).all()


def test_a_finished_search_of_another_task_is_not_taken_for_this_one(
    finished: SearchResult,
) -> None:
    with pytest.raises(ValueError, match="task"):
        search(
            *(blur(), task(score=lambda network, seed: 0.0), SETTINGS),
            run_dir=finished.run_dir,
            placement=FEW_WORKERS,
            resume=True,
        )


@pytest.mark.usefixtures("local_ray")
def test_seeds_are_a_generations_and_without_fine_tuning_networks_stay_as_they_were_cut(
    tmp_path: Path,
) -> None:
    seeds = tmp_path / "seeds.jsonl"

    def score(network: nn.Module, seed: int) -> float:
        with seeds.open("a") as file:
            file.write(json.dumps([seed, torch.initial_seed()]) + "\n")
        return minus_error(network, seed)

    settings = SearchSettings(macs_cut=0.4, proposals=4, population=2, lag=0, rescore_seeds=1)
    result = search(
        *(blur(), task(score=score, fine_tune=None, test=lambda network: 1.5), settings),
        run_dir=tmp_path / "run",
        placement=FEW_WORKERS,
    )
    assert (result.best.test_score_before, result.best.test_score) == (1.5, 1.5)
    assert not any(isinstance(fact, EpochFinished) for fact in read_journal(result.run_dir))
    called = [json.loads(line) for line in seeds.read_text().splitlines()]
    assert all(given == of_torch for given, of_torch in called)
    given = [seed for seed, _ in called[1:]]  # behind the first, which only shows that it works
    expected = [int(np.random.SeedSequence((0, g)).generate_state(1)[0]) for g in (0, 0, 1, 1)]
    assert given[:4] == expected
    assert not set(given[4:]) & set(given[:4])


def basis(network: nn.Module, problem: TaskProblem) -> Basis:
    return Basis(round=0, arrays=to_arrays(network), compute=problem.compute)


class Sum(nn.Module):
    """Takes two images."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 6, 3), nn.Conv2d(1, 6, 3)
        self.last = nn.Conv2d(6, 1, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        out: Tensor = self.last(torch.relu(self.first(left) + self.second(right)))
        return out


def output_size(network: nn.Module, seed: int) -> float:
    with torch.no_grad():
        return float(network(images(seed), images(seed + 1)).square().mean())


def test_a_network_may_take_several_inputs() -> None:
    torch.manual_seed(0)
    network = Sum()
    two = Task(example_inputs=(torch.zeros(1, 1, 6, 6),) * 2, score=output_size)
    problem = state_task(network, two, settings_of_task(SETTINGS, two))
    assert [tuple(given.shape) for given in problem.example_inputs] == [(1, 1, 6, 6)] * 2
    dense = basis(network, problem)
    keep = np.array([True, False] * 3)
    with torch.no_grad():  # what a mask leaves: half of the filters of both
        for name in ("first", "second"):
            getattr(network, name).weight[~keep] = 0
            getattr(network, name).bias[~keep] = 0
    seed = int(np.random.SeedSequence((0, 1)).generate_state(1)[0])
    found = TaskWorker(problem, 0).score(dense, keep, (0, 1), "search_val", 0)
    assert -found.val_loss == pytest.approx(output_size(network, seed), rel=1e-5)


def test_the_latency_of_a_task_s_network_is_measured_too() -> None:
    problem = state_task(blur(), task(), SearchSettings(latency_cut=0.3))
    found = TaskWorker(problem, 0).measure_latency_table(problem.compute, 2, 0)
    assert [layer.layer for layer in found.table.layers] == ["0", "3", "6"]
    masks = [np.ones(16, dtype=bool)] * 2
    assert len(TaskWorker(problem, 0).time_masks(problem.compute, masks, 2)) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_score_that_is_never_a_number_ends_the_search_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="score of the task must return a number, got str"):
        search(
            *(blur(), task(score=lambda network, seed: "good"), SETTINGS),
            run_dir=tmp_path / "run",
            placement=FEW_WORKERS,
        )


def test_a_score_that_is_not_finite_has_failed() -> None:
    value = TaskMaskScore(val_loss=float("nan"), seconds=1.0)
    outcome = Outcome(work=Work(name="proposal 1", method="score", arguments=()), value=value)
    assert score_error(outcome) == "the score is not finite: nan"


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"score_steps": 10}, "score_steps"),
        ({"rank_by": "val_accuracy"}, "rank_by"),
        ({"baseline_epochs": 1, "dtype": "bfloat16"}, "baseline_epochs, dtype"),
        ({"recipe": Recipe(epochs=3)}, "recipe"),
        ({"importance": "taylor"}, "importance taylor"),
    ],
)
def test_settings_of_images_are_refused_for_a_task(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        settings_of_task(SearchSettings(macs_cut=0.5, **changed), task())


def test_splits_are_refused_for_a_task(tmp_path: Path) -> None:
    rows = [np.array([row]) for row in range(3)]
    splits = Splits(search_train=rows[0], search_val=rows[1], choose_val=rows[2])
    with pytest.raises(ValueError, match="splits are of images"):
        search(blur(), task(), SETTINGS, run_dir=tmp_path / "run", splits=splits)


@pytest.mark.parametrize("name", ["score", "fine_tune", "test", "recalibrate"])
def test_what_is_no_function_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} of a task must be a function, got 3"):
        task(**{name: 3})


def test_several_workers_cannot_share_a_tasks_own_fine_tuning() -> None:
    with pytest.raises(ValueError, match=r"a task fine-tunes by itself, .* got 2"):
        search(blur(), task(), SETTINGS, run_dir="-", placement=Placement(fine_tune_workers=2))
