"""Searches that FPPMO is compared with: they spend the same number of the same scores.

A rival proposes masks in generations and receives their scores through the service's own loop
(``find_mask_with``), so journal, resume, workers and the choice among finalists are the same too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fppmo_ray.distribution import (
    BoolArray,
    Budget,
    Feedback,
    Finalist,
    FloatArray,
    OptimizerSettings,
    Proposal,
)
from fppmo_ray.distribution.logits import layer_mean
from fppmo_ray.service.journal.artifacts import IMPORTANCE_ONLY
from fppmo_ray.service.search_loop import Step
from rivals.rankings import with_random_widths

Costs = Mapping[int, float]
"""Of every proposal that was scored, by its id; lower is better."""
Draw = Callable[[range, Costs], list[BoolArray]]
"""The masks of the generation with these ids, as a function of what was scored before."""

_NUM_SAMPLES = 3  # among the finalists, as in FPPMO
_LEGR, _WIDTHS = 1, 2  # streams of random numbers


class RivalSearch:
    """Proposes the masks that a strategy draws, one generation at a time; see ``Proposer``.

    A generation is drawn after the previous one has ended, so masks are a function of seed and
    scores.

    Args:
        draw: The strategy.
        budget: The budget that all masks meet.
        settings: Number of proposals, population, seed, and how scores are ranked.
        importance_only: The importance-only mask, which is a finalist of every search.
    """

    def __init__(
        self, draw: Draw, budget: Budget, settings: OptimizerSettings, importance_only: BoolArray
    ) -> None:
        self._draw = draw
        self._budget = budget
        self._settings = settings
        self._merit = settings.merit(budget.space)
        self._importance_only = importance_only
        self._masks: list[BoolArray] = []
        self._ended: dict[int, Feedback] = {}

    def step(self, feedback: Sequence[Feedback], /) -> Step:
        """Take feedback in, and ask for every generation that it makes possible."""
        self._ended |= {item.proposal_id: item for item in feedback}
        proposals: list[Proposal] = []
        while self._may_ask():
            proposals += self._ask()
        return Step(proposals=tuple(proposals), updates=())

    def finalists(self) -> list[Finalist]:
        """Return the best samples and the importance-only mask, each mask once."""
        costs = self._costs(len(self._masks))
        candidates = {IMPORTANCE_ONLY: self._importance_only} | {
            f"sample {i}": self._masks[i] for i in sorted(costs, key=lambda i: (costs[i], i))
        }
        distinct: dict[bytes, Finalist] = {}
        for name, keep in candidates.items():
            if len(distinct) <= _NUM_SAMPLES:
                finalist = Finalist(name=name, keep=keep, parameters=self._parameters(keep))
                distinct.setdefault(keep.tobytes(), finalist)
        importance_only, *samples = distinct.values()
        return [*samples, importance_only]

    def _may_ask(self) -> bool:
        asked = len(self._masks)
        return asked < self._settings.num_proposals and all(i in self._ended for i in range(asked))

    def _ask(self) -> list[Proposal]:
        size, begin = self._settings.population_size, len(self._masks)
        ids = range(begin, min(begin + size, self._settings.num_proposals))
        masks = self._draw(ids, self._costs(begin))
        self._masks += masks
        generation = begin // size
        return [
            Proposal(
                proposal_id=proposal_id,
                generation=generation,
                keep=keep,
                macs=self._budget.space.macs(keep),
                parameters=self._parameters(keep),
                score_seed=(self._settings.seed, generation),
            )
            for proposal_id, keep in zip(ids, masks, strict=True)
        ]

    def _costs(self, end: int) -> dict[int, float]:
        """Return the costs of the proposals before ``end`` that have a score."""
        return {
            i: self._merit.cost(self._ended[i], self._parameters(self._masks[i]))
            for i in range(end)
            if i in self._ended and not self._ended[i].failed
        }

    def _parameters(self, keep: BoolArray) -> int:
        space = self._budget.space
        return space.parameters(keep) if space.tensor_sizes else 0


def random_widths(budget: Budget, importance: FloatArray, seed: int) -> Draw:
    """Return a strategy that draws random widths; the best of them wins (2205.05676).

    Args:
        budget: The budget that all masks meet.
        importance: ``(num_filters,)``; the order within layers counts.
        seed: Seed of the widths, >= 0.
    """

    def draw(ids: range, costs: Costs) -> list[BoolArray]:
        return [
            with_random_widths(budget, importance, np.random.default_rng([seed, i, _WIDTHS]))
            for i in ids
        ]

    return draw


@dataclass(frozen=True, eq=False)
class AffineRanking:
    """LeGR's two numbers per layer: filters are ranked by ``alpha * norm + kappa``."""

    alpha: FloatArray
    """``(num_groups,)``, > 0."""
    kappa: FloatArray
    """``(num_groups,)``."""

    def mask(self, budget: Budget, norms: FloatArray) -> BoolArray:
        """Return the mask with one threshold for all layers at which the budget is met.

        Args:
            budget: The budget that the mask meets.
            norms: ``(num_filters,)``.
        """
        group_of = budget.space.group_of
        return budget.fill(self.alpha[group_of] * norms + self.kappa[group_of])


