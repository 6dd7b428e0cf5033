"""Ask for masks, tell how they scored: the search, without anything that runs it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from fppmo_ray.distribution.budgets import Budgets
from fppmo_ray.distribution.logits import (
    check_importance,
    check_warm_start,
    prune_prob,
    uniform_priority,
)
from fppmo_ray.distribution.proposal import Feedback, Finalist, PackedMask, Proposal
from fppmo_ray.distribution.rules import RULES, RankedGeneration
from fppmo_ray.distribution.settings import OptimizerSettings
from fppmo_ray.distribution.space import BoolArray, FloatArray, PruningSpace


class MaskOptimizer:
    """The probability model of a search, with an ask / tell interface.

    The docstring of ``fppmo_ray.distribution`` shows a whole search.

    The trajectory is a function of the settings and the feedback values: not of the order in
    which feedback arrives, nor of how asking and telling take turns. Several budgets share one
    distribution; a generation's proposals for one budget are ranked among themselves.

    Args:
        space: The channel groups that can be pruned, and what they cost.
        importance: ``(num_filters,)``, finite and > 0: where the probabilities start.
        settings: How to search.
        warm_start: Keep-logits ``(num_filters,)`` of an earlier search over the same filters, to
            start from instead; the importance then only makes the importance-only mask.
        allocations: One mask ``(num_filters,)`` per budget, as ``allocation_masks`` finds them: the
            search starts at the widths of the first, and they are among the finalists. None: the
            search starts with the same share of every layer.

    Raises:
        ValueError: a cut cannot be reached under the space's limits, the space does not know the
            resource that is to be cut, or the importance or ``warm_start`` does not fit it.
    """

    def __init__(
        self,
        space: PruningSpace,
        importance: FloatArray,
        settings: OptimizerSettings,
        warm_start: FloatArray | None = None,
        allocations: Sequence[BoolArray] | None = None,
    ) -> None:
        self.settings = settings
        self.merit = settings.merit(space)
        self._space = space
        self._budgets = Budgets.from_cuts(space, settings.macs_cuts, settings.further_cuts)
        check_importance(space, importance)
        self._allocations = list(allocations or ())
        """The mask of the allocated widths, by budget."""
        self._check_allocations()
        if warm_start is None:
            widths = space.widths(self._allocations[0]) if self._allocations else None
            start = self._budgets.start(importance, widths)
        else:
            check_warm_start(space, warm_start)
            start = self._budgets.warm_start(warm_start)
        self._beliefs = {0: start}
        """By the number of updates made: the latest, and those still to be sampled from."""
        self._rule = RULES[settings.rule] if isinstance(settings.rule, str) else settings.rule
        self._uniform_priority = uniform_priority(space, importance)
        self._late_logits = np.zeros(space.num_filters)
        """Sum over the beliefs after each of the last updates of the search."""
        self._num_late = 0
        self._masks: list[PackedMask] = []
        """The masks of all proposals, by id."""
        self._parameters: list[int] = []
        """Parameters that each mask leaves."""
        self._layer_noise: dict[int, FloatArray] = {}
        """Noise ``(population, num_groups)`` of the generations that wait for feedback."""
        self._num_asked = 0
        self._feedback: dict[int, Feedback] = {}
        self._num_told: Counter[int] = Counter()
        """Proposals with feedback, by generation."""
        self._updates = 0

    @property
    def generation(self) -> int:
        """The generation whose feedback is waited for; as many updates have been made."""
        return self._updates

    @property
    def num_generations(self) -> int:
        """Generations of the whole search."""
        return self.settings.num_generations

    @property
    def finished(self) -> bool:
        """Whether all feedback is in and all updates are made."""
        return self._updates == self.num_generations

    def ask(self) -> list[Proposal]:
        """Return the proposals of the next generation, with ascending ids.

        Returns:
            Proposals none of which is over its budget. An empty list while the generation depends
            on feedback that has not been told, and when all proposals have been asked for.
        """
        generation, origin = self._num_asked, self._origin(self._num_asked)
        if generation == self.num_generations or origin > self._updates:
            return []
        ids_by_budget = self.settings.ids_by_budget(generation)
        layer_noise, masks = self._budgets.sample_masks(
            self._rule,
            self._beliefs[origin],
            [len(ids) for ids in ids_by_budget],
            np.random.default_rng([self.settings.seed, generation]),
            progress=self.settings.progress(generation),
        )
        self._layer_noise[generation] = layer_noise
        self._masks += PackedMask.of_each(masks)
        self._parameters += self._count_parameters(masks)
        all_macs, first = self._space.macs_of_masks(masks), ids_by_budget[0].start
        self._num_asked += 1
        self._forget_beliefs()
        return [
            Proposal(
                proposal_id=proposal_id,
                generation=generation,
                keep=self._masks[proposal_id],
                macs=all_macs[proposal_id - first],
                parameters=self._parameters[proposal_id],
                score_seed=(self.settings.seed, generation),
                macs_cut=self._macs_cut(budget),
            )
            for budget, ids in enumerate(ids_by_budget)
            for proposal_id in ids
        ]

    def expects(self, proposal_id: int) -> bool:
        """Return whether a proposal has been asked for, so that its feedback may be told."""
        return 0 <= proposal_id < len(self._masks)

    def tell(self, feedback: Feedback) -> bool:
        """Record a proposal's feedback; update the beliefs once its generation is complete.

        Feedback may arrive in any order, over all that was asked for. Updates are made in the
        order of generations, so one call may make several. A generation in which fewer than two
        proposals have a score leaves the beliefs unchanged.

        Args:
            feedback: Score or failure of a proposal that was asked for.

        Returns:
            False for a duplicate, which changes nothing.

        Raises:
            ValueError: the proposal was never asked for, or its score lacks the figure that ranks.
            RuntimeError: every proposal of a generation failed; the search cannot go on.
        """
        if not self.expects(feedback.proposal_id):
            raise ValueError(
                f"expected feedback of one of the {len(self._masks)} proposals asked for so "
                f"far, got proposal {feedback.proposal_id}; is this the journal of another search?"
            )
        if not feedback.failed:
            self.merit.cost(feedback, self._parameters[feedback.proposal_id])
        if feedback.proposal_id in self._feedback:
            return False
        self._feedback[feedback.proposal_id] = feedback
        self._num_told[feedback.proposal_id // self.settings.population_size] += 1
        while self._is_complete(self._updates):
            self._update()
        return True

    def prune_prob(self, after: int | None = None) -> FloatArray:
        """Return P(filter is removed) at the first budget, ``(num_filters,)`` in [0.02, 0.98].

        Args:
            after: After how many updates, among those made since the last ``ask``; None: the
                latest.
        """
        beliefs = self._beliefs[self._updates if after is None else after]
        return prune_prob(beliefs.keep_logits)

    def keep_logits(self) -> FloatArray:
        """Return the latest beliefs, ``(num_filters,)``, for another search to start from."""
        return self._beliefs[self._updates].keep_logits

    def importance_only(self) -> BoolArray:
        """Return the first budget's mask without feedback: every layer loses the same share."""
        return self._budgets.each[0].fill(self._uniform_priority)

    def finalists(self, num_samples: int = 3) -> list[Finalist]:
        """Return masks to rescore: the best sample was partly lucky, so it is never alone.

        Args:
            num_samples: How many of a budget's best scored proposals to add, >= 0.

        Returns:
            For each budget the mode of the latest beliefs, the mode of the logits averaged over
            the last eighth of the search (before that: of the latest), the best samples by merit,
            the allocation's mask and the importance-only mask; each mask once, the last two always.
            In a search without proposals, the last two alone if there is an allocation.
        """
        budgets = range(len(self._budgets.each))
        return [item for budget in budgets for item in self._finalists_of(budget, num_samples)]

    def _check_allocations(self) -> None:
        """Refuse masks to start at that are not one per budget, within it."""
        shape, expected = (self._space.num_filters,), len(self._budgets.each)
        if not self._allocations:
            return
        if len(self._allocations) != expected or any(m.shape != shape for m in self._allocations):
            raise ValueError(
                f"allocations must be {expected} masks of shape {shape}, one per budget, got "
                f"shapes {[mask.shape for mask in self._allocations]}; see allocation_masks"
            )
        for mask, budget in zip(self._allocations, self._budgets.each, strict=True):
            if not budget.is_expected(self._space.widths(mask).astype(np.float64)):
                raise ValueError(
                    "allocations must meet the budgets of this search, one does not; "
                    "allocation_masks finds such masks for the same settings"
                )

    def _finalists_of(self, budget: int, num_samples: int) -> list[Finalist]:
        latest = self._beliefs[self._updates].keep_logits
        averaged = self._late_logits / self._num_late if self._num_late else latest
        fill = self._budgets.each[budget].fill
        always = {"importance-only": fill(self._uniform_priority)}
        if self._allocations:
            always = {"allocation": self._allocations[budget]} | always
        candidates = {"mode": fill(latest), "averaged mode": fill(averaged)}
        if self._allocations and not self.settings.num_proposals:
            candidates = {}
        asked = range(self._num_asked)
        ids = [i for generation in asked for i in self.settings.ids_by_budget(generation)[budget]]
        best = self._ranked_ids(ids)[:num_samples]
        candidates |= {
            f"sample {proposal_id}": self._masks[proposal_id].keep() for proposal_id in best
        }
        seen = {keep.tobytes() for keep in always.values()}
        distinct: dict[str, BoolArray] = {}
        for name, keep in candidates.items():
            if keep.tobytes() not in seen:
                seen.add(keep.tobytes())
                distinct[name] = keep
        masks = distinct | always
        parameters = self._count_parameters(np.stack(list(masks.values())))
        return [
            Finalist(name=name, keep=keep, parameters=left, macs_cut=self._macs_cut(budget))
            for (name, keep), left in zip(masks.items(), parameters, strict=True)
        ]

    def _count_parameters(self, masks: BoolArray) -> list[int]:
        """Return the parameters that masks ``(num_masks, num_filters)`` leave; 0 if unknown."""
        known = bool(self._space.tensor_sizes)
        return self._space.parameters_of_masks(masks) if known else [0] * len(masks)

    def _macs_cut(self, budget: int) -> float | None:
        """Return the budget's macs_cut, or None when the search has only one budget."""
        return self.settings.macs_cuts[budget] if len(self._budgets.each) > 1 else None

    def _origin(self, generation: int) -> int:
        """Return the number of updates after which a generation is sampled."""
        return max(0, generation - self.settings.lag)

    def _update(self) -> None:
        """Let the rule learn from the oldest generation that it has not seen."""
        generation = self._updates
        self._require_a_score(generation)
        ranked = [self._ranked(generation, ids) for ids in self.settings.ids_by_budget(generation)]
        beliefs = self._budgets.learn(self._rule, self._beliefs[generation], ranked)
        del self._layer_noise[generation]
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
        return max(2, -(-self.num_generations // 8))

    def _require_a_score(self, generation: int) -> None:
        feedback = [self._feedback[proposal_id] for proposal_id in self.settings.ids(generation)]
        if all(item.failed for item in feedback):
            raise RuntimeError(
                f"all {len(feedback)} proposals of generation {generation} failed; "
                f"the error of the first: {feedback[0].error}"
            )

    def _ranked(self, generation: int, ids: range) -> RankedGeneration | None:
        """Return a budget's scored proposals, best first; None where that makes no ranks."""
        ranked = self._ranked_ids(ids)
        if len(ranked) < 2:
            return None
        rows = np.array(ranked) - self.settings.ids(generation).start
        return RankedGeneration(
            space=self._space,
            keep=np.stack([self._masks[proposal_id].keep() for proposal_id in ranked]),
            layer_noise=self._layer_noise[generation][rows],
        )

    def _ranked_ids(self, ids: range | list[int]) -> list[int]:
        """Return the ids that have a score, best first."""
        feedback = [self._feedback[i] for i in ids if i in self._feedback]
        ranked = self.merit.ranked(feedback, self._parameters.__getitem__)
        return [item.proposal_id for item in ranked]

    def _forget_beliefs(self) -> None:
        """Discard beliefs that no future generation will be sampled from."""
        oldest = min(self._updates, self._origin(self._num_asked - 1))
        self._beliefs = {k: beliefs for k, beliefs in self._beliefs.items() if k >= oldest}

    def _is_complete(self, generation: int) -> bool:
        is_asked = generation < self._num_asked
        return is_asked and self._num_told[generation] == len(self.settings.ids(generation))
