"""Population-based incremental learning, or cross-entropy: move towards the elites' mean."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fppmo_ray.distribution.logits import MARGIN, logit, sigmoid
from fppmo_ray.distribution.rules.rule import Beliefs, RankedGeneration
from fppmo_ray.distribution.space import FloatArray


@dataclass(frozen=True, kw_only=True)
class Elite:
    """The likeliest reading of the paper: p moves towards the mean mask of the best quarter.

    ``p <- (1 - step) p + step * mean(elites)`` (Baluja 1994, PBIL). The default step comes from
    trials on ResNet-20; one three times larger wandered off.
    """

    step: float = 0.15

    def temperature(self, progress: float) -> float:
        """Scale 1: filters are kept with about their own probabilities."""
        return 1.0

    def layer_noise(
        self, rng: np.random.Generator, shape: tuple[int, int], progress: float
    ) -> FloatArray:
        """None: all noise is the filters' own."""
        return np.zeros(shape)

    def update(self, beliefs: Beliefs, generation: RankedGeneration) -> Beliefs:
        """Move the keep probabilities a step towards the mean of the best quarter."""
        elites = generation.keep[: generation.num_elites].mean(axis=0)
        keep_prob = (1 - self.step) * sigmoid(beliefs.keep_logits) + self.step * elites
        return Beliefs(keep_logits=logit(np.clip(keep_prob, MARGIN, 1 - MARGIN)))
