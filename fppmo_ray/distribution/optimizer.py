"""Ask for masks, tell how they fared: the search, without anything that runs it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

import numpy as np

from fppmo_ray.distribution.budget import Budget, check_macs_cut
from fppmo_ray.distribution.logits import prune_prob, settle, start_logits, uniform_priority
from fppmo_ray.distribution.proposal import Feedback, Proposal, pack_mask, unpack_mask
from fppmo_ray.distribution.rules import RULES, Beliefs, RankedGeneration
from fppmo_ray.distribution.space import BoolArray, FloatArray, PruningSpace

RankBy = Literal["val_loss", "val_accuracy"]
"""The score by which proposals are ranked: the lower loss or the higher accuracy is better."""


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Everything that decides a search's trajectory, besides its feedback.

    Raises:
        ValueError: a setting is out of its range.
    """

    macs_cut: float
    """Share of the dense network's MACs to remove, in (0, 1)."""
    num_proposals: int
    """Proposals over the whole search, at least ``population_size``. Noise cools down over
    them, so a finished search cannot be extended."""
    rule: str = "layer_es"
    """A name in ``RULES``."""
    population_size: int = 16
    """Proposals per generation, at least 2; the last generation takes what is left."""
    lag: int = 1
    """Generations that may be sampled before the feedback of the one before is in, >= 0:
    generation g comes from the beliefs after the update of generation g - 1 - lag."""
    seed: int = 0
    """Of all randomness, >= 0."""
    rank_by: RankBy = "val_loss"
    """Loss tells more than accuracy on few images."""

    def __post_init__(self) -> None:
        check_macs_cut(self.macs_cut)
        if self.population_size < 2:
            raise ValueError(
                f"population_size must be at least 2, to have ranks, got {self.population_size}"
            )
        if self.num_proposals < self.population_size:
            raise ValueError(
                f"num_proposals must be at least population_size = {self.population_size}, "
                f"got {self.num_proposals}; raise it or lower population_size"
            )
        if self.rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {self.rule!r}")
        for name in ("lag", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.rank_by not in get_args(RankBy):
            raise ValueError(f"rank_by must be val_loss or val_accuracy, got {self.rank_by!r}")


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
        self._feedback: dict[int, Feedback] = {}
        self._updates = 0

    @property
    def generation(self) -> int:
        """Updates made so far, so the generation whose feedback is waited for."""
        return self._updates

    @property
    def num_generations(self) -> int:
        """Generations of the whole search."""
        return -(-self.settings.num_proposals // self.settings.population_size)

    @property
    def finished(self) -> bool:
        """Whether all feedback is in and all updates are made."""
        return self._updates == self.num_generations

    def ask(self) -> list[Proposal]:
        """The next generation, as soon as the feedback it depends on is in.

        Returns:
            Proposals with ascending ids, none over the budget; an empty list while the
            generation waits for feedback, and once all proposals are asked.
        """
        generation = len(self._layer_noise)
        origin = max(0, generation - self.settings.lag)
        if generation == self.num_generations or origin > self._updates:
            return []
        layer_noise, masks = self._sample(generation, self._beliefs[origin].keep_logits)
        self._layer_noise.append(layer_noise)
        self._masks.extend(pack_mask(keep) for keep in masks)
        self._forget_beliefs()
        return [
            Proposal(
                proposal_id=proposal_id,
                generation=generation,
                keep=keep,
                macs=self._space.macs(keep),
                score_seed=(self.settings.seed, generation),
            )
            for proposal_id, keep in zip(self._ids(generation), masks, strict=True)
        ]

    def tell(self, feedback: Feedback) -> bool:
        """Record how a proposal fared; update the beliefs once its generation is complete.

        Feedback may arrive in any order, over all generations asked for. Updates are made in
        the order of generations, so one call may make several. A generation in which fewer than
        two proposals were scored leaves the beliefs as they are.

        Returns:
            False for a duplicate, which changes nothing.

        Raises:
            ValueError: the proposal was never asked for.
            RuntimeError: every proposal of a generation failed; the search cannot go on.
        """
        proposal_id = feedback.proposal_id
        if not 0 <= proposal_id < len(self._masks):
            raise ValueError(
                f"expected feedback of one of the {len(self._masks)} proposals asked for so far, "
                f"got proposal {proposal_id}; is this the journal of another search?"
            )
        if proposal_id in self._feedback:
            return False
        self._feedback[proposal_id] = feedback
        while self._is_complete(self._updates):
            self._update()
        return True

    def prune_prob(self) -> FloatArray:
        """P(filter is removed) after the latest update, ``(num_filters,)`` in [0.02, 0.98]."""
        return prune_prob(self._beliefs[self._updates].keep_logits)

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
            for proposal_id in self._ranked(range(len(self._masks)))[:num_samples]
        ]
        distinct: dict[str, Finalist] = {}
        for candidate in candidates:
            distinct.setdefault(pack_mask(candidate.keep), candidate)
        importance_only, *found = distinct.values()
        return [*found, importance_only]

    def _sample(
        self, generation: int, keep_logits: FloatArray
    ) -> tuple[FloatArray, list[BoolArray]]:
        """Layer noise ``(population, num_groups)`` and masks of a generation.

        Sorting logit + logistic noise and filling up is Pareto sampling (Rosen 1997): masks of
        an exact size whose filters are kept with about their own probabilities.
        """
        rng = np.random.default_rng([self.settings.seed, generation])
        progress = generation / max(1, self.num_generations - 1)
        population_size = len(self._ids(generation))
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
        ids = self._ids(self._updates)
        ranked = self._ranked(ids)
        if not ranked:
            raise RuntimeError(
                f"all {len(ids)} proposals of generation {self._updates} failed; the error of "
                f"the first: {self._feedback[ids[0]].error}"
            )
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
                np.array(ranked) - self._ids(self._updates).start
            ],
        )
        moved = self._rule.update(beliefs, generation)
        return replace(moved, keep_logits=settle(self._budget, moved.keep_logits))

    def _forget_beliefs(self) -> None:
        """Drop what is neither the latest nor the origin of a generation still to be asked."""
        oldest = min(self._updates, max(0, len(self._layer_noise) - self.settings.lag))
        self._beliefs = {k: beliefs for k, beliefs in self._beliefs.items() if k >= oldest}

    def _ids(self, generation: int) -> range:
        size = self.settings.population_size
        return range(generation * size, min((generation + 1) * size, self.settings.num_proposals))

    def _is_complete(self, generation: int) -> bool:
        is_asked = generation < len(self._layer_noise)
        return is_asked and all(i in self._feedback for i in self._ids(generation))

    def _ranked(self, ids: range) -> list[int]:
        """Those that were scored, best first: by rung, within a rung by score, then by id."""
        return sorted(
            (i for i in ids if i in self._feedback and not self._feedback[i].failed),
            key=lambda i: (-self._feedback[i].rung, self._cost(self._feedback[i]), i),
        )

    def _cost(self, feedback: Feedback) -> float:
        if self.settings.rank_by == "val_loss":
            return cast(float, feedback.val_loss)
        return -cast(float, feedback.val_accuracy)

    def _mask(self, proposal_id: int) -> BoolArray:
        return unpack_mask(self._masks[proposal_id], self._space.num_filters)
