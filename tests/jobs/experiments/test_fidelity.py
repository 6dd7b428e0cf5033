"""Rank statistics against written-out truth, the masks, and the job on a few real images."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cells
import fidelity
import fine_tuning
import numpy as np
import pytest
import ray
import torch
from agreement import correlation
from agreement import worker as fidelity_worker
from agreement.correlation import interval, noise, noise_beside_others, spearman
from agreement.correlation import top_quarter_recall as recall
from agreement.masks import (
    Mask,
    different_masks,
    masks_from_json,
    masks_of_search,
    masks_to_json,
    near_masks,
)
from agreement.study import Plan, Study, Task, seconds_left, tasks
from agreement.table import agreement_tables
from agreement.worker import Depth, FidelityWorker
from fine_tuning import TuningTask, classification_of
from ray_head import Head, stop_and_go_on
from rich.console import Console
from small_problem import small_problem
from trained import Trained

from fppmo_ray import Numerics, Recipe, Resources, Sampler, Scoring, SearchSettings, Space
from fppmo_ray.distribution import (
    BoolArray,
    Budget,
    ChannelGroup,
    Feedback,
    LayerCost,
    Proposal,
    PruningSpace,
    Width,
)
from fppmo_ray.distribution.logits import uniform_priority
from fppmo_ray.pruning import Candidate, score
from fppmo_ray.service.journal.facts import Chosen, Fact, Rescored, Started, pack_mask
from fppmo_ray.service.journal.journal import to_lines
from fppmo_ray.service.problem import Problem
from fppmo_ray.service.worker import PruningWorker
from fppmo_ray.service.worker_protocol import TrainingTask, WeightsSnapshot, digest, to_arrays
from fppmo_ray.testing.simulated_search import SIMULATED_SPACE
from fppmo_ray.training import ComputeConfig

for module in (cells, fidelity_worker, fine_tuning):  # Ray's workers do not find them
    ray.cloudpickle.register_pickle_by_value(module)

COMPUTE = ComputeConfig()
CUT = 0.57
BUDGET = Budget.from_cut(SIMULATED_SPACE, CUT)
SETTINGS = SearchSettings(
    macs_cut=CUT,
    proposals=4,
    fine_tune=Recipe(epochs=1, batch_size=64),
    sampler=Sampler(population=4),
    numerics=Numerics(dtype="float32"),
    scoring=Scoring(
        score_by="labels",
        recalibrate_images=64,
        score_recalibrate_images=64,
        score_images=16,
        rescore_images=32,
    ),
    space=Space(ignore=("conv1",)),  # as in small_problem
).on("cpu", has_images=False)


def costs(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)


def test_recall_is_the_share_of_the_true_best_quarter_that_is_found() -> None:
    truth = costs(8, 1, 2, 7, 6, 5, 4, 3)  # the best two of eight: 1 and 2
    assert recall(costs(9, 1, 2, 8, 7, 6, 5, 3), truth) == 1
    assert recall(costs(1, 0, 2, 8, 7, 6, 5, 3), truth) == 0.5
    assert recall(costs(0, 8, 7, 1, 2, 3, 4, 5), truth) == 0
    assert recall(costs(1, 2, 3), costs(1, 3, 2)) == 1  # of three masks the best one


def test_agreement_is_the_mean_over_seeds_of_single_scores() -> None:
    two_seeds = np.array([[1.0, 2, 3, 4, 5], [2, 1, 4, 3, 5]])
    assert correlation.agreement(spearman, two_seeds, costs(1, 2, 3, 4, 5)) == pytest.approx(0.9)


def test_the_interval_is_reproducible_and_holds_the_value() -> None:
    rng = np.random.default_rng(3)
    truth = rng.standard_normal(24)
    scores = truth + rng.standard_normal((3, 24))
    low, high = interval(spearman, scores, truth)
    assert (low, high) == interval(spearman, scores, truth)
    assert -1 < low < correlation.agreement(spearman, scores, truth) < high < 1
    assert interval(spearman, truth[None], truth) == (pytest.approx(1), pytest.approx(1))
    assert np.isnan(interval(spearman, np.ones((1, 5)), truth[:5])).all()


def test_what_a_seed_does_to_all_masks_alike_is_noise_but_moves_no_ranks() -> None:
    shifted = np.array([[1.0, 2, 3], [3, 4, 5]])
    assert noise(shifted) == pytest.approx(2**0.5)
    assert noise_beside_others(shifted) == pytest.approx(0)
    crossed = np.array([[0.0, 2], [2, 0]])  # residuals of 1, one degree of freedom
    assert noise_beside_others(crossed) == pytest.approx(2)
    assert np.isnan(noise(shifted[:1]))
    assert np.isnan(noise_beside_others(shifted[:1]))


def importances() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    names = ("l1", "fpgm", "bn_scale")
    return {name: rng.uniform(0.5, 1.5, SIMULATED_SPACE.num_filters) for name in names}


def found_masks(seed: int) -> list[Mask]:
    rng = np.random.default_rng(seed)
    return [
        Mask(f"{i} of search {seed}", BUDGET.fill(rng.random(SIMULATED_SPACE.num_filters)), True)
        for i in range(5)
    ]


def all_masks(num_masks: int, seed: int) -> list[Mask]:
    different = different_masks(BUDGET, importances(), num_masks // 2, seed)
    searches = [found_masks(1), found_masks(2)]
    return different + near_masks(BUDGET, searches, num_masks // 2, seed, taken=different)


def packed(masks: list[Mask]) -> list[str]:
    return [pack_mask(mask.keep) for mask in masks]


def test_all_masks_meet_the_budget_and_differ() -> None:
    masks = all_masks(24, seed=0)
    macs = [SIMULATED_SPACE.macs(mask.keep) for mask in masks]
    assert max(macs) <= 0.43 * SIMULATED_SPACE.dense_macs
    assert min(macs) >= 0.40 * SIMULATED_SPACE.dense_macs  # the smallest legal step is 2 %
    assert len(set(packed(masks))) == len({mask.name for mask in masks}) == 24
    assert [mask.is_near for mask in masks] == 12 * [False] + 12 * [True]


def test_masks_are_a_function_of_the_seed_and_more_of_them_begin_with_the_same() -> None:
    assert packed(all_masks(24, seed=0)) == packed(all_masks(24, seed=0))
    assert packed(all_masks(24, seed=0)) != packed(all_masks(24, seed=1))
    few, many = all_masks(16, seed=0), all_masks(24, seed=0)
    assert packed(few) == packed(many[:8] + many[12:20])


def test_the_first_masks_are_uniform_and_global_rankings_and_layers_spread_ever_more() -> None:
    masks = different_masks(BUDGET, importances(), 12, seed=0)
    names = [mask.name for mask in masks]
    assert names[:4] == ["uniform l1", "global l1", "global fpgm", "global bn_scale"]
    assert names[4:7] == [
        "random widths, spread 0.5",
        "random filters 1",
        "random widths, spread 1",
    ]
    uniform = BUDGET.fill(uniform_priority(SIMULATED_SPACE, importances()["l1"]))
    assert np.array_equal(masks[0].keep, uniform)


def test_two_masks_of_searches_in_turn_then_one_close_to_a_mode() -> None:
    searches = [found_masks(1), found_masks(2)]
    masks = near_masks(BUDGET, searches, 12, seed=0)
    assert packed(masks[0:2]) == packed([searches[0][0], searches[1][0]])
    assert packed(masks[3:5]) == packed([searches[0][1], searches[1][1]])
    for sample, centre in ((masks[2], searches[0][0]), (masks[5], searches[1][0])):
        assert 0 < np.mean(sample.keep != centre.keep) < 0.3
    assert np.mean(searches[0][0].keep != searches[1][0].keep) > 0.3


def test_more_masks_than_there_are_are_refused() -> None:
    cost = LayerCost(
        layer="a", macs_per_pair=9, out_width=Width(terms=((0, 1),)), in_width=Width(constant=1)
    )
    pair = PruningSpace((ChannelGroup(name="a", num_filters=2),), (cost,))
    budget = Budget.from_cut(pair, 0.5)  # the one filter, or the other
    found = [Mask("mode", budget.fill(np.array([1.0, 0])), is_near=True)]
    assert packed(near_masks(budget, [found], 2, seed=0)) == [
        pack_mask(np.array(keep)) for keep in ([True, False], [False, True])
    ]
    with pytest.raises(ValueError, match=r"expected 3 different masks, found 2 that meet the"):
        near_masks(budget, [found], 3, seed=0)


def test_masks_that_results_were_begun_with_need_no_search() -> None:
    near, different = found_masks(1)[:4], [replace(m, is_near=False) for m in found_masks(2)[:4]]
    kept = json.loads(json.dumps(masks_to_json([*different, *near])))
    again = masks_from_json(kept, 5, SIMULATED_SPACE.num_filters)
    assert packed(again) == packed([*different[:3], *near[:2]])
    assert [mask.name for mask in again] == [mask.name for mask in [*different[:3], *near[:2]]]
    with pytest.raises(ValueError, match="expected 10 masks, the results were begun with 8; give"):
        masks_from_json(kept, 10, SIMULATED_SPACE.num_filters)


def write_search(run_dir: Path, facts: list[Fact], space: str, cut: float) -> Path:
    started = Started(
        search_id="s",
        identity={"space": space, "settings": {"macs_cut": cut}},
        versions={},
        groups=[],
        num_filters=next(fact.keep.size for fact in facts if isinstance(fact, Proposal | Chosen)),
        dense_macs=1,
    )
    run_dir.mkdir(parents=True)
    (run_dir / "journal.jsonl").write_bytes(to_lines([started, *facts]))
    return run_dir


def facts_of(masks: list[BoolArray], losses: list[float]) -> list[Fact]:
    """A search in which the first mask became the mode and the others were samples."""
    mode, *samples = masks
    facts: list[Fact] = []
    for number, (keep, loss) in enumerate(zip(samples, losses, strict=True)):
        facts.append(Proposal(proposal_id=number, generation=0, keep=keep, macs=1))
        facts.append(Feedback(proposal_id=number, val_loss=loss, val_accuracy=0.5))
    for finalist, keep in (("sample 0", samples[0]), ("mode", mode)):
        facts.append(
            Rescored(
                finalist=finalist,
                keep=keep,
                split="choose_val",
                repeat=0,
                val_loss=1,
                val_accuracy=0.5,
                seconds=1,
            )
        )
    return [*facts, Chosen(finalist="mode", keep=mode)]


def test_a_searchs_mode_comes_first_and_its_samples_by_loss(tmp_path: Path) -> None:
    masks = [mask.keep for mask in found_masks(1)[:4]]
    facts, space = facts_of(masks, [0.9, 0.7, 0.8]), SIMULATED_SPACE.fingerprint()
    found = masks_of_search(
        write_search(tmp_path / "a", facts, space, CUT), 7, SIMULATED_SPACE, CUT
    )
    names = [f"{name} of search 7" for name in ("mode", "sample 1", "sample 2", "sample 0")]
    assert [mask.name for mask in found] == names
    for mask, number in zip(found, (0, 2, 3, 1), strict=True):
        np.testing.assert_array_equal(mask.keep, masks[number])


def test_searches_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    masks = [mask.keep for mask in found_masks(1)[:2]]
    facts, space = facts_of(masks, [0.9]), SIMULATED_SPACE.fingerprint()
    for facts_there, space_there, cut, expected in (
        (facts[:-1], space, CUT, "has not finished; go on with it by --resume"),
        (facts, "another", CUT, "was for another network or other limits"),
        (facts, space, 0.4, "cut 40% of the MACs, expected 57%"),
        (facts[-1:], space, CUT, "pruned in stages, which have masks of their own"),
    ):
        run_dir = write_search(tmp_path / expected[:9], facts_there, space_there, cut)
        with pytest.raises(ValueError, match=expected):
            masks_of_search(run_dir, 0, SIMULATED_SPACE, CUT)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the last 100 of the few training images."""
    path = tmp_path_factory.mktemp("rows") / "search_val.npy"
    np.save(path, np.arange(300, 400))
    return path


