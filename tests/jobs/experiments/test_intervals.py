"""Intervals of paired differences, against published ones."""

from __future__ import annotations

import pytest
from intervals import paired_difference, t_95


def test_the_paired_interval_is_students_own() -> None:
    # Hours of sleep gained with two drugs (Student 1908, table 1): 1.58 [0.70, 2.46].
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    difference = paired_difference(second, first)
    assert difference.mean == pytest.approx(1.58)
    assert difference.half_width == pytest.approx(0.8798858, abs=2e-4)
    assert str(difference) == "+1.58 [+0.70, +2.46]"
    assert paired_difference([1.0], [0.5]).half_width is None
    with pytest.raises(ValueError, match="expected pairs of values, got 1 and 0"):
        paired_difference([1.0], [])


def test_t_quantiles_beyond_the_table_are_right_to_three_digits() -> None:
    known = {13: 2.160, 20: 2.086, 30: 2.042, 100: 1.984}
    assert {degrees: round(t_95(degrees), 3) for degrees in known} == known
