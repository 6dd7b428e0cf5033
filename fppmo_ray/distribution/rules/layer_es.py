"""An evolution strategy on whole layers, with a small step on what is left to single filters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fppmo_ray.distribution.logits import layer_mean
from fppmo_ray.distribution.rules.rule import Beliefs, RankedGeneration
from fppmo_ray.distribution.space import FloatArray


@dataclass(frozen=True, kw_only=True)
class LayerES:
    """Gaussian noise on the layers finds their widths; the filters' rest follows slowly.

    Layer parts move along the utility-weighted noise, filters along ``sum_k u_k m_k`` less its
    layer's mean. Both kinds of noise cool down over the search, linearly. The noise comes from
    trials on ResNet-20; the steps from planted optima on the spaces of ResNet-20 and -56 with 64
    and 320 proposals, where a layer step of 1 let the mode wander past what had been sampled. On
    the real ResNet-20 (57 % cut, 320 recalibrate-only scores, one seed) the mode then reads 70.6 %
    on choose-val, against 64.6 % with the first trials' steps of 1 and 0.25.
    """

    layer_step: float = 0.7
    filter_step: float = 0.5
    sigma: tuple[float, float] = (0.35, 0.15)
    """Standard deviation of the layers' noise in the first and in the last generation."""
    temperatures: tuple[float, float] = (1.0, 0.3)
    """Scale of the filters' logistic noise in the first and in the last generation, >= 0."""

    def temperature(self, progress: float) -> float:
        """Cools down, so that late generations differ in what is still open."""
        return _between(self.temperatures, progress)

    def layer_noise(
        self, rng: np.random.Generator, shape: tuple[int, int], progress: float
    ) -> FloatArray:
        """Gaussian and antithetic: the second half of a population mirrors the first."""
        population_size, num_groups = shape
        half = rng.standard_normal((-(-population_size // 2), num_groups))
        noise: FloatArray = _between(self.sigma, progress) * np.concatenate([half, -half])
        return noise[:population_size]

    def update(self, beliefs: Beliefs, generation: RankedGeneration) -> Beliefs:
        """Move layers along their noise, filters along the rest of the gradient."""
        space, utilities = generation.space, generation.utilities
        layers = self.layer_step * (utilities @ generation.layer_noise)
        gradient = utilities @ generation.keep
        rest = gradient - layer_mean(space, gradient)[space.group_of]
        move = layers[space.group_of] + self.filter_step * rest
        return Beliefs(keep_logits=beliefs.keep_logits + move)


WIDTHS = LayerES(filter_step=0.0, temperatures=(0.0, 0.0))
"""Searches the widths of layers alone: without noise and steps of their own, the filters of a layer
stay in the order of their importance, and the first of them are kept. For networks with many more
filters than proposals, where no single filter is told of often enough."""


def _between(ends: tuple[float, float], progress: float) -> float:
    first, last = ends
    return first + progress * (last - first)