@pytest.fixture(scope="module")
def problem(few_images: Path, weights: Path) -> Problem:
    return small_problem(few_images, weights, SETTINGS)


@pytest.fixture(scope="module")
def mask(problem: Problem) -> Mask:
    budget = Budget.from_cut(problem.tracing.space, CUT)
    priority = np.random.default_rng(0).random(problem.tracing.space.num_filters)
    return Mask("random", budget.fill(priority), is_near=False)


def test_a_score_of_the_job_is_that_of_a_search(problem: Problem, mask: Mask) -> None:
    worker = FidelityWorker(problem, 0)
    many = worker.score(COMPUTE, mask.keep, Depth(steps=1), (0, 1, 2))
    few = worker.score(COMPUTE, mask.keep, Depth(steps=1, images="few"), (0, 1, 2))
    images = (
        classification_of(problem)
        .open(problem.tracing, problem.settings, torch.device("cpu"), threads=problem.threads)
        .images
    )
    candidate = Candidate(
        dense=problem.network.eval(),
        tracing=problem.tracing,
        keep=mask.keep,
        search_train=images("search_train"),
        held_out=images("search_val"),
        fidelity=replace(problem.settings.rescore_fidelity(), steps=1),
        recipe=problem.settings.fine_tune,
        seed=(0, 1, 2),
        compute=COMPUTE,
    )
    expected = score(candidate)
    assert many.figures["val_loss"] == expected.val_loss
    assert many.figures["val_accuracy"] == expected.val_accuracy
    few_images = replace(problem.settings.fidelity(), steps=1)
    as_proposed = score(replace(candidate, fidelity=few_images))
    assert few.figures["val_loss"] == as_proposed.val_loss


