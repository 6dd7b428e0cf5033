"""Spearman's rank correlation."""

from __future__ import annotations

import numpy as np

from fppmo_ray.distribution.space import FloatArray


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
