"""Trials of Ray Tune: the trainable that scores a mask, configs, reports and results."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from ray import tune
from torch import nn

from fppmo_ray.distribution import Feedback, Proposal
from fppmo_ray.distribution.proposal import fault_of
from fppmo_ray.pruning import ScoreInRungs, extract
from fppmo_ray.service.image_task import ImageClassification
from fppmo_ray.service.journal.facts import pack_mask, unpack_mask
from fppmo_ray.service.problem import Problem, Task
from fppmo_ray.service.problem import build_problem as problem_of
from fppmo_ray.service.resources import Resources
from fppmo_ray.service.settings import SearchSettings
from fppmo_ray.service.worker import claim_device
from fppmo_ray.training.device import device_module

_CHECKPOINT = "score.pt"


def build_problem(
    network: nn.Module,
    task: Task,
    settings: SearchSettings,
    *,
    resources: Resources | None = None,
) -> Problem:
    """Return a problem whose search under Tune starts with equal shares of every layer.

    Under Tune nothing is calibrated, so what the settings leave open becomes the start ``uniform``
    with the importance ``fpgm``, and no refits.

    Args:
        network: The trained network; it stays unchanged.
        task: What the network is for.
        settings: What to search for, and how masks are scored.
        resources: Where scores are computed; by default on one CPU.

    Raises:
        ValueError: see ``fppmo_ray.service.problem.build_problem``.
    """
    return problem_of(network, task, settings, resources=resources, calibrates=False)


def prune_trainable(problem: Problem, rungs: tuple[int, ...]) -> type[tune.Trainable]:
    """Return the trainable that scores a problem's masks, with the resources of a worker.

    Args:
        problem: The problem, which is copied to Ray's object store once.
        rungs: Fine-tuning steps after which a trial reports, ascending, each >= 0. The last one is
            the problem's ``score_steps``, over which the learning rate falls.

    Raises:
        ValueError: the rungs do not ascend to the problem's steps, or its task is not
            ``ImageClassification``.
    """
    if not isinstance(problem.task, ImageClassification):
        raise ValueError(
            "trials of Ray Tune report scores after some steps of training on images, got a task "
            "of another kind; use fppmo_ray.search, or a trainable of your own"
        )
    if problem.demand.labels or problem.demand.accelerator_type:
        raise ValueError(
            "Ray Tune places trials by amounts of resources alone: leave accelerator_type and "
            "labels out, or use custom_resources of the nodes"
        )
    steps = problem.settings.scoring.score_steps
    if not rungs or list(rungs) != sorted({*rungs}) or rungs[0] < 0 or rungs[-1] != steps:
        raise ValueError(
            f"rungs must ascend from at least 0 to the {steps} steps of a score, got {rungs}; "
            "change the rungs or score_steps"
        )
    trainable: type[tune.Trainable] = tune.with_resources(
        tune.with_parameters(PruneTrainable, problem=problem, rungs=tuple(rungs)),
        tune.PlacementGroupFactory([problem.demand.bundle()]),
    )
    return trainable


class PruneTrainable(tune.Trainable):
    """Prunes, fine-tunes to the next rung, recalibrates and reports; see ``prune_trainable``.

    Every report has ``val_loss`` and ``val_accuracy`` on search-val, ``steps`` (of fine-tuning
    so far), ``macs`` and ``done``. The last report is the score that a worker of
    ``fppmo_ray.search`` computes, bit for bit on CPUs. Use it with ``reuse_actors=True``: an actor
    then keeps the data on its device, and frees the network of each trial before the next. With
    ``CheckpointConfig(checkpoint_frequency=1)``, trials that were paused or lost continue after
    their last rung.
    """

    def setup(  # type: ignore[override]  # tune.with_parameters gives what is keyword-only
        self, config: dict[str, Any], *, problem: Problem, rungs: tuple[int, ...]
    ) -> None:
        """Load the dense network and the images onto the device, once per actor.

        Args:
            config: Config of the first trial.
            problem: The problem.
            rungs: Fine-tuning steps after which a trial reports.
        """
        self._problem = problem
        self._rungs = rungs
        self._device = claim_device(problem)
        self._dense = copy.deepcopy(problem.network).to(self._device).eval()
        assert isinstance(problem.task, ImageClassification)  # see prune_trainable
        self._images = problem.task.open(
            problem.tracing, problem.settings, self._device, threads=problem.threads
        )
        self._images.load()
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Start another trial in this actor."""
        del self._score
        if self._device.type != "cpu":
            device_module(self._device).empty_cache()  # for the workers that share the GPU
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Train to the next rung and return the report.

        Raises:
            RuntimeError: training diverged.
        """
        rung = self._rungs[self._rungs_done]
        metrics = self._score.measure_at(rung)
        self._rungs_done += 1
        return {
            "val_loss": metrics.loss,
            "val_accuracy": metrics.accuracy,
            "steps": rung,
            "macs": self._problem.tracing.space.macs(self._keep),
            "done": self._rungs_done == len(self._rungs),
        }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write the state of the score; its ``network`` is the state dict that was measured."""
        state = {**self._score.state(), "rungs_done": self._rungs_done}
        torch.save(state, Path(checkpoint_dir) / _CHECKPOINT)

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Continue from a folder that ``save_checkpoint`` wrote."""
        state = read_score_state(Path(str(checkpoint)))
        self._score.restore(state)
        self._rungs_done = state["rungs_done"]

    def _begin(self, config: dict[str, Any]) -> None:
        problem = self._problem
        self._rungs_done = 0
        self._keep = unpack_mask(config["mask"], problem.tracing.space.num_filters)
        candidate = self._images.candidate(
            self._dense,
            self._keep,
            seed=config["score_seed"],
            split="search_val",
            compute=problem.compute,
        )
        self._score: ScoreInRungs = ScoreInRungs(candidate)


def read_score_state(folder: Path) -> dict[str, Any]:
    """Return the content of a trial's checkpoint, tensors and numbers only, on the CPU."""
    state: dict[str, Any] = torch.load(folder / _CHECKPOINT, weights_only=True, map_location="cpu")
    return state


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """A trial that has a score."""

    proposal: Proposal
    """The mask."""
    feedback: Feedback
    """The trial's last score on search-val; its ``steps`` say how far the trial got."""
    checkpoint: tune.Checkpoint | None
    """The last checkpoint; None if Tune was not asked to keep any."""


