"""The central actor: the probability model that proposes masks and learns from feedback."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fppmo_ray.distribution import (
    Feedback,
    Finalist,
    FloatArray,
    MaskOptimizer,
    OptimizerSettings,
    Proposal,
    PruningSpace,
)


@dataclass(frozen=True, kw_only=True)
class Update:
    """The distribution after a generation's feedback."""

    generation: int
    """Generations that have made their update."""
    keep_share: tuple[float, ...]
    """Expected share of kept filters of each group."""


@dataclass(frozen=True, kw_only=True)
class Advance:
    """What the model answers to feedback."""

    proposals: tuple[Proposal, ...]
    """Newly asked, to be scored."""
    updates: tuple[Update, ...]


class ProbabilityModel:
    """Runs as a Ray actor: one per search, on the driver's node, without a GPU.

    It holds nothing that the journal does not: a fresh one that is told all feedback is the same.
    """

    def __init__(
        self, space: PruningSpace, importance: FloatArray, settings: OptimizerSettings
    ) -> None:
        self._space = space
        self._rule = settings.rule
        self._optimizer = MaskOptimizer(space, importance, settings)
        self._num_asked = 0
        self._waiting: dict[int, Feedback] = {}
        """Feedback by proposal that the optimizer has not been told yet."""

    def __repr__(self) -> str:
        """What the Ray dashboard shows, which reads it once."""
        return f"ProbabilityModel({self._rule}, {self._optimizer.num_generations} generations)"

    def advance(self, feedback: Sequence[Feedback]) -> Advance:
        """Take feedback in, and ask for every generation that it makes possible.

        Feedback of later generations waits for them, asked or not, so all the feedback of a
        journal can be replayed in one call.

        Raises:
            ValueError: feedback for a proposal that is never asked for.
            RuntimeError: every proposal of a generation failed.
        """
        self._waiting |= {item.proposal_id: item for item in feedback}
        proposals: list[Proposal] = []
        updates: list[Update] = []
        while True:
            asked = self._optimizer.ask()
            self._num_asked += len(asked)
            proposals += asked
            ready = self._take_ready()
            if not asked and not ready:
                break
            updates += [update for item in ready if (update := self._tell(item))]
        if unknown := [i for i in self._waiting if i >= self._num_asked]:
            self._waiting = {}
            raise ValueError(f"feedback for proposals that were never asked for: {unknown}")
        return Advance(proposals=tuple(proposals), updates=tuple(updates))

    def _take_ready(self) -> list[Feedback]:
        """Feedback of the current generation, and duplicates of the ones before.

        That of later ones waits, so that every update is seen by itself.
        """
        next_generation = self._optimizer.generation + 1
        end = min(self._num_asked, next_generation * self._optimizer.settings.population_size)
        return [self._waiting.pop(i) for i in sorted(self._waiting) if i < end]

    def _tell(self, feedback: Feedback) -> Update | None:
        before = self._optimizer.generation
        self._optimizer.tell(feedback)
        if self._optimizer.generation == before:
            return None
        kept = np.add.reduceat(1.0 - self._optimizer.prune_prob(), self._space.offsets)
        return Update(
            generation=self._optimizer.generation,
            keep_share=tuple((kept / self._space.dense_widths).tolist()),
        )

    def finalists(self) -> list[Finalist]:
        """The masks worth a second look, the importance-only one among them."""
        return self._optimizer.finalists()
