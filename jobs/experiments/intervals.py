"""Paired differences over seeds, with Student's interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Two-sided 95 % quantiles of Student's t for 1 to 12 degrees of freedom.
_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Mean of paired differences, with the interval of its true value."""

    mean: float
    half_width: float | None
    """Half width of the 95 % interval; None for a single pair."""
    num_pairs: int

    def __str__(self) -> str:
        if self.half_width is None:
            return f"{self.mean:+.2f} (n = {self.num_pairs})"
        low, high = self.mean - self.half_width, self.mean + self.half_width
        return f"{self.mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def paired_difference(values: Sequence[float], others: Sequence[float]) -> PairedDifference:
    """Return the mean of ``values - others``, pair by pair, with a 95 % t interval.

    Args:
        values: One value per pair.
        others: The other value of each pair.

    Raises:
        ValueError: there is no pair, or the numbers of values differ.
    """
    if len(values) != len(others) or not values:
        raise ValueError(f"expected pairs of values, got {len(values)} and {len(others)}")
    differences = [value - other for value, other in zip(values, others, strict=True)]
    count = len(differences)
    half_width = None
    if count > 1:
        half_width = t_95(count - 1) * statistics.stdev(differences) / math.sqrt(count)
    return PairedDifference(
        mean=statistics.fmean(differences), half_width=half_width, num_pairs=count
    )


def t_95(degrees: int) -> float:
    """Return the two-sided 95 % quantile of Student's t, exact to three digits.

    Beyond the table it is Cornish and Fisher's expansion around the normal distribution's.

    Args:
        degrees: Degrees of freedom, >= 1.
    """
    if degrees <= len(_T_95):
        return _T_95[degrees - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / (4 * degrees)
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    return z + first + second + third


def spread(values: Sequence[float]) -> str:
    """Return mean ± standard deviation as text; a single value has no spread."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"


def difference_to(values: Mapping[int, float], others: Mapping[int, float]) -> str:
    """Return the paired difference over the seeds of both as text; empty if they share none.

    Args:
        values: What was measured, by seed.
        others: What it is compared with, by seed.
    """
    seeds = [seed for seed in values if seed in others]
    if not seeds:
        return ""
    return str(paired_difference([values[s] for s in seeds], [others[s] for s in seeds]))
