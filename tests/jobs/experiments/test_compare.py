"""Rivals get what FPPMO gets: the same MACs, the same scores, the same fine-tuning."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import fine_tuning
import numpy as np
import pytest
from cells import Measured, Record, read_all
from fine_tuning import TuningTask, TuningWorker
from ray_head import Head, stop_and_go_on
from rivals.fastnas import mask_of, require_fastnas
from rivals.measurement import look_before_and_after
from rivals.methods import ONE_SHOT, Case, control, method_of, one_shot, settings_of
from rivals.rankings import ranked_globally
from rivals.searches import AffineRanking, LeGR, RivalSearch, random_widths
from rivals.table import comparison_tables

from fppmo_ray import Recipe, Scoring, SearchSettings, Space, load_dataset
from fppmo_ray.distribution import BoolArray, Feedback, MaskOptimizer
from fppmo_ray.pruning import extract
from fppmo_ray.pruning.calibration.features import last_feature_match
from fppmo_ray.service.image_task import image_classification
from fppmo_ray.service.problem import build_problem
from fppmo_ray.training import (
    PLAIN_COMPUTE,
    TrainingState,
    build_network,
    evaluate,
    fine_tune,
    load_weights,
    recalibrate_batchnorm,
)

REPOSITORY = Path(__file__).resolve().parents[3]


SETTINGS = SearchSettings(
    macs_cut=0.57,
    proposals=320,
    fine_tune=Recipe(epochs=2, batch_size=64),
    space=Space(ignore=("conv1",)),
    scoring=Scoring(score_by="labels", recalibrate_images=64, score_recalibrate_images=64),
).on("cpu", has_images=False)


@pytest.fixture(scope="module")
def case(few_images: Path, weights: Path) -> Case:
    dense = build_network("resnet20", 10)
    load_weights(dense, weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # option-A shortcuts are left whole
        task = image_classification(load_dataset("cifar10", few_images))
        problem = build_problem(dense, task, SETTINGS)
    return Case(problem=problem, compute=PLAIN_COMPUTE)


def require_budget(case: Case, keep: BoolArray) -> None:
    space = case.problem.tracing.space
    under = case.budget.max_macs - space.macs(keep)
    assert 0 <= under <= 0.005 * space.dense_macs
    assert (space.widths(keep) >= 1).all()


@pytest.mark.parametrize("name", ONE_SHOT)
def test_a_ranking_meets_the_budget_within_half_a_percent(case: Case, name: str) -> None:
    choice = one_shot(case, name)
    assert choice.keep is not None
    assert choice.scores == 0
    require_budget(case, choice.keep)


def test_uniform_l1_is_the_importance_only_finalist(case: Case) -> None:
    space, settings = case.problem.tracing.space, SETTINGS.optimizer_settings()
    optimizer = MaskOptimizer(space, case.importance("l1"), settings)
    keep = one_shot(case, "uniform-l1").keep
    np.testing.assert_array_equal(keep, optimizer.importance_only())


def test_legr_begins_with_the_global_ranking_it_transforms(case: Case) -> None:
    norms, num_groups = case.importance("l2"), len(case.problem.tracing.space.groups)
    plain = ranked_globally(case.budget, norms)
    identity = AffineRanking(np.ones(num_groups), np.zeros(num_groups))
    np.testing.assert_array_equal(identity.mask(case.budget, norms), plain)
    first, second = LeGR(case.budget, norms, 320, seed=3)(range(2), {})
    np.testing.assert_array_equal(first, plain)
    assert (second != plain).any()


def scored(case: Case, search: RivalSearch, target: np.ndarray) -> list[tuple[BoolArray, float]]:
    """Masks and costs of a whole search for target widths, told one by one, the last first."""
    space, done = case.problem.tracing.space, []
    proposals = list(search.step([]).proposals)
    while proposals:
        proposal = proposals.pop()
        require_budget(case, proposal.keep)
        loss = float(np.abs(space.widths(proposal.keep) - target).sum())
        done.append((proposal.proposal_id, proposal.keep, loss))
        feedback = Feedback(proposal_id=proposal.proposal_id, val_loss=loss, val_accuracy=0.5)
        proposals += search.step([feedback]).proposals
    return [(keep, loss) for _, keep, loss in sorted(done, key=lambda item: item[0])]


def legr_search(case: Case, capacity_weight: float = 0.0) -> RivalSearch:
    draw = LeGR(case.budget, case.importance("l2"), 320, seed=3)
    keep = one_shot(case, "uniform-l1").keep
    assert keep is not None
    settings = SETTINGS.changed(capacity_weight=capacity_weight).optimizer_settings()
    return RivalSearch(draw, case.budget, settings, keep)


TARGET = np.array([2, 4, 10, 14, 5, 9, 52, 37, 41])


def test_legr_spends_all_its_scores_and_nears_what_they_reward(case: Case) -> None:
    search = legr_search(case)
    losses = [loss for _, loss in scored(case, search, TARGET)]
    assert len(losses) == 320
    assert min(losses[51:]) < 0.8 * min(losses[:51])  # a sixth of the scores starts it
    names = [finalist.name for finalist in search.finalists()]
    assert len(names) == 4
    assert names[0] == f"sample {int(np.argmin(losses))}"
    assert names[-1] == "importance-only"


def test_a_weighed_rival_prefers_what_leaves_more_parameters_at_the_same_loss(case: Case) -> None:
    search = legr_search(case, capacity_weight=2.0)
    proposals = list(search.step([]).proposals)
    search.step(
        [Feedback(proposal_id=p.proposal_id, val_loss=1.0, val_accuracy=0.5) for p in proposals]
    )
    parameters = [case.problem.tracing.space.parameters(p.keep) for p in proposals]
    assert search.finalists()[0].name == f"sample {int(np.argmax(parameters))}"


def test_rivals_judge_by_losses_as_they_are_unless_named_weighed() -> None:
    weighed = SETTINGS.changed(capacity_weight=2.0)
    weights = {
        name: settings_of(method_of(name), weighed).scoring.capacity_weight
        for name in ("fppmo", "random", "legr", "random-widths", "legr-weighed")
    }
    assert weights == {
        "fppmo": 2.0,
        "random": 0.0,
        "legr": 0.0,
        "random-widths": 0.0,
        "legr-weighed": 2.0,
    }


def test_a_rival_told_a_whole_journal_proposes_the_same_masks(case: Case) -> None:
    masks = scored(case, legr_search(case), TARGET)
    feedback = [
        Feedback(proposal_id=i, val_loss=loss, val_accuracy=0.5)
        for i, (_, loss) in enumerate(masks)
    ]
    proposals = legr_search(case).step(feedback).proposals
    assert [item.proposal_id for item in proposals] == list(range(320))
    for item, (keep, _) in zip(proposals, masks, strict=True):
        np.testing.assert_array_equal(item.keep, keep)


def test_random_widths_differ_and_hold_the_filters_of_highest_l1(case: Case) -> None:
    space, l1 = case.problem.tracing.space, case.importance("l1")
    masks = random_widths(case.budget, l1, seed=0)(range(20), {})
    assert len({tuple(space.widths(keep)) for keep in masks}) == 20
    for keep in masks:
        require_budget(case, keep)
        for group in range(len(space.groups)):
            of_group = space.group_of == group
            if not keep[of_group].all():
                assert l1[of_group & keep].min() >= l1[of_group & ~keep].max()


def test_controls_share_the_chosen_widths_alone(case: Case) -> None:
    space = case.problem.tracing.space
    chosen = random_widths(case.budget, case.importance("fpgm"), seed=1)(range(1), {})[0]
    masks = [chosen]
    for name in ("chosen-widths-l1", "chosen-widths-random"):
        choice = control(case, name, chosen, {})
        assert choice.keep is not None
        np.testing.assert_array_equal(space.widths(choice.keep), space.widths(chosen))
        masks.append(choice.keep)
    assert len({keep.tobytes() for keep in masks}) == 3
    scratch = control(case, "scratch", chosen, {"weights": np.zeros(1)})
    assert scratch.keep is chosen
    assert list(scratch.weights) == ["weights"]


def test_a_mask_is_read_from_weights_in_any_order(case: Case) -> None:
    keep = one_shot(case, "global-l1").keep
    assert keep is not None
    network = extract(case.problem.network, case.problem.tracing, keep)
    weight = network.get_parameter("layer1.0.conv1.weight")
    weight.data = weight.data.flip(0)
    read = mask_of(network, case.problem.network, case.problem.tracing)
    np.testing.assert_array_equal(read, keep)
    weight.data = weight.data + 1
    with pytest.raises(RuntimeError, match=r"layer1.0.conv1.weight holds filters that are not"):
        mask_of(network, case.problem.network, case.problem.tracing)


def test_fastnas_is_refused_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match="needs modelopt, huggingface_hub, torchprofile, which is not installed"
    ):
        require_fastnas()


def test_methods_are_named_and_searches_take_a_number_of_scores() -> None:
    assert (method_of("fppmo@80").name, method_of("fppmo@80").scores) == ("fppmo", 80)
    assert str(method_of("fppmo@80")) == "fppmo@80"
    with pytest.raises(ValueError, match=r"method must be one of uniform-l1, .*, got 'l1'"):
        method_of("l1")
    with pytest.raises(ValueError, match=r"expected NAME@SCORES .* got 'fpgm@80'"):
        method_of("fpgm@80")


def task(case: Case, folder: Path) -> TuningTask:
    keep = one_shot(case, "uniform-l1").keep
    return TuningTask(
        keep=keep, recipe=SETTINGS.fine_tune, seed=5, compute=case.compute, folder=folder
    )


@pytest.fixture
def worker(case: Case) -> TuningWorker:
    return TuningWorker(case.problem, 0)


def without_times(figures: Any) -> dict[str, Any]:
    epochs = [{**epoch, "seconds": 0} for epoch in figures["epochs"]]
    return {**figures, "epochs": epochs, "tuning_seconds": 0}


def measured(worker: TuningWorker, case: Case, tuning: TuningTask) -> Measured:
    """What a worker gives that is called until it gives something."""
    look = partial(look_before_and_after, known={})
    return next(filter(None, (worker.measure(tuning, look, case.trained) for _ in count())))


def test_fine_tuning_is_that_of_the_library_and_survives_a_kill_between_epochs(
    case: Case, worker: TuningWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measured(worker, case, task(case, tmp_path / "whole"))

    killed = task(case, tmp_path / "killed")
    write = fine_tuning.write_checkpoint

    def write_or_die(path: Path, state: TrainingState, run: Mapping[str, Any]) -> None:
        if state.epochs_done == 2:  # the curve is written by now, the checkpoint is not
            raise KeyboardInterrupt
        write(path, state, run)

    with monkeypatch.context() as patched:
        patched.setattr(fine_tuning, "write_checkpoint", write_or_die)
        with pytest.raises(KeyboardInterrupt):
            measured(worker, case, killed)
    assert len(json.loads((killed.folder / "epochs.json").read_text())) == 2
    resumed = measured(worker, case, killed)
    assert without_times(resumed.figures) == without_times(whole.figures)

    assert killed.keep is not None
    network = extract(case.problem.network, case.problem.tracing, killed.keep)
    images = worker._tuner.split("search_train")
    recalibrate_batchnorm(
        network, images.batches(250, np.random.default_rng(0).permutation(len(images))[:64])
    )
    dense, tracing = case.problem.network, case.problem.tracing
    one, _ = next(iter(images.batches(1)))
    match = last_feature_match(network, dense, tracing, killed.keep, one)
    fine_tune(network, images, SETTINGS.fine_tune, seed=5, teacher=dense, matches=match)
    test = evaluate(network, worker._tuner.split("test").batches(250)).figures()
    assert whole.figures["after"]["test"] == pytest.approx(test)


def record(method: str, seed: int, accuracy: float, **key: Any) -> Record:
    at = {"test": {"accuracy": accuracy}, "choose_val": {"accuracy": accuracy}}
    shared = {"network": "n", "weights": "w", "recipe": {}, "compute": {}, "device_type": "cpu"}
    return Record(
        key=shared | {"method": method, "seed": seed, "macs_cut": 0.57} | key,
        figures={
            **{"macs": 43, "macs_cut": 0.57, "parameters": 9, "scores": 0, "rescores": 0},
            **{"score_seconds": 0, "tuning_seconds": 1, "before": at, "after": at, "epochs": []},
        },
        seconds=1.0,
        versions={},
        date="",
        cpu="",
    )


def test_the_table_pairs_the_seeds_that_both_methods_have() -> None:
    records = [
        *(record("uniform-l1", seed, accuracy) for seed, accuracy in enumerate((0.8, 0.82, 0.7))),
        *(record("fppmo", seed, accuracy) for seed, accuracy in enumerate((0.81, 0.84))),
        record("fpgm", 1, 0.83),
    ]
    [table] = comparison_tables(records)
    columns = {column.header: list(column.cells) for column in table.columns}
    assert columns["method"] == ["uniform-l1", "fpgm", "fppmo"]
    assert columns["seeds"] == ["3", "1", "2"]
    # Differences of 1 and 2 points: 1.5 -+ 12.706 * 0.7071 / sqrt(2).
    assert columns["minus uniform L1 [95 %]"] == ["", "+1.00 (n = 1)", "+1.50 [-4.85, +7.85]"]
    assert columns["FPPMO minus it [95 %]"] == ["+1.50 [-4.85, +7.85]", "+1.00 (n = 1)", ""]


def test_a_folder_of_two_recipes_is_refused() -> None:
    records = [record("fppmo", 0, 0.8), record("fpgm", 0, 0.8, recipe={"epochs": 2})]
    with pytest.raises(ValueError, match="cells of different comparisons: recipe is"):
        comparison_tables(records)


def command_of(few_images: Path, weights: Path, folder: Path, *methods: str) -> list[str]:
    flags = {
        **{"data": few_images, "network": "resnet20", "weights": weights},
        **{"cells": folder / "cells", "work-dir": folder / "work"},
        **{"macs-cut": 0.57, "proposals": 8, "population": 4, "score-steps": 0},
        **{"recalibrate-images": 64, "score-images": 32, "rescore-seeds": 1},
        **{"dtype": "float32", "fine-tune-epochs": 20, "seeds": 0, "workers": 1},
    }
    parts = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return ["jobs/experiments/compare.py", *parts, "--methods", *methods]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_stopped_ray_job_of_a_comparison_keeps_its_epochs_and_goes_on(
    head: Head, few_images: Path, weights: Path, tmp_path: Path
) -> None:
    curves: dict[Path, list[Any]] = {}

    def begun() -> bool:
        """Whether the first network is in the middle of its epochs."""
        for path in tmp_path.glob("work/*/tuning/epochs.json"):
            curves[path] = json.loads(path.read_text())
        return bool(curves)

    command = command_of(few_images, weights, tmp_path, "uniform-l1", "fpgm")
    log = stop_and_go_on(head, *command, begun=begun)
    results = tmp_path / "cells"
    assert f"stopped on request: 0 cells in {results}; the same command goes on" in log
    assert "Traceback" not in log
    records = read_all(results)
    assert sorted(records) == ["fpgm-57-s0", "uniform-l1-57-s0"]
    for path, known in curves.items():
        assert json.loads(path.read_text())[: len(known)] == known  # seconds and all


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_comparison_does_no_cell_and_no_epoch_twice(
    few_images: Path, weights: Path, tmp_path: Path
) -> None:
    results, work = tmp_path / "cells", tmp_path / "work"
    methods = ("uniform-l1", "fppmo", "legr")
    command = [sys.executable, *command_of(few_images, weights, tmp_path, *methods)]

    def curves() -> list[Path]:
        return list(work.glob("*/tuning/epochs.json"))

    process = subprocess.Popen(command, cwd=REPOSITORY, env=os.environ)
    while not any(results.glob("*.json")) or len(curves()) < 2:  # one is done, one has begun
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: path.read_bytes() for path in results.glob("*.json")}
    journals = {path: path.read_bytes() for path in work.glob("*/search/journal.jsonl")}
    curve = max(curves(), key=lambda path: path.stat().st_mtime)
    known = curve.read_text()
    assert len(before) in (1, 2)  # cells take turns, epoch by epoch
    assert len(journals) == 2

    subprocess.run(command, cwd=REPOSITORY, env=os.environ, check=True)
    assert {path: path.read_bytes() for path in before} == before
    assert {path: path.read_bytes() for path in journals} == journals
    assert curve.read_text().startswith(known.removesuffix("]"))
    assert sorted(read_all(results)) == ["fppmo-57-s0", "legr-57-s0", "uniform-l1-57-s0"]
    assert (results / "comparison.png").is_file()
