"""The fit of a latency table to layers and whole networks."""

from __future__ import annotations

import numpy as np
from torch import nn, zeros

from fppmo_ray.distribution.costs import Width
from fppmo_ray.distribution.latency_table import LayerLatency
from fppmo_ray.pruning import trace
from fppmo_ray.pruning.latency.measure import fit_table

NETWORK = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))
SPACE = trace(NETWORK, zeros(1, 3, 4, 4)).space
LAYER = LayerLatency(
    layer="0",
    out_width=Width(terms=((0, 1),)),
    in_width=Width(constant=3),
    out_points=(1, 4, 8),
    in_points=(3,),
    ns=((500,), (4000,), (5000,)),
)
WIDTHS = [np.array([width]) for width in (8, 1, 2, 4, 6, 7)]
ALONE = [5000, 500, 500 + 3500 // 3, 4000, 4500, 4750]
# The image, what two layers and a ReLU make, in bytes.
WRITTEN = [4 * 16 * (3 + 2 * int(width[0]) + 4) for width in WIDTHS]


def test_a_factor_a_time_per_byte_and_a_constant_are_found_again() -> None:
    measured = [round(1.5 * a + 0.25 * b + 2000) for a, b in zip(ALONE, WRITTEN, strict=True)]
    table = fit_table(SPACE, [LAYER], WIDTHS, measured)
    for width, ns in zip(WIDTHS, measured, strict=True):
        assert abs(table.total(width) - ns) <= 3
    assert abs(table.fs_per_byte - 250_000) < 2_000
    assert abs(table.constant_ns - 2000) < 20
    assert table.dense_ns == measured[0]


def test_nothing_gets_faster_by_being_wider_whatever_was_measured() -> None:
    falling = [round(9000 - 100 * a / 500) for a in ALONE]
    table = fit_table(SPACE, [LAYER], WIDTHS, falling)
    assert table.fs_per_byte == 0
    assert [row[0] for row in table.layers[0].ns] == [0, 0, 0]
    assert 8000 < table.constant_ns < 9000
