"""Ask for masks, tell how they fared: the search, without anything that runs it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fppmo_ray.distribution.budgets import Budgets
from fppmo_ray.distribution.logits import prune_prob, uniform_priority
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
    macs_cut: float | None = None
    """The one it is for, of several; None in a search for a single budget."""


class MaskOptimizer:
    """The probability model of a search, as ask and tell.

    The trajectory is a function of the settings and the feedback values: not of the order in
    which feedback arrives, nor of how asking and telling take turns.

    Several budgets share one distribution; the proposals of a generation for one of them make a
    heat, and are ranked by themselves.

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
        self._budgets = Budgets.from_cuts(space, settings.macs_cuts)
        self._rule = RULES[settings.rule]
        self._beliefs = {0: self._budgets.start(importance)}
        """By the number of updates made: the latest, and those still to be sampled from."""
        self._uniform_priority = uniform_priority(space, importance)
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
            Proposals none of which is over its budget: those of a generation, with ascending ids,
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
        layer_noise, masks = self._sample(generation, self._beliefs[origin])
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
        proposals were scored leaves the beliefs as they are; so does such a heat by itself.

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
        """P(filter is removed) at the first budget, ``(num_filters,)`` in [0.02, 0.98].

        Args:
            after: So many updates, of those made since the last ``ask``; None: the latest.
        """
        return prune_prob(self._beliefs[self._updates if after is None else after].keep_logits)

    def importance_only(self) -> BoolArray:
        """The first budget's mask without feedback: every layer loses the same share."""
        return self._budgets.each[0].fill(self._uniform_priority)

    def finalists(self, num_samples: int = 3) -> list[Finalist]:
        """Masks to rescore: the best sample owes something to luck, so it is never alone.

        Args:
            num_samples: How many of a budget's best scored proposals to add, >= 0.

        Returns:
            For each budget the mode of the latest beliefs, the mode of the logits averaged over
            the last half of the search (before that: of the latest), the best samples by rung and
            score, and the importance-only mask; each mask once, the importance-only one always.
        """
        budgets = range(len(self._budgets.each))
        return [item for budget in budgets for item in self._finalists_of(budget, num_samples)]

    def _finalists_of(self, budget: int, num_samples: int) -> list[Finalist]:
        latest = self._beliefs[self._updates].keep_logits
        averaged = self._late_logits / self._num_late if self._num_late else latest
        fill, macs_cut = self._budgets.each[budget].fill, self._macs_cut(budget)
        candidates = [
            Finalist("importance-only", fill(self._uniform_priority), macs_cut),
            Finalist("mode", fill(latest), macs_cut),
            Finalist("averaged mode", fill(averaged), macs_cut),
        ]
        asked = range(len(self._layer_noise))
        ids = [i for generation in asked for i in self.settings.heats(generation)[budget]]
        candidates += [
            Finalist(f"sample {proposal_id}", self._mask(proposal_id), macs_cut)
            for proposal_id in self._standings.ranked(ids)[:num_samples]
        ]
        distinct: dict[str, Finalist] = {}
        for candidate in candidates:
            distinct.setdefault(pack_mask(candidate.keep), candidate)
        importance_only, *found = distinct.values()
        return [*found, importance_only]

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
        keep = self._mask(proposal_id)
        return Proposal(
            proposal_id=proposal_id,
            generation=generation,
            keep=keep,
            macs=self._space.macs(keep),
            score_seed=(self.settings.seed, generation),
            rung=rung,
            macs_cut=self._macs_cut(budget),
        )

    def _macs_cut(self, budget: int) -> float | None:
        """By which its proposals and finalists are told from those of others."""
        return self.settings.macs_cuts[budget] if len(self._budgets.each) > 1 else None

    def _sample(self, generation: int, beliefs: Beliefs) -> tuple[FloatArray, list[BoolArray]]:
        """Layer noise ``(population, num_groups)`` and masks of a generation."""
        return self._budgets.sample(
            self._rule,
            beliefs,
            [len(heat) for heat in self.settings.heats(generation)],
            np.random.default_rng([self.settings.seed, generation]),
            progress=generation / max(1, self.num_generations - 1),
        )

    def _update(self) -> None:
        """Let the rule learn from the oldest generation that it has not seen."""
        self._require_a_score()
        heats = [self._ranked(heat) for heat in self.settings.heats(self._updates)]
        beliefs = self._budgets.learn(self._rule, self._beliefs[self._updates], heats)
        self._updates += 1
        self._beliefs[self._updates] = beliefs
        if self._updates > self.num_generations // 2:
            self._late_logits += beliefs.keep_logits
            self._num_late += 1
        self._forget_beliefs()

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

    def _ranked(self, heat: range) -> RankedGeneration | None:
        """Those of a heat that were scored, best first; None where that makes no ranks."""
        ids = self._standings.ranked(heat)
        if len(ids) < 2:
            return None
        rows = np.array(ids) - self.settings.ids(self._updates).start
        return RankedGeneration(
            space=self._space,
            keep=np.stack([self._mask(proposal_id) for proposal_id in ids]),
            layer_noise=self._layer_noise[self._updates][rows],
        )

    def _forget_beliefs(self) -> None:
        """Drop what is neither the latest nor the origin of a generation still to be asked."""
        oldest = min(self._updates, max(0, len(self._layer_noise) - self.settings.lag))
        self._beliefs = {k: beliefs for k, beliefs in self._beliefs.items() if k >= oldest}

    def _is_complete(self, generation: int) -> bool:
        is_asked = generation < len(self._layer_noise)
        heats = self.settings.heats(generation)
        return is_asked and all(self._standings.is_over(heat) for heat in heats)

    def _mask(self, proposal_id: int) -> BoolArray:
        return unpack_mask(self._masks[proposal_id], self._space.num_filters)