def test_the_truth_is_the_fine_tuning_of_a_search(
    problem: Problem, mask: Mask, tmp_path: Path
) -> None:
    recipe = replace(problem.settings.fine_tune, epochs=2, distillation_weight=0.5)
    tuned = TuningTask(keep=mask.keep, recipe=recipe, seed=3, compute=COMPUTE, folder=tmp_path)
    worker = FidelityWorker(problem, 0)
    assert worker.truth(tuned) is None  # one epoch a call
    truth = worker.truth(tuned).figures
    service, arrays = PruningWorker(problem, 0), to_arrays(problem.network)
    weights = WeightsSnapshot(sha256=digest(arrays), arrays=arrays, compute=COMPUTE)
    task = TrainingTask(name="random", keep=mask.keep, recipe=recipe, seed=3)
    state, first = service.train_epoch(weights, task, 0, None, weights)
    state, second = service.train_epoch(weights, task, 1, state, weights)
    evaluation = service.evaluate(weights, mask.keep, state)
    assert truth["train_loss"] == [first.loss, second.loss]
    assert truth["test"] == pytest.approx(evaluation.test, rel=1e-5)
    assert truth["choose_val"] == pytest.approx(evaluation.choose_val, rel=1e-5)
    held_out = 0.6 * truth["search_val"]["loss"] + 0.4 * truth["choose_val"]["loss"]
    assert truth["held_out"]["loss"] == pytest.approx(held_out)  # of 60 and 40 images


