"""Tasks: searches for a regression by plain functions, and what both kinds of task share."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blur_task import (
    FEW_WORKERS,
    SETTINGS,
    blur,
    images,
    minus_error,
    task,
    weights_of,
)
from in_process_ray import in_process_ray
from rich.console import Console
from torch import Tensor, nn

from fppmo_ray import (
    FunctionTask,
    ImageClassification,
    Recipe,
    Resources,
    Sampler,
    Scoring,
    SearchResult,
    SearchSettings,
    Splits,
    Task,
    load_dataset,
    run_search,
)
from fppmo_ray.distribution import Feedback, Proposal
from fppmo_ray.report import print_result, print_status, write_comparison, write_report
from fppmo_ray.service.function_task import FunctionsOnWorker
from fppmo_ray.service.image_task import ImagesOnWorker, image_classification
from fppmo_ray.service.journal.facts import EpochFinished, Started
from fppmo_ray.service.journal.journal import to_lines
from fppmo_ray.service.journal.run_directory import read_journal
from fppmo_ray.service.problem import TaskOnWorker, build_problem
from fppmo_ray.service.worker import PruningWorker
from fppmo_ray.service.worker_protocol import Worker
from fppmo_ray.training import build_network


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    run_dir = tmp_path_factory.mktemp("task") / "run"
    with in_process_ray():
        return run_search(blur(), task(), SETTINGS, run_dir=run_dir, resources=FEW_WORKERS)


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
    assert all(fact.val_accuracy is None for fact in facts if isinstance(fact, Feedback))
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
    assert "Scores on search-val" in page
    assert ">minus error</text>" in page  # the axis of the scores
    assert f"{finished.best.test_score:#.5g}" in page


def test_a_search_is_not_compared_with_one_of_another_measure(
    finished: SearchResult, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(finished.run_dir, other)
    started, *facts = read_journal(other)
    assert isinstance(started, Started)
    assert started.identity["task"]["measure"] == "minus error"
    started.identity["task"]["measure"] = "dB"
    (other / "journal.jsonl").write_bytes(to_lines([started, *facts]))
    with pytest.raises(ValueError, match=r"with the same measure.*by minus error.*by dB"):
        write_comparison([finished.run_dir, other], tmp_path / "both.html")


@pytest.mark.slow
def test_the_same_search_gives_the_same_masks_and_scores(
    local_ray: None, finished: SearchResult, tmp_path: Path
) -> None:
    again = run_search(blur(), task(), SETTINGS, run_dir=tmp_path / "run", resources=Resources())
    columns = ["id", "macs", "score"]
    assert again.history[columns].equals(finished.history[columns])
    assert (again.best.keep == finished.best.keep).all()


def test_a_finished_search_of_another_task_is_not_taken_for_this_one(
    finished: SearchResult,
) -> None:
    with pytest.raises(ValueError, match="task"):
        run_search(
            *(blur(), task(score=lambda network, seed: 0.0), SETTINGS),
            run_dir=finished.run_dir,
            resources=FEW_WORKERS,
            resume=True,
        )


@pytest.mark.usefixtures("ray_here")
def test_a_generation_shares_its_seed_and_without_fine_tune_networks_stay_as_cut(
    tmp_path: Path,
) -> None:
    seeds = tmp_path / "seeds.jsonl"

    def score(network: nn.Module, seed: int) -> float:
        with seeds.open("a") as file:
            file.write(json.dumps([seed, torch.initial_seed()]) + "\n")
        return minus_error(network, seed)

    settings = SearchSettings(
        macs_cut=0.4,
        proposals=4,
        sampler=Sampler(population=2, lag=0),
        scoring=Scoring(rescore_seeds=1),
    )
    result = run_search(
        *(blur(), task(score=score, fine_tune=None, test=lambda network: 1.5), settings),
        run_dir=tmp_path / "run",
        resources=FEW_WORKERS,
    )
    assert (result.best.test_score_before, result.best.test_score) == (1.5, 1.5)
    assert not any(isinstance(fact, EpochFinished) for fact in read_journal(result.run_dir))
    called = [json.loads(line) for line in seeds.read_text().splitlines()]
    assert all(given == of_torch for given, of_torch in called)
    given = [seed for seed, _ in called[1:]]  # behind the first, which only shows that it works
    expected = [int(np.random.SeedSequence((0, g)).generate_state(1)[0]) for g in (0, 0, 1, 1)]
    assert given[:4] == expected
    assert not set(given[4:]) & set(given[:4])


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
    two = FunctionTask(example_inputs=(torch.zeros(1, 1, 6, 6),) * 2, score=output_size)
    problem = build_problem(network, two, SETTINGS)
    assert [tuple(given.shape) for given in two.inputs()] == [(1, 1, 6, 6)] * 2
    dense = weights_of(network, problem)
    keep = np.array([True, False] * 3)
    with torch.no_grad():  # what a mask leaves: half of the filters of both
        for name in ("first", "second"):
            getattr(network, name).weight[~keep] = 0
            getattr(network, name).bias[~keep] = 0
    seed = int(np.random.SeedSequence((0, 1)).generate_state(1)[0])
    proposal = Proposal(proposal_id=0, generation=1, keep=keep, macs=0, score_seed=(0, 1))
    found = PruningWorker(problem, 0).score(dense, proposal)
    assert found.val_loss == pytest.approx(-output_size(network, seed), rel=1e-5)


def test_the_latency_of_a_function_tasks_network_is_measured_too() -> None:
    problem = build_problem(blur(), task(), SearchSettings(latency_cut=0.3))
    found = PruningWorker(problem, 0).measure_latency_table(problem.compute, 2, 0)
    assert [layer.layer for layer in found.table.layers] == ["0", "3", "6"]
    masks = [np.ones(16, dtype=bool)] * 2
    assert len(PruningWorker(problem, 0).time_masks(problem.compute, masks, 2)) == 2


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"score_steps": 10}, "score_steps"),
        ({"rank_by": "val_accuracy"}, "rank_by"),
        ({"baseline_epochs": 1, "dtype": "bfloat16"}, "baseline_epochs, dtype"),
        ({"fine_tune": Recipe(epochs=3)}, "fine_tune"),
        ({"importance": "taylor"}, "importance taylor"),
        ({"score_images": 100}, "score_images must be left"),
        (
            {"importance": "obs"},
            r"importance obs need images .* give FunctionTask\(images=\.\.\.\)",
        ),
        ({"calibration_images": 100, "refit": True}, "calibration_images, refit need images"),
        ({"score_by": "divergence", "start": "allocation"}, "start need images"),
    ],
)
def test_settings_of_images_are_refused_for_a_function_task(
    changed: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        task().checked_settings(SearchSettings(macs_cut=0.5).changed(**changed), Resources())


def test_splits_are_refused_for_a_function_task(tmp_path: Path) -> None:
    rows = [np.array([row]) for row in range(3)]
    splits = Splits(search_train=rows[0], search_val=rows[1], choose_val=rows[2])
    with pytest.raises(ValueError, match="splits divide a data set"):
        run_search(blur(), task(), SETTINGS, run_dir=tmp_path / "run", splits=splits)


@pytest.mark.parametrize("name", ["score", "images", "fine_tune", "test", "recalibrate"])
def test_a_value_that_is_not_a_function_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} of a task must be a function, got 3"):
        task(**{name: 3})


def test_a_task_without_score_and_images_is_refused() -> None:
    with pytest.raises(ValueError, match="a task needs a score, or images on which"):
        task(score=None)


def test_several_workers_cannot_share_the_fine_tuning_of_a_function_task() -> None:
    with pytest.raises(ValueError, match=r"a task fine-tunes by its own function, .* got 2"):
        run_search(blur(), task(), SETTINGS, run_dir="-", resources=Resources(fine_tune_workers=2))


def test_both_kinds_of_task_and_the_worker_satisfy_their_protocols() -> None:
    """Mypy accepts these assignments; those in jobs are checked with the package."""
    dataset = load_dataset("digits")
    tasks: list[Task] = [task(), image_classification(dataset)]
    network, cpu = build_network("digits_cnn", 10), torch.device("cpu")
    of_images = build_problem(network, tasks[1], SearchSettings(macs_cut=0.5))
    of_functions = build_problem(blur(), tasks[0], SETTINGS)
    opened: list[TaskOnWorker] = [
        item.task.open(item.tracing, item.settings, cpu, threads=1)
        for item in (of_functions, of_images)
    ]
    workers: list[Worker] = [PruningWorker(of_functions, 0), PruningWorker(of_images, 0)]
    assert [type(item) for item in opened] == [FunctionsOnWorker, ImagesOnWorker]
    assert len(workers) == 2
    for item in tasks:
        members = [name for name in vars(Task) if not name.startswith("_")]
        assert len(members) == 13
        assert all(hasattr(item, name) for name in members)


def test_a_data_set_is_split_in_three_parts_by_the_seed_alone() -> None:
    dataset = load_dataset("digits")
    first, same, other = (image_classification(dataset, seed=seed) for seed in (3, 3, 4))
    assert isinstance(first, ImageClassification)
    rows = [first.splits.search_train, first.splits.search_val, first.splits.choose_val]
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(dataset.train)))
    assert first.identity() == same.identity()
    assert first.identity() != other.identity()


def test_rows_that_the_data_set_does_not_have_are_refused() -> None:
    rows = [np.array([row]) for row in (0, 1, 99_999)]
    splits = Splits(search_train=rows[0], search_val=rows[1], choose_val=rows[2])
    wrong = image_classification(load_dataset("digits"), splits)
    with pytest.raises(ValueError, match=r"rows of choose_val must be in .* got 99999 to 99999"):
        wrong.checked_settings(SearchSettings(macs_cut=0.5), Resources())


def test_a_network_with_another_number_of_classes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"logits of shape \(N, 10\) .* got \(1, 7\) for one"):
        image_classification(load_dataset("digits")).check_network(build_network("digits_cnn", 7))
