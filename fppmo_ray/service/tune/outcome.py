"""What a Tune run leaves: its trials in order of merit, and the network of one of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ray import tune
from torch import nn

from fppmo_ray.distribution import BoolArray, unpack_mask
from fppmo_ray.distribution.capacity import capacity_factor
from fppmo_ray.pruning import extract
from fppmo_ray.service.problem import Problem
from fppmo_ray.service.settings import SearchSettings
from fppmo_ray.service.tune.reports import feedback_from
from fppmo_ray.service.tune.trainable import read_score_state


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredTrial:
    """A proposal, how far its trial got, and its last score on search-val."""

    id: int
    generation: int
    keep: BoolArray
    """``(num_filters,)``, True = kept."""
    macs: int
    rung: int
    """Fine-tuning steps inside the score."""
    val_loss: float
    val_accuracy: float
    checkpoint: tune.Checkpoint | None
    """The last one, where Tune was told to keep any."""


def ranked_trials(
    problem: Problem, results: tune.ResultGrid, settings: SearchSettings
) -> list[ScoredTrial]:
    """The trials that were scored, best first: those that got furthest, then by their score.

    The first of many owes something to luck: its score is better than it would be on new images.
    """
    space = problem.tracing.space
    num_filters = space.num_filters
    trials = (_scored(results[index], num_filters) for index in range(len(results)))

    def cost(trial: ScoredTrial) -> float:
        if settings.rank_by == "val_accuracy":
            return -trial.val_accuracy
        return trial.val_loss * capacity_factor(space, trial.keep, settings.capacity_weight)

    return sorted(
        (trial for trial in trials if trial is not None),
        key=lambda trial: (-trial.rung, cost(trial), trial.id),
    )


def _scored(result: tune.Result, num_filters: int) -> ScoredTrial | None:
    config, metrics = result.config or {}, result.metrics or {}
    feedback = feedback_from(config["id"], metrics)
    if result.error is not None or feedback.val_loss is None or feedback.val_accuracy is None:
        return None
    return ScoredTrial(
        id=config["id"],
        generation=config["generation"],
        keep=unpack_mask(config["mask"], num_filters),
        macs=config["macs"],
        rung=feedback.rung,
        val_loss=feedback.val_loss,
        val_accuracy=feedback.val_accuracy,
        checkpoint=result.checkpoint,
    )


def trained_network(problem: Problem, trial: ScoredTrial) -> nn.Module:
    """The network of a trial as its last checkpoint measured it, in eval mode on the CPU.

    Raises:
        ValueError: the trial has no checkpoint.
    """
    if trial.checkpoint is None:
        raise ValueError(
            f"the trial of proposal {trial.id} has no checkpoint; run Tune with "
            "checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=True)"
        )
    network = extract(problem.network, problem.tracing, trial.keep)
    with trial.checkpoint.as_directory() as folder:
        network.load_state_dict(read_score_state(Path(folder))["network"])
    return network.eval()
