"""The central actor: the probability model that proposes masks and learns from feedback."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fppmo_ray.distribution import (
    BoolArray,
    Feedback,
    Finalist,
    FloatArray,
    Inheritance,
    MaskOptimizer,
    OptimizerSettings,
    Proposal,
    PruningSpace,
)

_NUM_REHEARSED = 512  # more than an epoch of CIFAR-10 has steps


@dataclass(frozen=True, kw_only=True)
class Update:
    """The distribution after a generation's feedback."""

    generation: int
    """Generations that have made their update."""
    keep_share: tuple[float, ...]
    """Expected share of kept filters of each group."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Rehearsal:
    """Masks for the weights to be adapted to, before a generation is scored."""

    generation: int
    masks: BoolArray
    """``(num_masks, num_filters)``, of the distribution that the generation is sampled from."""


@dataclass(frozen=True, kw_only=True)
class Advance:
    """What the model answers to feedback."""

    proposals: tuple[Proposal, ...]
    """To be scored: newly asked, or by now at a deeper rung."""
    updates: tuple[Update, ...]
    rehearsals: tuple[Rehearsal, ...] = ()
    """For those generations among the proposals that begin a round."""


class ProbabilityModel:
    """Runs as a Ray actor: one per search, on the driver's node, without a GPU.

    It holds nothing that the journal does not: a fresh one that is told all feedback is the same.
    """

    def __init__(
        self,
        space: PruningSpace,
        importance: FloatArray,
        settings: OptimizerSettings,
        inherited: Inheritance | None = None,
    ) -> None:
        self._space = space
        self._rule = settings.rule
        self._round_starts = settings.round_starts
        self._optimizer = MaskOptimizer(space, importance, settings, inherited)

    def __repr__(self) -> str:
        """What the Ray dashboard shows, which reads it once."""
        return f"ProbabilityModel({self._rule}, {self._optimizer.num_generations} generations)"

    def advance(self, feedback: Sequence[Feedback]) -> Advance:
        """Take feedback in, and ask for all that it makes possible.

        Feedback waits until what it is of has been asked for, so all the feedback of a journal
        can be replayed in one call.

        Raises:
            ValueError: feedback for a proposal that is never asked for.
            RuntimeError: every proposal of a generation failed, or all at one of its rungs.
        """
        waiting = list(feedback)
        proposals: list[Proposal] = []
        updates: list[Update] = []
        rehearsals: list[Rehearsal] = []
        while True:
            next_generation = self._optimizer.num_asked
            asked = self._optimizer.ask()
            if self._optimizer.num_asked > next_generation:
                rehearsals += self._rehearsals(next_generation)
            told, waiting = waiting, []
            for item in told:
                if self._optimizer.expects(item):
                    updates += self._tell(item)
                else:
                    waiting.append(item)
            if not asked and len(waiting) == len(told):
                break
            proposals += asked
        if waiting:
            unknown = sorted({item.proposal_id for item in waiting})
            raise ValueError(f"feedback for proposals that were never asked for: {unknown}")
        return Advance(
            proposals=tuple(proposals), updates=tuple(updates), rehearsals=tuple(rehearsals)
        )

    def _rehearsals(self, generation: int) -> list[Rehearsal]:
        """Of a generation that has just been asked for."""
        if generation not in self._round_starts:
            return []
        masks = np.array(self._optimizer.rehearsal(_NUM_REHEARSED))
        return [Rehearsal(generation=generation, masks=masks)]

    def _tell(self, feedback: Feedback) -> list[Update]:
        before = self._optimizer.generation
        self._optimizer.tell(feedback)
        return [self._update(after) for after in range(before + 1, self._optimizer.generation + 1)]

    def _update(self, after: int) -> Update:
        kept = np.add.reduceat(1.0 - self._optimizer.prune_prob(after), self._space.offsets)
        return Update(
            generation=after, keep_share=tuple((kept / self._space.dense_widths).tolist())
        )

    def finalists(self) -> list[Finalist]:
        """The masks worth a second look, the importance-only one among them."""
        return self._optimizer.finalists()

    def keep_logits(self) -> FloatArray:
        """The beliefs as they are, ``(num_filters,)``, for the next stage."""
        return self._optimizer.keep_logits()
