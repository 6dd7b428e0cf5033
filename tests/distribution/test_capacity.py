"""Parameters left, as something that counts in the comparison of masks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fppmo_ray.distribution import (
    ChannelGroup,
    Feedback,
    LayerCost,
    MaskOptimizer,
    OptimizerSettings,
    PruningSpace,
    Width,
)
from fppmo_ray.distribution.capacity import capacity_factor
from fppmo_ray.distribution.space import TensorSize

FIRST, SECOND, IMAGE = Width(terms=((0, 1),)), Width(terms=((1, 1),)), Width(constant=3)
SPACE = PruningSpace(  # the second layer's filters cost as much, and hold nine times as much
    groups=(ChannelGroup(name="first", num_filters=8), ChannelGroup(name="second", num_filters=8)),
    layer_costs=(
        LayerCost(layer="first", macs_per_pair=9, out_width=FIRST, in_width=IMAGE),
        LayerCost(layer="second", macs_per_pair=9, out_width=SECOND, in_width=IMAGE),
    ),
    tensor_sizes=(
        TensorSize(tensor="first.weight", per_pair=1, out_width=FIRST, in_width=IMAGE),
        TensorSize(tensor="second.weight", per_pair=9, out_width=SECOND, in_width=IMAGE),
    ),
    constant_parameters=10,
)
SETTINGS = OptimizerSettings(macs_cut=0.5, num_proposals=256, population_size=16)


def mask(first: int, second: int) -> np.ndarray:
    return np.repeat([True, False, True, False], [first, 8 - first, second, 8 - second])


def test_parameters_are_those_of_the_tensors_and_of_what_always_stays() -> None:
    assert SPACE.dense_parameters == 8 * 3 + 9 * 8 * 3 + 10
    assert SPACE.parameters(mask(6, 2)) == 6 * 3 + 9 * 2 * 3 + 10


def test_the_factor_is_a_power_of_the_share_that_is_left() -> None:
    assert capacity_factor(SPACE, mask(6, 2), 0.0) == 1
    assert capacity_factor(SPACE, mask(6, 2), 2.0) == pytest.approx((82 / 250) ** -2)


def widths_after_equal_scores(weight: float) -> list[float]:
    """Mean widths that a search ends at where all masks have the same loss."""
    optimizer = MaskOptimizer(SPACE, np.ones(16), replace(SETTINGS, capacity_weight=weight))
    while not optimizer.finished:
        for proposal in optimizer.ask():
            optimizer.tell(
                Feedback(proposal_id=proposal.proposal_id, val_loss=1.0, val_accuracy=0.5)
            )
    kept = 1 - optimizer.prune_prob()
    return [float(kept[:8].sum()), float(kept[8:].sum())]


def test_of_masks_with_the_same_loss_those_that_leave_more_parameters_win() -> None:
    first, second = widths_after_equal_scores(2.0)
    assert second > first + 3


def test_without_a_weight_parameters_do_not_count() -> None:
    by_loss = MaskOptimizer(replace(SPACE, tensor_sizes=()), np.ones(16), SETTINGS)
    same = MaskOptimizer(SPACE, np.ones(16), SETTINGS)
    for optimizer in (by_loss, same):
        while not optimizer.finished:
            for proposal in optimizer.ask():
                loss = 1.0 + 0.01 * float(proposal.keep[:4].sum())
                optimizer.tell(
                    Feedback(proposal_id=proposal.proposal_id, val_loss=loss, val_accuracy=0.5)
                )
    assert (by_loss.prune_prob() == same.prune_prob()).all()


def test_a_weight_that_cannot_be_used_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a space with tensor_sizes, got one without"):
        MaskOptimizer(
            replace(SPACE, tensor_sizes=()), np.ones(16), replace(SETTINGS, capacity_weight=1.0)
        )
    for changes in ({"capacity_weight": -1.0}, {"capacity_weight": 1.0, "rank_by": "val_accuracy"}):
        with pytest.raises(ValueError, match="capacity_weight must be at least 0, and 0 where"):
            replace(SETTINGS, **changes)
