"""Ask for masks, tell how they fared: the search, without anything that runs it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fppmo_ray.distribution.budget import Budget
from fppmo_ray.distribution.logits import prune_prob, settle, start_logits, uniform_priority
from fppmo_ray.distribution.proposal import Feedback, Proposal, pack_mask, unpack_mask
from fppmo_ray.distribution.rules import RULES, Beliefs, RankedGeneration
from fppmo_ray.distribution.settings import OptimizerSettings
from fppmo_ray.distribution.space import BoolArray, FloatArray, PruningSpace
from fppmo_ray.distribution.standings import Standings, Wanted


@dataclass(frozen=True, eq=False)
class Finalist:
    """A mask worth rescoring at the end of a search."""

    name: str
    """``mode``, ``averaged mode``, ``sample <id>`` or ``importance-only``."""
    keep: BoolArray
    """``(num_filters,)``, True = kept."""


class MaskOptimizer:
    """The probability model of a search, as ask and tell.

    The trajectory is a function of the settings and the feedback values: not of the order in
    which feedback arrives, nor of how asking and telling take turns.

    Args:
        space: What can be pruned, and what it costs.
        importance: ``(num_filters,)``, finite and > 0: where the search starts.
        settings: How to search.

    Raises:
        ValueError: the cut cannot be reached under the space's limits, or the importance does
            not fit the space.

    Example:
        >>> optimizer = MaskOptimizer(space, importance, settings)  # doctest: +SKIP
        >>> while not optimizer.finished:
        ...     for proposal in optimizer.ask():
        ...         optimizer.tell(score(proposal))
    """

    def __init__(
        self, space: PruningSpace, importance: FloatArray, settings: OptimizerSettings
    ) -> None:
        self.settings = settings
        self._space = space
        self._budget = Budget.from_cut(space, settings.macs_cut)
        self._rule = RULES[settings.rule]
        self._beliefs = {0: Beliefs(keep_logits=start_logits(self._budget, importance))}
        """By the number of updates made: the latest, and those still to be sampled from."""
        self._importance_only = self._budget.fill(uniform_priority(space, importance))
        self._late_logits = np.zeros(space.num_filters)
        """Sum over the beliefs after each update of the last half of the search."""
        self._num_late = 0
        self._masks: list[str] = []
        self._layer_noise: list[FloatArray] = []
        self._asked: set[Wanted] = set()
        self._standings = Standings(settings)
        self._updates = 0

    @property
    def generation(self) -> int:
        """Updates made so far, so the generation whose feedback is waited for."""
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
        """What is to be scored next: proposals that go on to a deeper rung, else new ones.

        Returns:
            Proposals none of which is over the budget: those of a generation, with ascending ids,
            as soon as the feedback it depends on is in; with ``rungs``, before that, those that
            the feedback so far sends on to their next rung. An empty list while all that may be
            scored has been asked for.
        """
        for generation in range(self._updates, len(self._layer_noise)):
            if promoted := self._newly_wanted(generation):
                return promoted
        generation = len(self._layer_noise)
        origin = max(0, generation - self.settings.lag)
        if generation == self.num_generations or origin > self._updates:
            return []
        layer_noise, masks = self._sample(generation, self._beliefs[origin].keep_logits)
        self._layer_noise.append(layer_noise)
        self._masks.extend(pack_mask(keep) for keep in masks)
        self._forget_beliefs()
        return self._newly_wanted(generation)

    def expects(self, feedback: Feedback) -> bool:
        """Whether feedback is of what was asked for, and may be told."""
        return self._standings.key(feedback) in self._asked

    def tell(self, feedback: Feedback) -> bool:
        """Record how a proposal fared; update the beliefs once its generation is complete.

        Feedback may arrive in any order, over all that was asked for. Updates are made in the
        order of generations, so one call may make several. A generation in which fewer than two
        proposals were scored leaves the beliefs as they are.

        Returns:
            False for a duplicate, which changes nothing.

        Raises:
            ValueError: the proposal was never asked for, or not at this rung.
            RuntimeError: every proposal of a generation failed, or all that went on to one of its
                rungs; the search cannot go on.
        """
        if not self.expects(feedback):
            raise ValueError(
                f"expected feedback of one of the {len(self._masks)} proposals asked for so far, "
                f"got proposal {feedback.proposal_id} at rung {feedback.rung}; is this the journal "
                "of another search?"
            )
        if not self._standings.add(feedback):
            return False
        while self._is_complete(self._updates):
            self._update()
        return True

    def prune_prob(self, after: int | None = None) -> FloatArray:
        """P(filter is removed), ``(num_filters,)`` in [0.02, 0.98].

        Args:
            after: So many updates, of those made since the last ``ask``; None: the latest.
        """
        return prune_prob(self._beliefs[self._updates if after is None else after].keep_logits)

    def importance_only(self) -> BoolArray:
        """The mask without feedback: every layer loses the same share, by importance."""
        return self._importance_only.copy()

    def finalists(self, num_samples: int = 3) -> list[Finalist]:
        """Masks to rescore: the best sample owes something to luck, so it is never alone.

        Args:
            num_samples: How many of the best scored proposals to add, >= 0.

        Returns:
            The mode of the latest beliefs, the mode of the logits averaged over the last half
            of the search (before that: of the latest), the best samples by rung and score, and
            the importance-only mask; each mask once, the importance-only one always.
        """
        latest = self._beliefs[self._updates].keep_logits
        averaged = self._late_logits / self._num_late if self._num_late else latest
        candidates = [
            Finalist("importance-only", self.importance_only()),
            Finalist("mode", self._budget.fill(latest)),
            Finalist("averaged mode", self._budget.fill(averaged)),
        ]
        candidates += [
            Finalist(f"sample {proposal_id}", self._mask(proposal_id))
            for proposal_id in self._standings.ranked(range(len(self._masks)))[:num_samples]
        ]
        distinct: dict[str, Finalist] = {}
        for candidate in candidates:
            distinct.setdefault(pack_mask(candidate.keep), candidate)
        importance_only, *found = distinct.values()
        return [*found, importance_only]

    def _newly_wanted(self, generation: int) -> list[Proposal]:
        """What the feedback of a generation sends to a rung, and was not asked for before."""
        wanted = self._standings.wanted(self.settings.ids(generation))
        new = [item for item in wanted if item not in self._asked]
        self._asked.update(new)
        return [self._proposal(generation, proposal_id, rung) for proposal_id, rung in new]

    def _proposal(self, generation: int, proposal_id: int, rung: int | None) -> Proposal:
        keep = self._mask(proposal_id)
        return Proposal(
            proposal_id=proposal_id,
            generation=generation,
            keep=keep,
            macs=self._space.macs(keep),
            score_seed=(self.settings.seed, generation),
            rung=rung,
        )

    def _sample(
        self, generation: int, keep_logits: FloatArray
    ) -> tuple[FloatArray, list[BoolArray]]:
        """Layer noise ``(population, num_groups)`` and masks of a generation.

        Sorting logit + logistic noise and filling up is Pareto sampling (Rosen 1997): masks of
        an exact size whose filters are kept with about their own probabilities.
        """
        rng = np.random.default_rng([self.settings.seed, generation])
        progress = generation / max(1, self.num_generations - 1)
        population_size = len(self.settings.ids(generation))
        layer_noise = self._rule.layer_noise(
            rng, (population_size, len(self._space.groups)), progress
        )
        priorities = rng.logistic(
            scale=self._rule.temperature(progress), size=(population_size, self._space.num_filters)
        )
        priorities += keep_logits
        priorities += layer_noise[:, self._space.group_of]
        return layer_noise, [self._budget.fill(priority) for priority in priorities]

    def _update(self) -> None:
        """Let the rule learn from the oldest generation that it has not seen."""
        ids = self.settings.ids(self._updates)
        if failures := self._standings.failed_together(ids):
            at_rung = f" at rung {failures[0].rung}" if self.settings.rungs else ""
            raise RuntimeError(
                f"all {len(failures)} proposals of generation {self._updates} failed{at_rung}; "
                f"the error of the first: {failures[0].error}"
            )
        ranked = self._standings.ranked(ids)
        beliefs = self._beliefs[self._updates]
        if len(ranked) >= 2:
            beliefs = self._learn(beliefs, ranked)
        self._updates += 1
        self._beliefs[self._updates] = beliefs
        if self._updates > self.num_generations // 2:
            self._late_logits += beliefs.keep_logits
            self._num_late += 1
        self._forget_beliefs()

    def _learn(self, beliefs: Beliefs, ranked: list[int]) -> Beliefs:
        """The beliefs after the generation of these proposals, settled on the budget."""
        generation = RankedGeneration(
            space=self._space,
            keep=np.stack([self._mask(proposal_id) for proposal_id in ranked]),
            layer_noise=self._layer_noise[self._updates][
                np.array(ranked) - self.settings.ids(self._updates).start
            ],
        )
        moved = self._rule.update(beliefs, generation)
        return replace(moved, keep_logits=settle(self._budget, moved.keep_logits))

    def _forget_beliefs(self) -> None:
        """Drop what is neither the latest nor the origin of a generation still to be asked."""
        oldest = min(self._updates, max(0, len(self._layer_noise) - self.settings.lag))
        self._beliefs = {k: beliefs for k, beliefs in self._beliefs.items() if k >= oldest}

    def _is_complete(self, generation: int) -> bool:
        is_asked = generation < len(self._layer_noise)
        return is_asked and self._standings.is_over(self.settings.ids(generation))

    def _mask(self, proposal_id: int) -> BoolArray:
        return unpack_mask(self._masks[proposal_id], self._space.num_filters)
