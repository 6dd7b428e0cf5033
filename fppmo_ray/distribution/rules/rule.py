"""What every update rule answers to, and what rules learn from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fppmo_ray.distribution.space import BoolArray, FloatArray, IntArray, PruningSpace


@dataclass(frozen=True, kw_only=True, eq=False)
class Beliefs:
    """The state of a search: how firmly every filter is believed to be worth keeping."""

    keep_logits: FloatArray
    """``(num_filters,)``; the keep probability is their sigmoid."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Ranking:
    """Masks whose scores may be compared: of one round, rung and budget, best first."""

    keep: BoolArray
    """``(num_masks, num_filters)``, num_masks >= 1."""
    age: IntArray
    """``(num_masks,)``, generations since they were drawn: 0 for the one that ends now."""


LookBack = Callable[[], Sequence[Ranking]]
"""Gathers rankings when it is called, for the rules that want them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RankedGeneration:
    """The proposals of a generation that were scored, best first.

    Rules see ranks only, never scores: any monotone change of the score leaves a search as it is.
    """

    space: PruningSpace
    keep: BoolArray
    """``(num_scored, num_filters)``, num_scored >= 2."""
    layer_noise: FloatArray
    """``(num_scored, num_groups)``, the shifts of whole layers these were sampled with."""
    rankings: LookBack
    """All scores so far, those of this generation included, of all budgets."""

    @property
    def num_elites(self) -> int:
        """The size of the best (and of the worst) quarter, at least 1."""
        return max(1, len(self.keep) // 4)

    @property
    def utilities(self) -> FloatArray:
        """``(num_scored,)``: the best quarter shares +1, the worst -1, all others have 0."""
        values = np.zeros(len(self.keep))
        values[: self.num_elites] = 1 / self.num_elites
        values[-self.num_elites :] = -1 / self.num_elites
        return values


class UpdateRule(Protocol):
    """How proposals are spread around the beliefs, and how their ranks move the beliefs.

    Rules hold step sizes and no state. ``progress`` is the share of the search that lies behind
    a generation: 0 for the first, 1 for the last.
    """

    def temperature(self, progress: float) -> float:
        """Scale of the logistic noise that is added to every keep-logit, >= 0."""
        ...

    def layer_noise(
        self, rng: np.random.Generator, shape: tuple[int, int], progress: float
    ) -> FloatArray:
        """Noise added to the keep-logits of whole layers, ``shape`` = (population, num_groups)."""
        ...

    def update(self, beliefs: Beliefs, generation: RankedGeneration) -> Beliefs:
        """The beliefs after a generation; the caller shifts them back to the budget."""
        ...
