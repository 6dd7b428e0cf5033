"""Does a score order masks as long fine-tuning does? Statistics, with intervals over masks.

Scores and truths are *costs* here: lower is better.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fppmo_ray.distribution import BoolArray, FloatArray, IntArray


def average_ranks(values: FloatArray) -> FloatArray:
    """Return ranks from 1 along the last axis; ties share the mean of their ranks."""
    one, other = values[..., :, None], values[..., None, :]
    ranks: FloatArray = (one > other).sum(-1) + ((one == other).sum(-1) + 1) / 2
    return ranks


def spearman(first: FloatArray, second: FloatArray) -> FloatArray:
    """Return Spearman's rank correlation along the last axis.

    Args:
        first: ``(..., masks)``.
        second: ``(..., masks)``, broadcast against ``first``.

    Returns:
        ``(...)``, in [-1, 1]; nan where all values of one of the two are equal.
    """
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
    """Return the share of the truth's best quarter that is also in the costs' best quarter.

    A quarter of ``n`` masks is ``n // 4`` of them, at least one; ties go by index.

    Args:
        costs: ``(..., masks)``.
        truth: ``(..., masks)``, broadcast against ``costs``.

    Returns:
        ``(...)``, in [0, 1].
    """
    found = _best_quarter(costs) & _best_quarter(truth)
    recall: FloatArray = found.sum(-1) / _quarter(truth.shape[-1])
    return recall


def agreement(statistic: Statistic, costs: FloatArray, truth: FloatArray) -> float:
    """Return a statistic of single scores, averaged over seeds.

    Args:
        statistic: ``spearman`` or ``top_quarter_recall``.
        costs: ``(seeds, masks)``.
        truth: ``(masks,)``.
    """
    return float(statistic(costs, truth).mean())


def interval(
    statistic: Statistic, costs: FloatArray, truth: FloatArray, *, repeats: int = 1000
) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of ``agreement``: percentiles over resampled masks.

    The randomness is seeded, so the result is a function of the arguments. Samples in which the
    statistic is nan, because all masks are the same, are left out.

    Args:
        statistic: ``spearman`` or ``top_quarter_recall``.
        costs: ``(seeds, masks)``.
        truth: ``(masks,)``.
        repeats: Number of samples.
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
    """Return the standard deviation over seeds of a mask's score; nan with a single seed.

    Args:
        costs: ``(seeds, masks)``.
    """
    if len(costs) < 2:
        return np.nan
    return float(np.sqrt(costs.var(axis=0, ddof=1).mean()))


def noise_beside_others(costs: FloatArray) -> float:
    """Return the noise that reorders masks: without the part that all masks of a seed share.

    Proposals of a generation share their seed, so this is the noise that a search sees. It is the
    standard deviation of the residuals of seed and mask effects; nan with one seed or one mask.

    Args:
        costs: ``(seeds, masks)``.
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
