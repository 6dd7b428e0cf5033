"""The trainable as Tune drives it, hook by hook, and under Tune beside the service."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ray import tune
from torch import nn

from fppmo_ray import (
    Calibration,
    FunctionTask,
    Numerics,
    Recipe,
    Resources,
    Sampler,
    Scoring,
    SearchSettings,
    extract,
    load_dataset,
    run_search,
)
from fppmo_ray.distribution import Feedback, Proposal
from fppmo_ray.pruning import Candidate, score
from fppmo_ray.pruning.score import Fidelity
from fppmo_ray.service.image_task import ImagesOnWorker
from fppmo_ray.service.journal.facts import latest_feedback, pack_mask, unpack_mask
from fppmo_ray.service.journal.run_directory import read_journal
from fppmo_ray.service.tune import (
    FPPMOSearch,
    Problem,
    PruneTrainable,
    build_problem,
    image_classification,
    prune_trainable,
    ranked_trials,
    trained_network,
)
from fppmo_ray.service.tune.trials import read_score_state
from fppmo_ray.training import Images, build_network, evaluate

RUNGS = (0, 2, 4)
NETWORK = build_network("digits_cnn", 10)
DATASET = load_dataset("digits")
SETTINGS = SearchSettings(
    macs_cut=0.5,
    proposals=6,
    fine_tune=Recipe(epochs=0, batch_size=64),
    sampler=Sampler(population=2, start="uniform", importance="fpgm"),
    calibration=Calibration(refit=False),
    scoring=Scoring(
        score_by="labels",
        score_steps=4,
        recalibrate_images=200,
        score_recalibrate_images=200,
        score_images=200,
        rescore_seeds=1,
    ),
    numerics=Numerics(dtype="float32"),
)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The trainable sets the threads of its process, which here is the test's."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return build_problem(NETWORK, image_classification(DATASET), SETTINGS)


def images(problem: Problem, split: str) -> Images:
    opened = problem.task.open(problem.tracing, problem.settings, CPU, threads=problem.threads)
    assert isinstance(opened, ImagesOnWorker)
    return opened.images(split)


@pytest.fixture(scope="module")
def configs(problem: Problem) -> list[dict[str, Any]]:
    searcher = FPPMOSearch.for_problem(problem, RUNGS)
    configs = [searcher.suggest(f"t{number}") for number in range(4)]
    return [config for config in configs if isinstance(config, dict)]


def begun(problem: Problem, config: dict[str, Any]) -> PruneTrainable:
    """A trainable without the log folder that Tune's constructor would make at home."""
    trainable = PruneTrainable.__new__(PruneTrainable)
    trainable.setup(config, problem=problem, rungs=RUNGS)
    return trainable


def reports(trainable: PruneTrainable, count: int = len(RUNGS)) -> list[dict[str, Any]]:
    return [trainable.step() for _ in range(count)]


def test_every_rung_is_reported_and_the_last_one_is_the_services_score(
    problem: Problem, configs: list[dict[str, Any]]
) -> None:
    found = reports(begun(problem, configs[0]))
    keep = unpack_mask(configs[0]["mask"], problem.tracing.space.num_filters)
    candidate = Candidate(
        dense=problem.network.eval(),
        tracing=problem.tracing,
        keep=keep,
        search_train=images(problem, "search_train"),
        held_out=images(problem, "search_val"),
        fidelity=Fidelity(steps=4, recalibrate_images=200, score_images=200),
        recipe=SETTINGS.fine_tune,
        seed=(0, 0),
    )
    at_once = score(candidate)
    assert [report["steps"] for report in found] == [0, 2, 4]
    assert [report["done"] for report in found] == [False, False, True]
    assert {report["macs"] for report in found} == {configs[0]["macs"]}
    last = found[-1]
    assert (last["val_loss"], last["val_accuracy"]) == (at_once.val_loss, at_once.val_accuracy)


def test_a_reused_actor_scores_as_a_fresh_one_and_keeps_nothing_of_the_last_network(
    problem: Problem, configs: list[dict[str, Any]]
) -> None:
    reused = begun(problem, configs[1])
    reports(reused, 2)
    gone = weakref.ref(reused._score.network)
    assert reused.reset_config(configs[2])
    assert gone() is None
    assert reports(reused) == reports(begun(problem, configs[2]))


