"""Several budgets that share one distribution: how it is sampled, and how it learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fppmo_ray.distribution.budget import Budget
from fppmo_ray.distribution.limits import Resource
from fppmo_ray.distribution.logits import settle, start_logits
from fppmo_ray.distribution.rules import Beliefs, RankedGeneration, UpdateRule
from fppmo_ray.distribution.space import BoolArray, FloatArray, PruningSpace


@dataclass(frozen=True)
class Budgets:
    """The budgets of a search, the widest first.

    The keep-logits of all of them differ by a constant only, the tau at which the expected costs
    meet the budget. Beliefs are kept as settled on the first; from there, the importance alone
    keeps the same share of every layer at the others too, on ResNet-20 to within one point.
    """

    each: tuple[Budget, ...]

    @classmethod
    def from_cuts(
        cls,
        space: PruningSpace,
        macs_cuts: Sequence[float],
        further_cuts: Mapping[Resource, float] | None = None,
    ) -> Budgets:
        """One budget for each share of the dense network's MACs to remove, ascending.

        Args:
            space: What can be pruned, and what it costs.
            macs_cuts: See ``Budget.from_cut``.
            further_cuts: Hold for every budget.

        Raises:
            ValueError: a cut is out of range or of reach.
        """
        return cls(tuple(Budget.from_cut(space, cut, further_cuts) for cut in macs_cuts))

    def within(self, keep: BoolArray) -> Budgets:
        """The same budgets for masks of what a mask leaves; see ``PruningSpace.within``."""
        space = self.each[0].space.within(keep)
        return Budgets(tuple(replace(budget, space=space) for budget in self.each))

    def start(self, importance: FloatArray) -> Beliefs:
        """What the importance ``(num_filters,)`` alone says; see ``start_logits``."""
        return Beliefs(keep_logits=start_logits(self.each[0], importance))

    def go_on_from(self, keep_logits: FloatArray) -> Beliefs:
        """What was believed at other budgets, ``(num_filters,)``."""
        return Beliefs(keep_logits=settle(self.each[0], keep_logits))

    def settled(self, beliefs: Beliefs) -> list[Beliefs]:
        """The beliefs at every budget."""
        logits = beliefs.keep_logits
        others = [replace(beliefs, keep_logits=settle(b, logits)) for b in self.each[1:]]
        return [beliefs, *others]

    def sample(
        self,
        rule: UpdateRule,
        beliefs: Beliefs,
        sizes: Sequence[int],
        rng: np.random.Generator,
        progress: float,
    ) -> tuple[FloatArray, list[BoolArray]]:
        """Layer noise ``(population, num_groups)`` and masks of a generation.

        Sorting logit + logistic noise and filling up is Pareto sampling (Rosen 1997): masks of
        an exact size whose filters are kept with about their own probabilities. Noise is drawn
        budget by budget, so that a rule's antithetic pairs are ranked together.

        Args:
            rule: How masks are spread around the beliefs.
            beliefs: As settled on the first budget.
            sizes: Masks for each budget.
            rng: Of all noise.
            progress: Share of the search that lies behind.
        """
        space = self.each[0].space
        layer_noise: list[FloatArray] = []
        masks: list[BoolArray] = []
        for budget, settled, size in zip(self.each, self.settled(beliefs), sizes, strict=True):
            noise = rule.layer_noise(rng, (size, len(space.groups)), progress)
            priorities = rng.logistic(
                scale=rule.temperature(progress), size=(size, space.num_filters)
            )
            priorities += settled.keep_logits
            priorities += noise[:, space.group_of]
            layer_noise.append(noise)
            masks += [budget.fill(priority) for priority in priorities]
        return np.concatenate(layer_noise), masks

    def learn(
        self, rule: UpdateRule, beliefs: Beliefs, heats: Sequence[RankedGeneration | None]
    ) -> Beliefs:
        """The beliefs after a generation.

        For each budget the rule moves the logits as they are at that budget, since it sets masks
        of that budget against keep probabilities; then the moved logits are averaged. A mean, not
        a sum, leaves the rules' step sizes what they are for a single budget: what the budgets
        agree on moves as far, the luck of each is divided by their number.

        Args:
            rule: How ranks move beliefs.
            beliefs: As settled on the first budget.
            heats: The ranked proposals for each budget; None where there are too few to rank.

        Returns:
            As settled on the first budget; the same beliefs where nothing was ranked.
        """
        moved = [
            rule.update(settled, heat).keep_logits
            for settled, heat in zip(self.settled(beliefs), heats, strict=True)
            if heat is not None
        ]
        if not moved:
            return beliefs
        # Whichever budgets are in the mean, their taus shift it by a constant: settled away.
        mean: FloatArray = np.mean(moved, axis=0)
        return replace(beliefs, keep_logits=settle(self.each[0], mean))
