"""A latency table: exact where it was measured, between in the middle, and never falling."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from fppmo_ray.distribution.costs import TensorSize, Width
from fppmo_ray.distribution.latency_table import LatencyTable, LayerLatency, monotone

FIRST, SECOND = Width(terms=((0, 1),)), Width(terms=((1, 2),))
TABLE = LatencyTable(
    num_groups=2,
    layers=(
        LayerLatency(
            layer="stem",
            out_width=FIRST,
            in_width=Width(constant=3),
            out_points=(2, 4, 8),
            in_points=(3,),
            ns=((100,), (200,), (800,)),
        ),
        LayerLatency(
            layer="body",
            out_width=SECOND,
            in_width=FIRST,
            out_points=(2, 6),
            in_points=(2, 8),
            ns=((1000, 4000), (3000, 12000)),
        ),
    ),
    written=(TensorSize(tensor="all", per_pair=100, out_width=FIRST, in_width=Width(constant=1)),),
    fs_per_byte=2_500_000,
    constant_ns=7,
    dense_ns=15_000,
)


def total(first: int, second: int) -> int:
    return TABLE.total(np.array([first, second]))


def test_at_measured_widths_it_is_what_was_measured_and_the_rest() -> None:
    # Per byte 2.5 ns, and 100 bytes per filter of the first group.
    assert total(8, 3) == 800 + 12000 + 8 * 250 + 7
    assert total(2, 1) == 100 + 1000 + 2 * 250 + 7


def test_between_measured_widths_it_is_interpolated_and_rounded_down() -> None:
    # stem at 5: 200 + 600 / 4; body at 4 x 5: the middle of all four.
    assert total(5, 2) == 350 + 5000 + 5 * 250 + 7
    # stem at 3: 150; body at 2 x 3: 1000 + 3000 / 6.
    assert total(3, 1) == 150 + 1500 + 3 * 250 + 7
    odd = LayerLatency(
        layer="odd",
        out_width=FIRST,
        in_width=Width(constant=1),
        out_points=(1, 4),
        in_points=(1,),
        ns=((10,), (20,)),
    )
    alone = replace(TABLE, layers=(odd,), fs_per_byte=0, constant_ns=0)
    assert [alone.total(np.array([width, 1])) for width in (1, 2, 3, 4)] == [10, 13, 16, 20]


def test_no_wider_network_is_faster() -> None:
    for second in (1, 2, 3):
        times = [total(first, second) for first in range(2, 9)]
        assert all(narrow <= wide for narrow, wide in pairwise(times))


def test_a_group_widened_alone_costs_what_the_wider_network_does() -> None:
    widened = TABLE.widened(np.array([3, 1]), np.array([2, 1]))
    assert widened.tolist() == [total(5, 1), total(3, 2)]


def test_fractional_widths_cost_about_what_whole_ones_do() -> None:
    assert TABLE.expected(np.array([5.0, 2.0])) == pytest.approx(total(5, 2))
    assert TABLE.expected(np.array([4.5, 2.0])) == pytest.approx(
        (total(4, 2) + total(5, 2)) / 2, abs=1
    )


def test_a_table_survives_json() -> None:
    assert LatencyTable.from_json(json.loads(json.dumps(TABLE.to_json()))) == TABLE


def test_what_falls_with_width_is_levelled_as_little_as_possible() -> None:
    times = np.array([[1.0, 4.0, 2.0], [2.0, 3.0, 5.0]])
    # 4 and 2 meet at 3, so do 4 above 3 in their column, at 3.5: both bounds hold there.
    assert monotone(times).tolist() == [[1.0, 3.0, 3.0], [2.0, 3.5, 5.0]]
    assert monotone(np.array([[1.0, 2.0], [3.0, 4.0]])).tolist() == [[1.0, 2.0], [3.0, 4.0]]
