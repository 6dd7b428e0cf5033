"""Gradual pruning: what one stage of a search leaves to the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fppmo_ray.distribution.space import BoolArray, FloatArray

_Kind = TypeVar("_Kind", bound=np.generic)


@dataclass(frozen=True, kw_only=True, eq=False)
class Inheritance:
    """What a stage of a search takes over from the one before."""

    keep: BoolArray
    """The mask within which all of its masks lie, ``(num_filters,)``, True = kept."""
    keep_logits: FloatArray
    """Where its beliefs begin, ``(num_filters,)``; those of filters that are gone do not count."""


def among_all(values: NDArray[_Kind], is_open: BoolArray, gone: Any) -> NDArray[_Kind]:
    """Values of the open filters at their places among all, ``(num_filters,)``.

    Args:
        values: One per open filter, in order.
        is_open: ``(num_filters,)``.
        gone: The value of all others.
    """
    whole: NDArray[_Kind] = np.full(len(is_open), gone, dtype=values.dtype)
    whole[is_open] = values
    return whole
