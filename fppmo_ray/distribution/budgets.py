"""The distribution of a search, shared by all its budgets: how it is sampled and how it learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fppmo_ray.distribution.budget import Budget
from fppmo_ray.distribution.limits import Resource
from fppmo_ray.distribution.logits import logits_at_widths, project_to_budget, start_logits
from fppmo_ray.distribution.rules import Beliefs, RankedGeneration, UpdateRule
from fppmo_ray.distribution.space import BoolArray, FloatArray, IntArray, PruningSpace


@dataclass(frozen=True)
class Budgets:
    """The budgets of a search, the widest first.

    The keep-logits of two budgets differ only by a constant, the tau at which the expected costs
    meet the budget. Beliefs are stored projected to the first budget. Before any feedback they
    expect the same share of every layer there; projected to the other budgets they still do so
    within one percentage point, measured on ResNet-20.
    """

    each: tuple[Budget, ...]
    """The budgets, by ascending cut."""

    @classmethod
    def from_cuts(
        cls,
        space: PruningSpace,
        macs_cuts: Sequence[float],
        further_cuts: Mapping[Resource, float] | None = None,
    ) -> Budgets:
        """Return one budget for each share of the dense network's MACs to remove, ascending.

        Args:
            space: The channel groups that can be pruned, and what they cost.
            macs_cuts: Shares of the MACs to remove; see ``Budget.from_cut``.
            further_cuts: Shares of other resources to remove, for every budget.

        Raises:
            ValueError: a cut is out of range, or the smallest legal widths remove less.
        """
        return cls(tuple(Budget.from_cut(space, cut, further_cuts) for cut in macs_cuts))

    def start(self, importance: FloatArray, widths: IntArray | None = None) -> Beliefs:
        """Return the beliefs before any feedback.

        Args:
            importance: ``(num_filters,)``, finite and > 0.
            widths: Widths of the first budget to start at, ``(num_groups,)``; None: the same share
                of every layer.
        """
        if widths is None:
            return Beliefs(keep_logits=start_logits(self.each[0], importance))
        return Beliefs(keep_logits=logits_at_widths(self.each[0], importance, widths))

    def warm_start(self, keep_logits: FloatArray) -> Beliefs:
        """Return beliefs of another search, ``(num_filters,)``, projected to the first budget."""
        return Beliefs(keep_logits=project_to_budget(self.each[0], keep_logits))

    def projected(self, beliefs: Beliefs) -> list[Beliefs]:
        """Return the beliefs projected to every budget."""
        logits = beliefs.keep_logits
        others = [
            replace(beliefs, keep_logits=project_to_budget(budget, logits))
            for budget in self.each[1:]
        ]
        return [beliefs, *others]

    def sample_masks(
        self,
        rule: UpdateRule,
        beliefs: Beliefs,
        sizes: Sequence[int],
        rng: np.random.Generator,
        progress: float,
    ) -> tuple[FloatArray, BoolArray]:
        """Sample the masks of a generation.

        Sorting logits plus logistic noise and filling a budget in that order is Pareto sampling
        (Rosen 1997, "On sampling with probability proportional to size"): masks of an exact size
        whose filters are kept with about their own probabilities. Noise is drawn budget by budget,
        so that both masks of a rule's antithetic pair are ranked against each other.

        Args:
            rule: How masks are spread around the beliefs.
            beliefs: The beliefs, projected to the first budget.
            sizes: Number of masks for each budget.
            rng: The generator that all noise is drawn from.
            progress: Share of the search that lies behind, in [0, 1].

        Returns:
            The layer noise ``(population, num_groups)``, and the masks in the same order,
            ``(population, num_filters)``.
        """
        space = self.each[0].space
        layer_noise: list[FloatArray] = []
        masks: list[BoolArray] = []
        for budget, projected, size in zip(self.each, self.projected(beliefs), sizes, strict=True):
            noise = rule.layer_noise(rng, (size, len(space.groups)), progress)
            priorities = rng.logistic(
                scale=rule.temperature(progress), size=(size, space.num_filters)
            )
            priorities += projected.keep_logits
            priorities += noise[:, space.group_of]
            layer_noise.append(noise)
            masks.append(budget.fill_each(priorities))
        return np.concatenate(layer_noise), np.concatenate(masks)

    def learn(
        self, rule: UpdateRule, beliefs: Beliefs, ranked: Sequence[RankedGeneration | None]
    ) -> Beliefs:
        """Return the beliefs after a generation, projected to the first budget.

        The rule moves the logits once per budget, projected to that budget, since it compares that
        budget's masks with keep probabilities. The moved logits are averaged, so step sizes mean
        the same as in a search with one budget: a move on which all budgets agree keeps its length,
        and noise of a single budget is divided by their number.

        Args:
            rule: How ranks move beliefs.
            beliefs: The beliefs, projected to the first budget.
            ranked: The ranked proposals for each budget; None if fewer than two have a score.
        """
        moved = [
            rule.update(projected, generation).keep_logits
            for projected, generation in zip(self.projected(beliefs), ranked, strict=True)
            if generation is not None
        ]
        if not moved:
            return beliefs
        # The mean over some of the budgets is off by a constant, which the projection removes.
        mean: FloatArray = np.mean(moved, axis=0)
        return replace(beliefs, keep_logits=project_to_budget(self.each[0], mean))
