"""Weight adaptation in the midst of a search: rounds of scores, each on weights of its own.

A round begins when the probability model asks for its first generation and hands over a rehearsal:
masks of the distribution as it then is. The dense weights are trained under these on a worker,
while others still score the generation before; the round's own proposals wait.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fppmo_ray.service.pool.work import Outcome
from fppmo_ray.service.probability_model import Rehearsal
from fppmo_ray.service.rounds import Context, RoundWeights, freeze, put_weights, trained_arrays
from fppmo_ray.service.scoring import Scoring
from fppmo_ray.service.training_tasks import (
    Training,
    begin,
    final_state,
    forget,
    go_on,
    is_of_training,
)
from fppmo_ray.service.workers.assignments import AdaptationTask

logger = logging.getLogger(__name__)

_DISTILLATION_WEIGHT = 0.5  # half the loss, as in the trials that adaptation comes from


class Adaptations:
    """The rounds of a stage, for its scoring loop; see ``Rounds``.

    Weights are adapted, or read from their last checkpoint, once a score needs them: a resumed
    search trains nothing whose scores are all in.

    Args:
        context: Of the search.
        first: The weights before any adaptation.
        scoring: How proposals are scored on these.
        teacher: Reference to the ``Basis`` of the dense network as it was given.
    """

    def __init__(
        self, context: Context, first: RoundWeights, scoring: Scoring, teacher: Any
    ) -> None:
        self._context = context
        self._scoring = scoring
        self._teacher = teacher
        self._rehearsals: list[Rehearsal] = []
        self._weights = {0: first}
        """By the number of adaptations behind them: those at hand."""
        self._under_way: int | None = None

    def plan(self, rehearsals: Sequence[Rehearsal]) -> None:
        """Learn which generations begin with an adaptation, in order; known ones are left out."""
        known = {rehearsal.generation for rehearsal in self._rehearsals}
        self._rehearsals += [item for item in rehearsals if item.generation not in known]

    def scoring(self, generation: int) -> Scoring | None:
        """How proposals of a generation are scored; None: not yet, their weights come first."""
        weights = self._at(sum(item.generation <= generation for item in self._rehearsals))
        if weights is None:
            return None
        return replace(self._scoring, round=weights.round, weights=weights.reference)

    def take(self, outcome: Outcome) -> bool:
        """Go on after an epoch of adaptation; False: the outcome is none.

        Raises:
            RuntimeError: the adaptation failed.
        """
        if not is_of_training(outcome.work):
            return False
        state = go_on(outcome, self._context.pool, self._context.run)
        if state is not None:
            assert self._under_way is not None  # one adaptation begins from the other
            self._take_in(self._under_way, state)
        return True

    def latest(self) -> RoundWeights:
        """The weights of the last round; waits for them, with no score unfinished."""
        while (weights := self._at(len(self._rehearsals))) is None:
            for outcome in self._context.pool.next_outcomes():
                self.take(outcome)
        return weights

    def _at(self, index: int) -> RoundWeights | None:
        """The weights after so many adaptations; None: on their way."""
        if index in self._weights or self._under_way is not None:
            return self._weights.get(index)
        task, run = self._task(index), self._context.run
        state = final_state(task.name, task.recipe.epochs, run)
        if state is None and (before := self._at(index - 1)) is not None:
            training = Training(task=task, weights=before.reference, teacher=self._teacher)
            state = begin(training, self._context.pool, run)
            self._under_way = index if state is None else None
        if state is not None:
            self._take_in(index, state)
        return self._weights.get(index)

    def _task(self, index: int) -> AdaptationTask:
        settings = self._context.settings
        recipe = replace(
            settings.recipe,
            epochs=settings.adapt_epochs,
            learning_rate=settings.adapt_learning_rate,
            distillation_weight=_DISTILLATION_WEIGHT,
        )
        round_ = self._weights[0].round + index
        return AdaptationTask(
            name=f"adaptation-{round_}",
            masks=self._rehearsals[index - 1].masks,
            recipe=recipe,
            seed=(settings.seed, round_),
        )

    def _take_in(self, index: int, state: bytes) -> None:
        """Freeze the weights of a round, which are in a checkpoint by now."""
        context = self._context
        weights = put_weights(
            self._weights[0].round + index, trained_arrays(state), context.compute
        )
        freeze(weights, context.run)
        self._weights[index] = weights
        self._under_way = None
        self._forget_past(index)

    def _forget_past(self, index: int) -> None:
        """Drop the weights whose scores must all be in for this round to have begun."""
        begins, lag = self._rehearsals[index - 1].generation, self._context.settings.lag
        for past in range(1, index):
            if self._rehearsals[past].generation <= begins - lag:  # the generation after its last
                task = self._task(past)
                forget(task.name, task.recipe.epochs, self._context.run)
                self._weights.pop(past, None)
