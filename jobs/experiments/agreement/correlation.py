"""Do scores order masks as the truth does? Statistics, with intervals over masks.

Scores and truths are *costs* here: the lower, the better.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fppmo_ray.distribution import BoolArray, FloatArray, IntArray


def average_ranks(values: FloatArray) -> FloatArray:
    """Ranks from 1 along the last axis; ties share the mean of the ranks that they take."""
    one, other = values[..., :, None], values[..., None, :]
    ranks: FloatArray = (one > other).sum(-1) + ((one == other).sum(-1) + 1) / 2
    return ranks


def spearman(first: FloatArray, second: FloatArray) -> FloatArray:
    """The correlation of ranks along the last axis; nan where all values of one are equal."""
    one, other = (_centred(average_ranks(values)) for values in (first, second))
    norm = np.sqrt((one**2).sum(-1) * (other**2).sum(-1))
    with np.errstate(invalid="ignore"):
        correlation: FloatArray = (one * other).sum(-1) / norm
    return correlation


def _centred(values: FloatArray) -> FloatArray:
    centred: FloatArray = values - values.mean(-1, keepdims=True)
    return centred


Statistic = Callable[[FloatArray, FloatArray], FloatArray]
"""Of costs ``(..., masks)`` and true costs ``(..., masks)``: one number for each of the rest."""

_LEVEL = 0.95


def top_quarter_recall(costs: FloatArray, truth: FloatArray) -> FloatArray:
    """Share of the truth's best quarter that is in the costs' best quarter, along the last axis.

    A quarter of ``n`` masks is ``n // 4`` of them, at least one; ties go by index.
    """
    found = _best_quarter(costs) & _best_quarter(truth)
    recall: FloatArray = found.sum(-1) / _quarter(truth.shape[-1])
    return recall


def agreement(statistic: Statistic, costs: FloatArray, truth: FloatArray) -> float:
    """The statistic of a single score: its mean over seeds.

    Args:
        statistic: ``fppmo_ray.report.spearman`` or ``top_quarter_recall``.
        costs: ``(seeds, masks)``.
        truth: ``(masks,)``.
    """
    return float(statistic(costs, truth).mean())


def interval(
    statistic: Statistic, costs: FloatArray, truth: FloatArray, *, repeats: int = 1000
) -> tuple[float, float]:
    """The 95 % bootstrap interval of ``agreement`` over masks (percentiles of resampled masks).

    A function of its arguments: the randomness is seeded. Samples in which all masks are alike
    say nothing and are left out.
    """
    num_masks = len(truth)
    drawn: IntArray = np.random.default_rng(0).integers(num_masks, size=(repeats, num_masks))
    values = statistic(costs[:, drawn], truth[drawn]).mean(0)
    values = values[np.isfinite(values)]
    if not len(values):
        return np.nan, np.nan
    low, high = np.quantile(values, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)


def noise(costs: FloatArray) -> float:
    """Standard deviation over seeds of one mask's score; nan with a single seed.

    Args:
        costs: ``(seeds, masks)``.
    """
    if len(costs) < 2:
        return np.nan
    return float(np.sqrt(costs.var(axis=0, ddof=1).mean()))


def noise_beside_others(costs: FloatArray) -> float:
    """The same without what a seed does to all masks alike: what is left moves ranks.

    Proposals of a generation share their seed, so this is the noise that a search sees. It is the
    standard deviation of the residuals of seed and mask effects; nan with one seed or mask.
    """
    num_seeds, num_masks = costs.shape
    if num_seeds < 2 or num_masks < 2:
        return np.nan
    residuals = costs - costs.mean(axis=0)
    residuals = residuals - residuals.mean(axis=1, keepdims=True)
    return float(np.sqrt((residuals**2).sum() / ((num_seeds - 1) * (num_masks - 1))))


def _quarter(num_masks: int) -> int:
    return max(1, num_masks // 4)


def _best_quarter(costs: FloatArray) -> BoolArray:
    best = np.argsort(costs, axis=-1, kind="stable")[..., : _quarter(costs.shape[-1])]
    is_best = np.zeros(costs.shape, dtype=np.bool_)
    np.put_along_axis(is_best, best, True, axis=-1)
    return is_best