def study_of(problem: Problem, masks: list[Mask], plan: Plan) -> Study:
    return Study(
        problem=problem,
        compute=COMPUTE,
        masks=masks,
        plan=plan,
        seed=0,
        score_timeout=None,
        work_dir=Path("/work"),
    )


TWICE = Plan(steps=(50, 0), few_images_steps=(), score_seeds=2, truth_seeds=2)


def record_of(task: Task, cost: float) -> cells.Record:
    figures = {
        "val_loss": cost,
        "val_accuracy": 1 - cost,
        "held_out": {"loss": cost, "accuracy": 1 - cost},
        "test": {"loss": cost, "accuracy": 1 - cost},
        "epoch_seconds": [40.0],
    }
    seconds = 40.0 if task.depth is None else 1.0 + task.depth.steps
    key = dict(task.cell.key)
    return cells.Record(key=key, figures=figures, seconds=seconds, versions={}, date="", cpu="")


def test_single_scores_come_before_truths_and_these_before_repeats(
    problem: Problem, mask: Mask
) -> None:
    masks = [mask, replace(mask, name="other", keep=~mask.keep), replace(mask, is_near=True)]
    names = [task.cell.name for task in tasks(study_of(problem, masks, TWICE))]
    order = ("different00", "near00", "different01")
    first = [f"{name}-{steps}steps-0" for steps in (0, 50) for name in order]
    assert names[:9] == first + [f"{name}-truth-0" for name in order]
    assert names[9:] == [f"{name.removesuffix('-0')}-1" for name in names[:9]]