@pytest.mark.gpu
def test_a_reused_actor_returns_the_gpus_memory(configs: list[dict[str, Any]]) -> None:
    gpu = Resources(gpus=1.0)
    problem = build_problem(NETWORK, image_classification(DATASET), SETTINGS, resources=gpu)
    trainable = begun(problem, configs[0])
    held = []
    for config in [*configs, *configs]:
        reports(trainable)
        trainable.reset_config(config)
        held.append(torch.cuda.memory_allocated())
    networks = sum(p.numel() * p.element_size() for p in trainable._score.network.parameters())
    assert max(held) - min(held) < networks


def test_a_paused_trial_goes_on_elsewhere_to_the_same_score(
    problem: Problem, configs: list[dict[str, Any]], tmp_path: Path
) -> None:
    straight = reports(begun(problem, configs[3]))
    paused = begun(problem, configs[3])
    reports(paused, 2)
    paused.save_checkpoint(str(tmp_path))
    resumed = begun(problem, configs[3])
    resumed.load_checkpoint(str(tmp_path))
    assert reports(resumed, 1) == straight[2:]


def test_a_checkpoint_holds_the_network_that_was_measured(
    problem: Problem, configs: list[dict[str, Any]], tmp_path: Path
) -> None:
    whole = replace(problem, settings=SETTINGS.changed(score_images=10_000))
    trainable = begun(whole, configs[0])
    last = reports(trainable)[-1]
    trainable.save_checkpoint(str(tmp_path))
    keep = unpack_mask(configs[0]["mask"], problem.tracing.space.num_filters)
    network = extract(problem.network, problem.tracing, keep)
    network.load_state_dict(read_score_state(tmp_path)["network"])
    metrics = evaluate(network, images(problem, "search_val").batches(250))
    assert metrics.accuracy == last["val_accuracy"]
    assert metrics.loss == pytest.approx(last["val_loss"], rel=1e-5)


@pytest.mark.parametrize("rungs", [(), (0, 2), (4, 2), (0, 2, 2, 4), (-1, 4), (0, 8)])
def test_rungs_that_do_not_ascend_to_the_score_are_refused(
    problem: Problem, rungs: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="rungs must ascend from at least 0 to the 4 steps of a"):
        prune_trainable(problem, rungs)


def test_a_problem_of_functions_is_refused() -> None:
    example = torch.zeros(1, 1, 8, 8)
    task = FunctionTask(example_inputs=example, score=lambda network, seed: 0.0)
    problem = build_problem(NETWORK, task, SearchSettings(macs_cut=0.5))
    with pytest.raises(ValueError, match=r"got a task of another kind; use fppmo_ray\.search"):
        prune_trainable(problem, (0,))


@pytest.mark.usefixtures("local_ray")
def test_without_early_stopping_the_trajectory_is_the_services_to_the_bit(
    problem: Problem, tmp_path: Path
) -> None:
    run_dir = tmp_path / "service"
    run_search(NETWORK, DATASET, SETTINGS, run_dir=run_dir, resources=Resources(workers=1))
    facts = read_journal(run_dir)
    feedback = latest_feedback(facts)
    services = {
        fact.proposal_id: described(fact, feedback[fact.proposal_id])
        for fact in facts
        if isinstance(fact, Proposal)
    }
    tuner = tune.Tuner(
        prune_trainable(problem, RUNGS),
        tune_config=tune.TuneConfig(
            search_alg=FPPMOSearch.for_problem(problem, RUNGS),
            max_concurrent_trials=1,
            num_samples=-1,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(name="tune", storage_path=str(tmp_path), verbose=0),
    )
    ranked = ranked_trials(problem, tuner.fit())
    tunes = {
        trial.proposal.proposal_id: described(trial.proposal, trial.feedback) for trial in ranked
    }
    assert tunes == services
    assert len(tunes) == SETTINGS.proposals
    dense = problem.space.dense_parameters
    weighed = [
        trial.feedback.val_loss * dense / trial.proposal.parameters  # type: ignore[operator]
        for trial in ranked
    ]
    assert weighed == sorted(weighed)
    widths = [m.out_channels for m in trained_network(problem, ranked[0]).modules() if is_conv(m)]
    assert widths == problem.space.widths(ranked[0].proposal.keep).tolist()
    with pytest.raises(ValueError, match=r"has no checkpoint; run Tune with .*checkpoint_at_end"):
        trained_network(problem, replace(ranked[0], checkpoint=None))


def described(proposal: Proposal, feedback: Feedback) -> tuple[Any, ...]:
    figures = feedback.val_loss, feedback.val_accuracy, feedback.steps
    return pack_mask(proposal.keep), proposal.macs, proposal.parameters, *figures


def is_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d)
