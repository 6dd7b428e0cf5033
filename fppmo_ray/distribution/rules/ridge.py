"""Ridge regression of all ranks so far: its slopes say where to go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fppmo_ray.distribution.logits import layer_mean, logit
from fppmo_ray.distribution.rules.rule import Beliefs, RankedGeneration, Ranking
from fppmo_ray.distribution.space import BoolArray, FloatArray, PruningSpace


@dataclass(frozen=True, kw_only=True)
class Ridge:
    """Moves by the slopes of a linear model of all feedback, which older feedback fades from.

    A mask is described by the logarithms of its layers' kept shares and by which filters are kept
    beyond those shares; a score by the logit of its quantile among those that may be compared.
    Every parameter learns from every score, where a rule that sees one generation at a time has
    16 to go by. The slopes are known better in direction than in size, so layers and filters move
    a given distance, each in the root mean square.

    Noise on whole layers matters to wide ones: without it, the widths of a layer of 512 filters
    hardly vary. The defaults, on which little depends, come from ``jobs/experiments/rules.py``.
    """

    layer_step: float = 0.1
    filter_step: float = 0.2
    memory: float = 0.9
    """Weight of a score relative to those of the next generation, in (0, 1]."""
    width_scale: float = 2.0
    """Standard deviation of a layer's slope over that of all its filters' slopes together."""
    penalty: float = 0.3
    """Variance of the scores' noise over that of a layer's filters' slopes."""
    sigma: float = 0.3
    """Standard deviation of the layers' noise."""
    scale: float = 0.7
    """Of the filters' logistic noise. Nothing cools down: old feedback stays of use, and the mode
    is found by the slopes, not by samples that close in on it."""

    def temperature(self, progress: float) -> float:
        """The same for the whole search."""
        return self.scale

    def layer_noise(
        self, rng: np.random.Generator, shape: tuple[int, int], progress: float
    ) -> FloatArray:
        """Gaussian, the same for the whole search."""
        noise: FloatArray = self.sigma * rng.standard_normal(shape)
        return noise

    def update(self, beliefs: Beliefs, generation: RankedGeneration) -> Beliefs:
        """Move along the slopes of the layers' widths and of the filters."""
        space = generation.space
        slopes = self._slopes(space, generation.rankings())
        layers, filters = np.split(slopes, [len(space.groups)])
        filters = filters / _root_width(space)
        filters -= layer_mean(space, filters)[space.group_of]
        move = self.layer_step * _of_unit_size(layers)[space.group_of]
        move += self.filter_step * _of_unit_size(filters)
        # The last bits depend on how many threads multiply the matrices.
        return Beliefs(keep_logits=beliefs.keep_logits + np.round(move, 9))

    def _slopes(self, space: PruningSpace, rankings: Sequence[Ranking]) -> FloatArray:
        """The regression's coefficients, ``(num_groups + num_filters,)``.

        Every ranking has a level of its own, so its features are taken from their mean. What is
        solved is the dual problem: there are fewer scores than filters.
        """
        weights: list[FloatArray] = [np.power(self.memory, ranking.age) for ranking in rankings]
        features = np.concatenate(
            [
                _centred(self._features(space, ranking.keep), weight)
                for ranking, weight in zip(rankings, weights, strict=True)
            ]
        )
        scores = np.concatenate([_quantile_logits(len(ranking.keep)) for ranking in rankings])
        noise = np.diag(self.penalty / np.concatenate(weights))
        slopes: FloatArray = np.linalg.solve(features @ features.T + noise, scores) @ features
        return slopes

    def _features(self, space: PruningSpace, keep: BoolArray) -> FloatArray:
        widths = np.add.reduceat(keep, space.offsets, axis=1, dtype=np.float64)
        share = widths / space.dense_widths
        beyond = (keep - share[:, space.group_of]) / _root_width(space)
        return np.concatenate([self.width_scale * np.log(share), beyond], axis=1)


def _root_width(space: PruningSpace) -> FloatArray:
    """By which filters are scaled: layers matter alike, however many filters they have."""
    root: FloatArray = np.sqrt(space.dense_widths)[space.group_of]
    return root


def _centred(features: FloatArray, weight: FloatArray) -> FloatArray:
    return features - np.average(features, axis=0, weights=weight)


def _quantile_logits(count: int) -> FloatArray:
    """Scores of ranks, best first: those of a logistic distribution's quantiles."""
    return logit((np.arange(count)[::-1] + 0.5) / count)


def _of_unit_size(slopes: FloatArray) -> FloatArray:
    """Scaled to a root mean square of 1, unless there is no slope at all."""
    size = np.sqrt(np.mean(slopes**2))
    return slopes / size if size > 0 else slopes