class LeGR:
    """Regularised evolution of affine rankings (Chin et al. 2020, 1904.12368), as a ``Draw``.

    Population 64, tournaments of 16 and mutations of a tenth of the layers are the paper's. The
    paper evolves one child at a time; here the children of a generation have the same ancestors, so
    that workers can score them side by side.

    Args:
        budget: The budget that all masks meet.
        norms: ``(num_filters,)``: L2 norms, scaled to mean 1 in every layer, so that the evolution
            starts around a sensible ranking.
        num_scores: Scores of the whole evolution.
        seed: Seed of all random numbers, >= 0.
    """

    population = 64
    tournament = 16
    mutated_share = 0.1
    cooling = 1.25

    def __init__(self, budget: Budget, norms: FloatArray, num_scores: int, seed: int) -> None:
        self._budget, self._norms, self._seed = budget, norms, seed
        self._num_scores = num_scores
        space = budget.space
        centred = norms - layer_mean(space, norms)[space.group_of]
        self._deviation = np.sqrt(layer_mean(space, centred**2))
        # The paper's first 64 of 400; of fewer scores the same share.
        self._num_first = max(2, min(self.population, num_scores * 64 // 400))
        self._rankings: list[AffineRanking] = []

    def __call__(self, ids: range, costs: Costs) -> list[BoolArray]:
        """Return the masks of a generation: at first random rankings, then mutated winners.

        Args:
            ids: Ids of the proposals.
            costs: Costs of the proposals scored so far, by id.
        """
        for proposal_id in ids:
            rng = np.random.default_rng([self._seed, proposal_id, _LEGR])
            is_first = proposal_id < self._num_first or not costs
            self._rankings.append(
                self._first(proposal_id, rng) if is_first else self._child(proposal_id, costs, rng)
            )
        return [self._rankings[i].mask(self._budget, self._norms) for i in ids]

    def _first(self, proposal_id: int, rng: np.random.Generator) -> AffineRanking:
        num_groups = len(self._deviation)
        if proposal_id == 0:
            return AffineRanking(np.ones(num_groups), np.zeros(num_groups))
        return AffineRanking(
            np.exp(rng.standard_normal(num_groups)),
            rng.standard_normal(num_groups) * self._deviation,
        )

    def _child(self, proposal_id: int, costs: Costs, rng: np.random.Generator) -> AffineRanking:
        alive = sorted(costs)[-self._num_first :]  # the oldest die
        entrants = rng.choice(alive, self.tournament)
        winner = self._rankings[min(entrants, key=lambda i: costs[i])]
        num_groups = len(self._deviation)
        count = max(1, int(self.mutated_share * num_groups))
        is_mutated = np.isin(np.arange(num_groups), rng.choice(num_groups, count))
        step = 1 - proposal_id / (self._num_scores * self.cooling)
        scale = np.exp(step * rng.standard_normal(num_groups))
        shift = rng.standard_normal(num_groups) * self._deviation
        return AffineRanking(
            np.where(is_mutated, winner.alpha * scale, winner.alpha),
            np.where(is_mutated, winner.kappa + shift, winner.kappa),
        )
