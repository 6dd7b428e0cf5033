"""The control: what the same number of proposals finds without learning."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fppmo_ray.distribution.rules.rule import Beliefs, RankedGeneration
from fppmo_ray.distribution.space import FloatArray


@dataclass(frozen=True)
class RandomMasks:
    """Samples from the start for ever."""

    def temperature(self, progress: float) -> float:
        """Scale 1: filters are kept with about their own probabilities."""
        return 1.0

    def layer_noise(
        self, rng: np.random.Generator, shape: tuple[int, int], progress: float
    ) -> FloatArray:
        """None: all noise is the filters' own."""
        return np.zeros(shape)

    def update(self, beliefs: Beliefs, generation: RankedGeneration) -> Beliefs:
        """Learn nothing."""
        return beliefs