def config_of(proposal: Proposal) -> dict[str, Any]:
    """Return a proposal as a small, flat config, because Tune derives tags and names from it."""
    return {
        "id": proposal.proposal_id,
        "generation": proposal.generation,
        "macs": proposal.macs,
        "parameters": proposal.parameters,
        "mask": pack_mask(proposal.keep),
        "score_seed": list(proposal.score_seed),
    }


def proposal_of(config: Mapping[str, Any], num_filters: int) -> Proposal:
    """Return the proposal that ``config_of`` described.

    Args:
        config: Config of a trial.
        num_filters: Length of a mask.
    """
    search_seed, generation = config["score_seed"]
    return Proposal(
        proposal_id=config["id"],
        generation=config["generation"],
        keep=unpack_mask(config["mask"], num_filters),
        macs=config["macs"],
        parameters=config["parameters"],
        score_seed=(search_seed, generation),
    )


def feedback_from(proposal_id: int, result: Mapping[str, Any]) -> Feedback:
    """Return a trial's result as feedback; a failure if a figure is missing or not finite.

    Args:
        proposal_id: Proposal of the trial.
        result: Has ``val_loss``, ``val_accuracy`` and, optionally, ``steps``.
    """
    for name in ("val_loss", "val_accuracy"):
        value = result.get(name)
        if not isinstance(value, Real) or fault_of(float(value)) is not None:
            sentence = f"its trial must report {name} as a finite number, got {value}"
            return Feedback(proposal_id=proposal_id, error=sentence)
    steps = result.get("steps", 0)
    if not isinstance(steps, Integral) or steps < 0:
        sentence = f"its trial must report steps as a whole number >= 0, got {steps}"
        return Feedback(proposal_id=proposal_id, error=sentence)
    return Feedback(
        proposal_id=proposal_id,
        val_loss=float(result["val_loss"]),
        val_accuracy=float(result["val_accuracy"]),
        steps=int(steps),
    )


def ranked_trials(problem: Problem, results: tune.ResultGrid) -> list[Trial]:
    """Return the trials that have a score, best first: those with most steps, then by merit.

    The best of many scores is partly luck: it is better than the same mask's score on new images.

    Args:
        problem: Its settings say how scores are ordered.
        results: What ``Tuner.fit`` returned.
    """
    space = problem.space
    trials = [_trial(results[index], space.num_filters) for index in range(len(results))]
    scored = {item.proposal.proposal_id: item for item in trials if item is not None}
    merit = problem.settings.optimizer_settings().merit(space)
    ranked = merit.ranked(
        (item.feedback for item in scored.values()),
        lambda proposal_id: scored[proposal_id].proposal.parameters,
    )
    return [scored[feedback.proposal_id] for feedback in ranked]


def trained_network(problem: Problem, trial: Trial) -> nn.Module:
    """Return the network of a trial as its last checkpoint has it, in eval mode on the CPU.

    Args:
        problem: The problem that the trial scored a mask of.
        trial: One of ``ranked_trials``.

    Raises:
        ValueError: the trial has no checkpoint.
    """
    if trial.checkpoint is None:
        raise ValueError(
            f"the trial of proposal {trial.proposal.proposal_id} has no checkpoint; run Tune with "
            "checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=True)"
        )
    network = extract(problem.network, problem.tracing, trial.proposal.keep)
    with trial.checkpoint.as_directory() as folder:
        network.load_state_dict(read_score_state(Path(folder))["network"])
    return network.eval()


def _trial(result: tune.Result, num_filters: int) -> Trial | None:
    config, metrics = result.config or {}, result.metrics or {}
    feedback = feedback_from(config["id"], metrics)
    if result.error is not None or feedback.failed:
        return None
    proposal = proposal_of(config, num_filters)
    return Trial(proposal=proposal, feedback=feedback, checkpoint=result.checkpoint)
