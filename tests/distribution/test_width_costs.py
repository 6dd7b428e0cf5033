"""Costs as functions of widths: the peak memory of activations."""

from __future__ import annotations

import numpy as np

from fppmo_ray.distribution.costs import Activations, TensorSize, Width


def tensor(per_pair: int, *groups: int) -> TensorSize:
    widths = [Width(terms=((group, 1),)) for group in groups]
    out, read = [*widths, Width(constant=1), Width(constant=1)][:2]
    return TensorSize(tensor="t", per_pair=per_pair, out_width=out, in_width=read)


# The image and the first, the first and the second, and the second with what follows.
CHAIN = Activations(
    tensors=(tensor(40), tensor(10, 0), tensor(4, 1), tensor(8)),
    moments=((0, 1), (1, 2), (2, 3)),
    num_groups=2,
)


def test_the_peak_is_that_of_the_moment_with_most_bytes() -> None:
    assert CHAIN.total(np.array([8, 4])) == 40 + 80
    assert CHAIN.total(np.array([8, 20])) == 80 + 80
    assert CHAIN.total(np.array([1, 20])) == 4 * 20 + 10
    assert CHAIN.total(np.array([1, 1])) == 40 + 10


def test_a_group_widened_alone_costs_what_the_wider_network_does() -> None:
    widths, steps = np.array([8, 9]), np.array([1, 4])
    assert CHAIN.widened(widths, steps).tolist() == [10 * 9 + 40, 10 * 8 + 4 * 13]
    assert CHAIN.expected(np.array([8.5, 9.0])) == 85 + 40


def test_all_that_is_written_is_the_sum_of_the_tensors_by_their_widths() -> None:
    twice = Activations(
        tensors=(tensor(4, 0), tensor(8), tensor(6, 0), tensor(1, 0, 1)), moments=(), num_groups=2
    )
    assert [size.per_pair for size in twice.written()] == [10, 8, 1]
