"""Update rules: how the ranks of a generation's proposals move the probability model.

A rule is a frozen dataclass of step sizes whose methods are pure functions. To add one, implement
``UpdateRule`` and enter an instance in ``RULES``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fppmo_ray.distribution.logits import MARGIN, layer_mean, logit, sigmoid
from fppmo_ray.distribution.space import BoolArray, FloatArray, PruningSpace


@dataclass(frozen=True, kw_only=True, eq=False)
class Beliefs:
    """The state of a search: the keep-logit of every filter."""

    keep_logits: FloatArray
    """``(num_filters,)``; the keep probability is their sigmoid."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RankedGeneration:
    """The proposals of a generation that have a score, best first.

    Rules see ranks only, never scores: any monotone change of the score leaves a search unchanged.
    """

    space: PruningSpace
    """The space of the masks."""
    keep: BoolArray
    """``(num_scored, num_filters)``, num_scored >= 2."""
    layer_noise: FloatArray
    """``(num_scored, num_groups)``, the noise on whole layers that these were sampled with."""

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
        """Return the scale of the logistic noise that is added to every keep-logit, >= 0."""
        ...

    def layer_noise(
        self, rng: np.random.Generator, shape: tuple[int, int], progress: float
    ) -> FloatArray:
        """Return the noise that is added to the keep-logits of whole layers.

        Args:
            rng: The generator to draw from.
            shape: (population, num_groups), the shape of the noise.
            progress: Share of the search that lies behind, in [0, 1].
        """
        ...

    def update(self, beliefs: Beliefs, generation: RankedGeneration) -> Beliefs:
        """Return the beliefs after a generation; the caller projects them to the budget.

        Args:
            beliefs: The beliefs before.
            generation: The generation's proposals, best first.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class LayerES:
    """An evolution strategy on whole layers, with a small step for single filters.

    Gaussian noise on the layers finds their widths; filters follow more slowly. Layers move along
    the utility-weighted noise (Rechenberg 1973; Wierstra et al. 2014, natural evolution
    strategies), filters along ``sum_k u_k m_k`` less its layer's mean. Both kinds of noise cool
    down linearly over the search. The noise comes from trials on ResNet-20; the steps from planted
    optima on the spaces of ResNet-20 and -56 with 64 and 320 proposals, where a layer step of 1 let
    the mode wander past what had been sampled. On the real ResNet-20 (57 % cut, 320
    recalibrate-only scores, one seed) the mode then reads 70.6 % on choose-val, against 64.6 % with
    the first trials' steps of 1 and 0.25.
    """

    layer_step: float = 0.7
    """Step of the layers, in units of their noise."""
    filter_step: float = 0.5
    """Step of single filters, in logits."""
    sigma: tuple[float, float] = (0.35, 0.15)
    """Standard deviation of the layers' noise in the first and in the last generation."""
    temperatures: tuple[float, float] = (1.0, 0.3)
    """Scale of the filters' logistic noise in the first and in the last generation, >= 0."""

    def temperature(self, progress: float) -> float:
        """Return a scale that cools down: late generations differ in what is still undecided."""
        return _between(self.temperatures, progress)

    def layer_noise(
        self, rng: np.random.Generator, shape: tuple[int, int], progress: float
    ) -> FloatArray:
        """Return Gaussian noise whose second half mirrors the first (antithetic sampling).

        Args:
            rng: The generator to draw from.
            shape: (population, num_groups), the shape of the noise.
            progress: Share of the search that lies behind, in [0, 1].
        """
        population_size, num_groups = shape
        half = rng.standard_normal((-(-population_size // 2), num_groups))  # ~ N(0, I)
        noise: FloatArray = _between(self.sigma, progress) * np.concatenate([half, -half])
        return noise[:population_size]

    def update(self, beliefs: Beliefs, generation: RankedGeneration) -> Beliefs:
        """Move layers along their noise, filters along the rest of the gradient.

        Args:
            beliefs: The beliefs before.
            generation: The generation's proposals, best first.
        """
        space, utilities = generation.space, generation.utilities
        # Layers: b <- b + layer_step * sum_k u_k noise_k
        layers = self.layer_step * (utilities @ generation.layer_noise)
        # Filters: delta <- delta + filter_step * (g - mean of g over the layer), g = sum_k u_k m_k
        gradient = utilities @ generation.keep
        rest = gradient - layer_mean(space, gradient)[space.group_of]
        move = layers[space.group_of] + self.filter_step * rest
        return Beliefs(keep_logits=beliefs.keep_logits + move)


@dataclass(frozen=True, kw_only=True)
class Elite:
    """The likeliest reading of the paper: p moves towards the mean mask of the best quarter.

    ``p <- (1 - step) p + step * mean(elites)`` (Baluja 1994, PBIL). The default step comes from
    trials on ResNet-20, where one three times larger diverged.
    """

    step: float = 0.15
    """Share of the way to the elites' mean, in (0, 1]."""

    def temperature(self, progress: float) -> float:
        """Return 1: filters are kept with about their own probabilities."""
        return 1.0

    def layer_noise(
        self, rng: np.random.Generator, shape: tuple[int, int], progress: float
    ) -> FloatArray:
        """Return zeros: there is no noise on whole layers.

        Args:
            rng: The generator, from which nothing is drawn.
            shape: (population, num_groups), the shape of the noise.
            progress: Share of the search that lies behind, in [0, 1].
        """
        return np.zeros(shape)

    def update(self, beliefs: Beliefs, generation: RankedGeneration) -> Beliefs:
        """Move the keep probabilities a step towards the mean of the best quarter.

        Args:
            beliefs: The beliefs before.
            generation: The generation's proposals, best first.
        """
        elites = generation.keep[: generation.num_elites].mean(axis=0)
        keep_prob = (1 - self.step) * sigmoid(beliefs.keep_logits) + self.step * elites
        return Beliefs(keep_logits=logit(np.clip(keep_prob, MARGIN, 1 - MARGIN)))


@dataclass(frozen=True)
class RandomMasks:
    """The control that never learns: it shows what the same number of random proposals finds."""

    def temperature(self, progress: float) -> float:
        """Return 1: filters are kept with about their own probabilities."""
        return 1.0

    def layer_noise(
        self, rng: np.random.Generator, shape: tuple[int, int], progress: float
    ) -> FloatArray:
        """Return zeros: there is no noise on whole layers.

        Args:
            rng: The generator, from which nothing is drawn.
            shape: (population, num_groups), the shape of the noise.
            progress: Share of the search that lies behind, in [0, 1].
        """
        return np.zeros(shape)

    def update(self, beliefs: Beliefs, generation: RankedGeneration) -> Beliefs:
        """Return the beliefs unchanged.

        Args:
            beliefs: The beliefs before.
            generation: The generation's proposals, best first.
        """
        return beliefs


WIDTHS = LayerES(filter_step=0.0, temperatures=(0.0, 0.0))
"""Searches the widths of layers alone: without noise and steps of their own, the filters of a layer
stay in the order of their importance, and the first of them are kept. For networks with many more
filters than proposals, where no single filter gets enough feedback."""

LOCAL = LayerES(sigma=(0.25, 0.1), temperatures=(0.1, 0.03))
"""Searches near its start, for a start that is good already, such as the allocation. The noise of
LayerES is for equal shares, and leads such a search astray. On ResNet-20 (160 scores, cuts of 70
and 80 %, one seed) neither other noise nor widths alone (sigma 0.15 to 0.06) found masks whose
answers diverge less."""

RULES: dict[str, UpdateRule] = {
    "layer_es": LayerES(),
    "local_es": LOCAL,
    "widths": WIDTHS,
    "elite": Elite(),
    "random": RandomMasks(),
}
"""The rules that a setting can name."""


def _between(ends: tuple[float, float], progress: float) -> float:
    first, last = ends
    return first + progress * (last - first)
