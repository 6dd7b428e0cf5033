"""Natural gradient of independent Bernoullis, with a larger step for layers than for filters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fppmo_ray.distribution.logits import MARGIN, layer_mean, logit, sigmoid
from fppmo_ray.distribution.rules.rule import Beliefs, RankedGeneration
from fppmo_ray.distribution.space import FloatArray


@dataclass(frozen=True, kw_only=True)
class NaturalGradient:
    """``p <- p + step * sum_k u_k (m_k - p)``, split into a layer's mean and the filters' rest.

    The Fisher information of a Bernoulli cancels the variance in its score function, which
    leaves the utility-weighted masks (Ollivier et al. 2017, section 5.1); p itself cancels too,
    because utilities add up to 0. A layer's mean has one unknown where its filters have many, so
    it may move faster. The default steps come from trials on ResNet-20.
    """

    layer_step: float = 0.3
    filter_step: float = 0.08

    def temperature(self, progress: float) -> float:
        """Scale 1: filters are kept with about their own probabilities."""
        return 1.0

    def layer_noise(
        self, rng: np.random.Generator, shape: tuple[int, int], progress: float
    ) -> FloatArray:
        """None: all noise is the filters' own."""
        return np.zeros(shape)

    def update(self, beliefs: Beliefs, generation: RankedGeneration) -> Beliefs:
        """Climb the utility of the generation."""
        space = generation.space
        gradient = generation.utilities @ generation.keep
        layers = layer_mean(space, gradient)[space.group_of]
        move = self.layer_step * layers + self.filter_step * (gradient - layers)
        keep_prob = np.clip(sigmoid(beliefs.keep_logits) + move, MARGIN, 1 - MARGIN)
        return Beliefs(keep_logits=logit(keep_prob))
