"""Masks whose networks are timed: widths matter, which filters they are does not."""

from __future__ import annotations

import numpy as np

from fppmo_ray.distribution.products import BoolArray, FloatArray, IntArray
from fppmo_ray.distribution.space import PruningSpace

_SPREAD = 0.25


def mask_at(space: PruningSpace, level: float | FloatArray) -> BoolArray:
    """The mask whose groups lie so far between their smallest legal width and all filters.

    Args:
        space: Of the mask.
        level: In [0, 1], one for all or ``(num_groups,)``.
    """
    smallest, dense = space.min_widths, space.dense_widths
    multiples = np.array([group.multiple for group in space.groups])
    wanted = smallest + level * (dense - smallest)
    legal = np.clip(np.rint(wanted / multiples) * multiples, smallest, dense).astype(np.int64)
    widths: IntArray = np.where(wanted == dense, dense, legal)
    rank = np.arange(space.num_filters) - space.offsets[space.group_of]
    keep: BoolArray = rank < widths[space.group_of]
    return keep


def random_masks(space: PruningSpace, count: int, rng: np.random.Generator) -> list[BoolArray]:
    """Masks from nearly dense to nearly smallest, with uneven widths."""
    base = (np.arange(count) + rng.random(count)) / count
    noise = _SPREAD * rng.standard_normal((count, len(space.groups)))
    levels = np.clip(base[:, None] + noise, 0, 1)
    return [mask_at(space, level) for level in rng.permutation(levels)]
