"""Gradual pruning: between two stages the chosen network is cut out, fine-tuned and put back."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

from fppmo_ray.distribution import (
    BoolArray,
    Budget,
    Finalist,
    FloatArray,
    OptimizerSettings,
    PruningSpace,
)
from fppmo_ray.distribution.logits import uniform_priority
from fppmo_ray.pruning import extract
from fppmo_ray.pruning.extract import scatter
from fppmo_ray.service.record.artifacts import IMPORTANCE_ONLY
from fppmo_ray.service.rounds import Context, RoundWeights, freeze, put_weights
from fppmo_ray.service.training_tasks import Training
from fppmo_ray.service.weights import to_arrays
from fppmo_ray.service.whole_trainings import train_whole
from fppmo_ray.service.workers.assignments import TrainingTask
from fppmo_ray.training import state_from_bytes


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of a search with a cut of its own."""

    number: int
    settings: OptimizerSettings
    given: RoundWeights
    """The dense weights of the search, which distillation learns from."""
    first: RoundWeights
    """The dense weights that the stage begins with."""

    @property
    def ids(self) -> range:
        """Its proposals."""
        begin = self.settings.ids(self.settings.first_generation).start
        return range(begin, self.settings.num_proposals)


def tune_between(
    context: Context, stage: Stage, keep: BoolArray, weights: RoundWeights
) -> RoundWeights:
    """The dense weights of the next stage: those of the chosen network, fine-tuned, and zeros.

    Args:
        context: Of the search, its pool with nothing unfinished.
        stage: The one that has ended.
        keep: Its chosen mask.
        weights: Where fine-tuning begins.

    Raises:
        RuntimeError: training diverged.
        ValueError: the weights are not those of the journal.
    """
    settings, problem = context.settings, context.problem
    task = TrainingTask(
        name=f"stage-{stage.number}",
        keep=keep,
        recipe=replace(settings.recipe, epochs=settings.stage_epochs),
        seed=settings.seed,
    )
    training = Training(task=task, weights=weights.reference, teacher=stage.given.reference)
    states = train_whole([training], problem, context.pool, context.run)
    smaller = extract(problem.network, problem.tracing, keep)
    smaller.load_state_dict(state_from_bytes(states[task.name]).network)
    dense = copy.deepcopy(problem.network)
    scatter(smaller, dense, problem.tracing, keep)
    round_ = stage.first.round + len(stage.settings.round_starts) + 1
    tuned = put_weights(round_, to_arrays(dense), context.compute)
    freeze(tuned, context.run)
    return tuned


def in_one_shot(space: PruningSpace, importance: FloatArray, macs_cut: float) -> Finalist:
    """What the importance alone removes at once, for the comparison with gradual pruning."""
    keep = Budget.from_cut(space, macs_cut).fill(uniform_priority(space, importance))
    return Finalist(IMPORTANCE_ONLY, keep)
