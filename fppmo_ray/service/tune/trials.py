"""Trials of Ray Tune: configs, reports as feedback, and the ranked trials of a finished run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from ray import tune
from torch import nn

from fppmo_ray.distribution import Feedback, Proposal
from fppmo_ray.pruning import extract
from fppmo_ray.service.journal.facts import pack_mask, unpack_mask
from fppmo_ray.service.problem import Problem
from fppmo_ray.service.tune.trainable import read_score_state


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
        if not isinstance(value, Real) or not math.isfinite(value):
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