def test_what_is_left_is_judged_by_what_was_measured(problem: Problem, mask: Mask) -> None:
    study = study_of(problem, [mask], replace(TWICE, score_seeds=1, truth_seeds=1))
    recalibrated, trained, truth = todo = tasks(study)
    assert seconds_left(study, todo, {}) is None
    records = {recalibrated.cell.name: record_of(recalibrated, 0.5)}  # 1 s for 64 + 32 images
    steps, epoch = 3 * 50 * 64 + 96, 3 * 128
    assert seconds_left(study, todo, records) == pytest.approx((steps + epoch) / 96)
    records |= {task.cell.name: record_of(task, 0.5) for task in (trained, truth)}
    assert seconds_left(study, todo, records) == 0


def printed(records: Iterable[cells.Record]) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    shown = agreement_tables(list(records), rank_by="val_accuracy", proposals=320)
    console.print(*shown, sep="\n")
    return console.export_text()


def test_tables_hold_what_is_there(problem: Problem, mask: Mask) -> None:
    masks = [
        replace(mask, name=f"mask {i}", keep=np.roll(mask.keep, i), is_near=i > 3) for i in range(8)
    ]
    todo = tasks(study_of(problem, masks, TWICE))
    costs = {mask.name: 0.1 * number for number, mask in enumerate(masks)}
    costs_of_scores = costs | {"mask 6": 0.7, "mask 7": 0.6}  # at no steps two of eight change
    records = {
        task.cell.name: record_of(
            task, (costs_of_scores if str(task.depth) == "recalibrated" else costs)[task.mask.name]
        )
        for task in todo
    }
    lines = printed(records.values()).splitlines()
    [everywhere, near] = [line for line in lines if "│ recalibrated" in line and "[" in line]
    assert "│ 8     │ 2     │ 0.98 [" in everywhere  # 1 - 6 (1 + 1) / (8 * 63)
    assert "│ 4     │ 2     │ 0.80 [" in near  # 1 - 6 (1 + 1) / (4 * 15)
    assert sum("│ parameters left, alone" in line for line in lines) == 2
    assert sum("│ fine-tuned again" in line and "1.00 [1.00, 1.00]" in line for line in lines) == 2
    [cost] = [line for line in lines if "│ 50 steps" in line and "[" not in line]
    assert "│ 16     │ 51.00     │ 408.0 " in cost  # 320 * 51 / 40
    assert sum("│ mask 7" in line and "│ 30.00 " in line for line in lines) == 1

    few = printed(record for name, record in records.items() if name.endswith("0steps-0"))
    assert "[" not in few  # no truth, no agreement
    assert "│ 8      │ 1.00" in few


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:channel groups left whole")  # option-A shortcuts
@pytest.mark.usefixtures("local_ray")
def test_the_job_does_what_is_missing(
    problem: Problem,
    few_images: Path,
    weights: Path,
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    space = problem.tracing.space
    budget = Budget.from_cut(space, CUT)
    rng = np.random.default_rng(0)
    found = [budget.fill(rng.random(space.num_filters)) for _ in range(3)]
    search = write_search(tmp_path / "run", facts_of(found, [0.9, 0.8]), space.fingerprint(), CUT)

    trained = Trained(data=few_images, weights=weights, search_val_rows=rows, network="resnet20")
    plan = Plan(masks=4, score_seeds=1)

    def run(
        *steps: int,
        settings: SearchSettings = SETTINGS,
        searches: tuple[str, ...] = (str(search),),
    ) -> dict[str, str]:
        fidelity.main(
            trained,
            settings,
            Resources(workers=1),
            replace(plan, steps=steps),
            searches=searches,
            cells=tmp_path / "results",
        )
        files = (tmp_path / "results").glob("*.json")
        return {file.stem: file.read_text() for file in files}

    first = run(0)
    assert not any((tmp_path / "results" / "under-way").iterdir())
    assert len(first) == 2 + 4 * (2 + 1)  # compute, masks; two scores and the truth of four masks
    assert "fine-tuned again" not in capsys.readouterr().out
    second = run(0, 1)
    assert first.items() <= second.items()
    assert sorted(second.keys() - first.keys()) == [
        f"{name}-1steps-0" for name in ("different00", "different01", "near00", "near01")
    ]
    with pytest.raises(ValueError, match=r"was measured with score_images = 32, this run has 31"):
        run(0, settings=SETTINGS.changed(rescore_images=31))
    with pytest.raises(ValueError, match=r"was measured with score_images = 16, this run has 15"):
        run(0, settings=SETTINGS.changed(score_images=15))
    assert "1 steps" in capsys.readouterr().out
    assert run(0, 1, searches=()) == second  # the cells keep the masks


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_stopped_ray_job_keeps_its_scores_and_epochs_and_goes_on(
    head: Head, problem: Problem, few_images: Path, weights: Path, rows: Path, tmp_path: Path
) -> None:
    space = problem.tracing.space
    budget, rng = Budget.from_cut(space, CUT), np.random.default_rng(0)
    found = [budget.fill(rng.random(space.num_filters)) for _ in range(2)]
    search = write_search(tmp_path / "run", facts_of(found, [0.9]), space.fingerprint(), CUT)
    results = tmp_path / "results"
    flags = {
        **{"data": few_images, "network": "resnet20", "weights": weights, "search-val-rows": rows},
        **{"searches": search, "cells": results, "macs-cut": CUT, "ignore": "conv1"},
        **{"masks": 2, "steps": 0},
        **{"score-seeds": 1, "recalibrate-images": 64, "workers": 1},
        **{"dtype": "float32", "fine-tune-epochs": 20},
    }
    parts = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    curves: dict[Path, list[Any]] = {}

    def begun() -> bool:
        for path in results.glob("under-way/*/epochs.json"):
            curves[path] = json.loads(path.read_text())
        return bool(curves)

    log = stop_and_go_on(head, "jobs/experiments/fidelity.py", *parts, begun=begun)
    assert f"stopped on request: 6 cells in {results}; the same command goes on" in log
    assert "Traceback" not in log
    records = cells.read_all(results)
    assert len(records) == 2 + 2 * 2 + 2  # compute, masks; two scores and a truth of each
    [(path, known)] = list(curves.items())[:1]
    truth = records[path.parent.name.rpartition("-")[0]].figures
    seconds = [round(epoch["seconds"], 3) for epoch in known]
    assert truth["epoch_seconds"][: len(known)] == seconds  # of the job that was stopped


@pytest.mark.filterwarnings("ignore:channel groups left whole")  # option-A shortcuts
def test_what_measures_nothing_is_refused(
    few_images: Path, weights: Path, rows: Path, tmp_path: Path
) -> None:
    trained = Trained(data=few_images, weights=weights, search_val_rows=rows, network="resnet20")

    def run(settings: SearchSettings) -> None:
        fidelity.main(trained, settings, Resources(), Plan(), searches=(), cells=tmp_path)

    with pytest.raises(ValueError, match="--searches must name at least one run directory"):
        run(SETTINGS)
    with pytest.raises(ValueError, match="--fine-tune-epochs must be at least 1"):
        run(SETTINGS.changed(fine_tune=Recipe(epochs=0)))
    with pytest.raises(ValueError, match="masks must be at least 2, got 1"):
        Plan(masks=1)
    with pytest.raises(ValueError, match="steps of scores must be at least 0, got -1"):
        Plan(few_images_steps=(0, -1))
