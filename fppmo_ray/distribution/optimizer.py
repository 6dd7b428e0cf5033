"""Ask for masks, tell how they fared: the search, without anything that runs it."""

from __future__ import annotations

from functools import cache
from itertools import chain

import numpy as np

from fppmo_ray.distribution.budgets import Budgets
from fppmo_ray.distribution.capacity import capacity_factor, check_capacity_weight
from fppmo_ray.distribution.inheritance import Inheritance, among_all
from fppmo_ray.distribution.logits import prune_prob, uniform_priority
from fppmo_ray.distribution.proposal import Feedback, Finalist, Proposal, pack_mask
from fppmo_ray.distribution.proposed import Proposed
from fppmo_ray.distribution.rules import RULES, LookBack, RankedGeneration, Ranking
from fppmo_ray.distribution.settings import OptimizerSettings
from fppmo_ray.distribution.space import BoolArray, FloatArray, PruningSpace
from fppmo_ray.distribution.standings import Standings, Wanted

_REHEARSAL = 2  # seeds [seed, generation, 2]: those of generations are pairs


class MaskOptimizer:
    """The probability model of a search, as ask and tell.

    The trajectory is a function of the settings and the feedback values: not of the order in
    which feedback arrives, nor of how asking and telling take turns. Several budgets share one
    distribution; a generation's proposals for one of them, a heat, are ranked by themselves.

    Args:
        space: What can be pruned, and what it costs.
        importance: ``(num_filters,)``, finite and > 0: where the search starts.
        settings: How to search.
        inherited: From the stage before: then the importance is only that of a finalist.

    Raises:
        ValueError: a cut cannot be reached under the space's limits, the space does not tell what
            is to be cut, or the importance does not fit it.

    Example:
        >>> optimizer = MaskOptimizer(space, importance, settings)  # doctest: +SKIP
        >>> while not optimizer.finished:
        ...     for proposal in optimizer.ask():
        ...         optimizer.tell(score(proposal))
    """

    def __init__(
        self,
        space: PruningSpace,
        importance: FloatArray,
        settings: OptimizerSettings,
        inherited: Inheritance | None = None,
    ) -> None:
        self.settings = settings
        self._first = settings.first_generation
        self._budgets = Budgets.from_cuts(space, settings.macs_cuts, settings.further_cuts)
        self._is_open = np.ones(space.num_filters, dtype=bool)
        if inherited is not None:  # only what is handed out is in terms of all filters
            self._is_open = inherited.keep
            self._budgets = self._budgets.within(self._is_open)
            importance = importance[self._is_open]
            start = self._budgets.go_on_from(inherited.keep_logits[self._is_open])
        else:
            start = self._budgets.start(importance)
        self._space = space = self._budgets.each[0].space
        rule = settings.rule
        self._rule = RULES[rule] if isinstance(rule, str) else rule
        self._beliefs = {self._first: start}
        """By the number of updates made: the latest, and those still to be sampled from."""
        self._uniform_priority = uniform_priority(space, importance)
        self._late_logits = np.zeros(space.num_filters)
        """Sum over the beliefs after each of the last updates of the search."""
        self._num_late = 0
        self._proposed = Proposed(space, settings)
        self._asked: set[Wanted] = set()
        check_capacity_weight(space, settings.capacity_weight)
        self._standings = Standings(settings, self._capacity_factor)
        self._updates = self._first

    @property
    def generation(self) -> int:
        """The one whose feedback is waited for: updates made so far, from the first generation."""
        return self._updates

    @property
    def num_generations(self) -> int:
        """Generations of the whole search."""
        return self.settings.num_generations

    @property
    def num_asked(self) -> int:
        """The next generation to ask for: all before it have been."""
        return self._proposed.next_generation

    @property
    def finished(self) -> bool:
        """Whether all feedback is in and all updates are made."""
        return self._updates == self.num_generations

    def ask(self) -> list[Proposal]:
        """What is to be scored next: proposals that go on to a deeper rung, else new ones.

        Returns:
            Proposals none of which is over its budget: those of a generation, with ascending ids,
            as soon as the feedback it depends on is in; with ``rungs``, before that, those that
            the feedback so far sends on to their next rung. An empty list while all that may be
            scored has been asked for.
        """
        for generation in range(self._updates, self.num_asked):
            if promoted := self._newly_wanted(generation):
                return promoted
        generation, origin = self.num_asked, self._origin(self.num_asked)
        if generation == self.num_generations or origin > self._updates:
            return []
        sizes = [len(heat) for heat in self.settings.heats(generation)]
        layer_noise, masks = self._sample(generation, sizes)
        self._proposed.add(layer_noise, masks)
        self._forget_beliefs()
        return self._newly_wanted(generation)

    def rehearsal(self, count: int) -> list[BoolArray]:
        """Masks of the distribution that the latest generation asked for was sampled from.

        Dealt over the budgets; they are no proposals, and change nothing.
        """
        sizes = [count // len(self._budgets.each) for _ in self._budgets.each]
        _, masks = self._sample(self.num_asked - 1, sizes, _REHEARSAL)
        return [among_all(keep, self._is_open, False) for keep in masks]

    def expects(self, feedback: Feedback) -> bool:
        """Whether feedback is of what was asked for, and may be told."""
        return self._standings.key(feedback) in self._asked

    def tell(self, feedback: Feedback) -> bool:
        """Record how a proposal fared; update the beliefs once its generation is complete.

        Feedback may arrive in any order, over all that was asked for. Updates are made in the
        order of generations, so one call may make several. A generation in which fewer than two
        proposals were scored leaves the beliefs as they are; so does such a heat by itself.

        Returns:
            False for a duplicate, which changes nothing.

        Raises:
            ValueError: the proposal was never asked for, or not at this rung; its score lacks the
                accuracy that ranks.
            RuntimeError: every proposal of a generation failed, or all that went on to one of its
                rungs; the search cannot go on.
        """
        if not self.expects(feedback):
            raise ValueError(
                f"expected feedback of one of the {len(self._proposed)} proposals asked for so "
                f"far, got proposal {feedback.proposal_id} at rung {feedback.rung}; is this the "
                "journal of another search?"
            )
        self._standings.require_ranked(feedback)
        if not self._standings.add(feedback):
            return False
        while self._is_complete(self._updates):
            self._update()
        return True

    def prune_prob(self, after: int | None = None) -> FloatArray:
        """P(filter is removed) at the first budget, ``(num_filters,)`` in [0.02, 0.98] or 1.

        Args:
            after: So many updates, of those made since the last ``ask``; None: the latest.
        """
        beliefs = self._beliefs[self._updates if after is None else after]
        return among_all(prune_prob(beliefs.keep_logits), self._is_open, 1.0)

    def keep_logits(self) -> FloatArray:
        """The latest beliefs, ``(num_filters,)``; -inf where an earlier stage removed a filter."""
        return among_all(self._beliefs[self._updates].keep_logits, self._is_open, -np.inf)

    def importance_only(self) -> BoolArray:
        """The first budget's mask without feedback: every layer loses the same share."""
        return among_all(self._budgets.each[0].fill(self._uniform_priority), self._is_open, False)

    def finalists(self, num_samples: int = 3) -> list[Finalist]:
        """Masks to rescore: the best sample owes something to luck, so it is never alone.

        Args:
            num_samples: How many of a budget's best scored proposals to add, >= 0.

        Returns:
            For each budget the mode of the latest beliefs, the mode of the logits averaged over
            the last eighth of the search (before that: of the latest), the best samples by rung
            and score, and the importance-only mask; each mask once, the importance-only one always.
        """
        budgets = range(len(self._budgets.each))
        return [item for budget in budgets for item in self._finalists_of(budget, num_samples)]

    def _finalists_of(self, budget: int, num_samples: int) -> list[Finalist]:
        latest = self._beliefs[self._updates].keep_logits
        averaged = self._late_logits / self._num_late if self._num_late else latest
        fill, macs_cut = self._budgets.each[budget].fill, self._macs_cut(budget)
        candidates = {
            "importance-only": fill(self._uniform_priority),
            "mode": fill(latest),
            "averaged mode": fill(averaged),
        }
        asked = range(self._first, self.num_asked)
        ids = [i for generation in asked for i in self.settings.heats(generation)[budget]]
        best = self._standings.ranked(ids)[:num_samples]
        candidates |= {
            f"sample {proposal_id}": self._proposed.mask(proposal_id) for proposal_id in best
        }
        distinct: dict[str, Finalist] = {}
        for name, keep in candidates.items():
            finalist = Finalist(name, among_all(keep, self._is_open, False), macs_cut)
            distinct.setdefault(pack_mask(keep), finalist)
        importance_only, *found = distinct.values()
        return [*found, importance_only]

    def _capacity_factor(self, proposal_id: int) -> float:
        keep = self._proposed.mask(proposal_id)
        return capacity_factor(self._space, keep, self.settings.capacity_weight)

    def _newly_wanted(self, generation: int) -> list[Proposal]:
        """What the feedback of a generation sends to a rung, and was not asked for before."""
        proposals = []
        for budget, heat in enumerate(self.settings.heats(generation)):
            new = [item for item in self._standings.wanted(heat) if item not in self._asked]
            self._asked.update(new)
            proposals += [self._proposal(generation, budget, wanted) for wanted in new]
        return proposals

    def _proposal(self, generation: int, budget: int, wanted: Wanted) -> Proposal:
        proposal_id, rung = wanted
        keep = self._proposed.mask(proposal_id)
        return Proposal(
            proposal_id=proposal_id,
            generation=generation,
            keep=among_all(keep, self._is_open, False),
            macs=self._space.macs(keep),
            score_seed=(self.settings.seed, generation),
            rung=rung,
            macs_cut=self._macs_cut(budget),
        )

    def _macs_cut(self, budget: int) -> float | None:
        """By which its proposals and finalists are told from those of others."""
        return self.settings.macs_cuts[budget] if len(self._budgets.each) > 1 else None

    def _origin(self, generation: int) -> int:
        """After how many updates a generation is sampled."""
        return max(self._first, generation - self.settings.lag)

    def _sample(
        self, generation: int, sizes: list[int], *stream: int
    ) -> tuple[FloatArray, list[BoolArray]]:
        """Layer noise ``(population, num_groups)`` and masks, so many for each budget."""
        return self._budgets.sample(
            self._rule,
            self._beliefs[self._origin(generation)],
            sizes,
            np.random.default_rng([self.settings.seed, generation, *stream]),
            progress=self.settings.progress(generation),
        )

    def _update(self) -> None:
        """Let the rule learn from the oldest generation that it has not seen."""
        self._require_a_score()
        rankings = cache(self._rankings)  # few rules look back that far
        heats = [self._ranked(heat, rankings) for heat in self.settings.heats(self._updates)]
        beliefs = self._budgets.learn(self._rule, self._beliefs[self._updates], heats)
        self._updates += 1
        self._beliefs[self._updates] = beliefs
        if self._updates > self.num_generations - self._num_averaged:
            self._late_logits += beliefs.keep_logits
            self._num_late += 1
        self._forget_beliefs()

    @property
    def _num_averaged(self) -> int:
        """Updates that count in the averaged mode: an eighth, and at least two.

        Beliefs drift to the end: on ResNet-20 the mode of the last 5 of 40 loses 0.01 to 0.02 less
        than the last mode, that of the last 20 loses 0.03 to 0.06 more (3 searches).
        """
        return max(2, -(-(self.num_generations - self._first) // 8))

    def _require_a_score(self) -> None:
        heats = self.settings.heats(self._updates)
        failed = [self._standings.failed_together(heat) for heat in heats]
        if all(failed):
            failures = [item for of_heat in failed for item in of_heat]
            at_rung = f" at rung {failures[0].rung}" if self.settings.rungs else ""
            raise RuntimeError(
                f"all {len(failures)} proposals of generation {self._updates} failed{at_rung}; "
                f"the error of the first: {failures[0].error}"
            )

    def _rankings(self) -> tuple[Ranking, ...]:
        """All scores up to the generation that ends now, by what they may be compared with."""
        so_far = range(self._first, self._updates + 1)
        heats = zip(*(self.settings.heats(generation) for generation in so_far), strict=True)
        ranked = [self._standings.rankings(chain(*of_budget)) for of_budget in heats]
        return tuple(self._proposed.ranking(self._updates, ids) for ids in chain(*ranked))

    def _ranked(self, heat: range, rankings: LookBack) -> RankedGeneration | None:
        """Those of a heat that were scored, best first; None where that makes no ranks."""
        ids = self._standings.ranked(heat)
        return self._proposed.ranked(self._updates, ids, rankings) if len(ids) > 1 else None

    def _forget_beliefs(self) -> None:
        """Drop what no generation from the latest one asked for on is sampled from."""
        oldest = min(self._updates, self._origin(self.num_asked - 1))
        self._beliefs = {k: beliefs for k, beliefs in self._beliefs.items() if k >= oldest}

    def _is_complete(self, generation: int) -> bool:
        is_asked = generation < self.num_asked
        heats = self.settings.heats(generation)
        return is_asked and all(self._standings.is_over(heat) for heat in heats)
