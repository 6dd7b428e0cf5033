"""The order of scores, and what it makes of the parameters that a mask leaves."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np
import pytest

from fppmo_ray.distribution import (
    ChannelGroup,
    Feedback,
    LayerCost,
    MaskOptimizer,
    Merit,
    OptimizerSettings,
    PruningSpace,
    Width,
)
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
WEIGHED = Merit(capacity_weight=2.0, dense_parameters=1000)
BY_ACCURACY = Merit(rank_by="val_accuracy")


def score(proposal_id, loss=1.0, accuracy=0.5, steps=0):
    return Feedback(proposal_id=proposal_id, val_loss=loss, val_accuracy=accuracy, steps=steps)


def ranked_ids(merit, feedback, parameters=None):
    """Ids, best first; the best of all is the first one."""

    def parameters_of(proposal_id):
        return (parameters or {}).get(proposal_id, 1000)

    ranked = merit.ranked(feedback, parameters_of)
    assert merit.best(feedback, parameters_of) == (ranked[0] if ranked else None)
    return [item.proposal_id for item in ranked]


def mask(first: int, second: int) -> np.ndarray:
    return np.repeat([True, False, True, False], [first, 8 - first, second, 8 - second])


def told(optimizer: MaskOptimizer, loss_of) -> MaskOptimizer:
    """The same optimizer at the end of its search."""
    while not optimizer.finished:
        for proposal in optimizer.ask():
            optimizer.tell(score(proposal.proposal_id, loss_of(proposal.keep)))
    return optimizer


def test_the_lower_loss_is_better() -> None:
    feedback = [score(i, loss) for i, loss in enumerate([0.5, 0.1, 0.4, 0.2, 0.6])]
    assert ranked_ids(Merit(), feedback) == [1, 3, 2, 0, 4]


def test_losses_below_zero_are_ranked_like_others() -> None:
    feedback = [Feedback(proposal_id=i, val_loss=-value) for i, value in enumerate([28, 31, 30])]
    assert ranked_ids(Merit(), feedback) == [1, 2, 0]


def test_the_higher_accuracy_is_better_where_it_ranks() -> None:
    feedback = [score(i, loss=1.0 + i, accuracy=0.1 * i) for i in range(4)]
    assert ranked_ids(BY_ACCURACY, feedback) == [3, 2, 1, 0]
    assert ranked_ids(Merit(), feedback) == [0, 1, 2, 3]


@pytest.mark.parametrize("merit", [Merit(), WEIGHED, BY_ACCURACY])
def test_equal_scores_go_by_id(merit) -> None:
    assert ranked_ids(merit, [score(i) for i in (2, 0, 3, 1)]) == [0, 1, 2, 3]


def test_failures_have_no_rank() -> None:
    failures = [Feedback(proposal_id=i, error="NaN") for i in (0, 2)]
    assert ranked_ids(Merit(), [*failures, score(3, 0.7), score(1, 0.9)]) == [3, 1]
    assert ranked_ids(Merit(), failures) == []


def test_the_deeper_score_is_better_whatever_its_figures() -> None:
    feedback = [score(0, 0.1, steps=0), score(1, 0.9, steps=50), score(2, 0.8, steps=50)]
    assert ranked_ids(Merit(), [*feedback, score(3, 0.2, steps=10)]) == [2, 1, 3, 0]


@pytest.mark.parametrize("merit", [Merit(), WEIGHED, BY_ACCURACY])
def test_the_order_of_arrival_does_not_matter(merit) -> None:
    feedback = [score(i, 1 + i % 3, 0.1 * (i % 4), steps=i % 2) for i in range(12)]
    parameters = {i: 500 + 100 * (i % 5) for i in range(12)}
    expected = ranked_ids(merit, feedback, parameters)
    for seed in range(20):
        shuffled = random.Random(seed).sample(feedback, len(feedback))
        assert ranked_ids(merit, shuffled, parameters) == expected


def test_a_loss_is_weighed_by_a_power_of_the_share_of_parameters_that_is_left() -> None:
    assert WEIGHED.cost(score(0, 3.0), parameters=500) == pytest.approx(3.0 * 4)
    assert WEIGHED.cost(score(0, 3.0), parameters=1000) == 3.0
    assert Merit().cost(score(0, 3.0), parameters=500) == 3.0
    # A tenth more parameters make up for a loss that is a fifth higher.
    assert ranked_ids(WEIGHED, [score(0, 1.0), score(1, 1.2)], {0: 500, 1: 550}) == [1, 0]
    assert ranked_ids(WEIGHED, [score(0, 1.0), score(1, 1.22)], {0: 500, 1: 550}) == [0, 1]


def test_anything_with_the_figures_of_a_score_has_a_cost() -> None:
    @dataclass(frozen=True)
    class MeanScore:
        val_loss: float
        val_accuracy: float | None

    assert Merit().cost(MeanScore(0.25, None), parameters=10) == 0.25
    assert BY_ACCURACY.cost(MeanScore(0.25, 0.75), parameters=10) == -0.75


def test_a_score_without_the_figure_that_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="rank_by=val_accuracy needs a score with val_accuracy"):
        BY_ACCURACY.cost(Feedback(proposal_id=0, val_loss=1.0), parameters=10)
    with pytest.raises(ValueError, match="rank_by=val_loss needs a score with val_loss"):
        Merit().cost(Feedback(proposal_id=0, error="NaN"), parameters=10)


def test_fewer_parameters_make_a_loss_below_zero_worse_too() -> None:
    costs = [WEIGHED.cost(score(0, -8.0), parameters) for parameters in (250, 500, 1000)]
    assert costs == pytest.approx([-0.5, -2.0, -8.0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank_by": "loss"}, "rank_by must be val_loss or val_accuracy, got 'loss'"),
        ({"capacity_weight": -1.0}, "capacity_weight must be at least 0, and 0 where"),
        ({"capacity_weight": float("nan")}, "capacity_weight must be at least 0, and 0 where"),
        (
            {"capacity_weight": 1.0, "rank_by": "val_accuracy"},
            "capacity_weight must be at least 0, and 0 where rank_by is not val_loss",
        ),
        ({"capacity_weight": 1.0, "dense_parameters": 0}, "needs the dense network's parameters"),
    ],
)
def test_an_order_that_cannot_be_is_refused(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        Merit(**{"dense_parameters": 1000} | changes)


def test_parameters_are_those_of_the_tensors_and_of_what_always_stays() -> None:
    assert SPACE.dense_parameters == 8 * 3 + 9 * 8 * 3 + 10
    assert SPACE.parameters(mask(6, 2)) == 6 * 3 + 9 * 2 * 3 + 10


def test_proposals_and_finalists_tell_the_parameters_that_they_leave() -> None:
    optimizer = MaskOptimizer(SPACE, np.ones(16), SETTINGS)
    for item in [*optimizer.ask(), *optimizer.finalists()]:
        assert item.parameters == SPACE.parameters(item.keep)
    unknown = MaskOptimizer(replace(SPACE, tensor_sizes=()), np.ones(16), SETTINGS)
    assert {item.parameters for item in [*unknown.ask(), *unknown.finalists()]} == {0}


def widths_after_equal_scores(weight: float) -> list[float]:
    """Mean widths that a search ends at where all masks have the same loss."""
    settings = replace(SETTINGS, capacity_weight=weight)
    optimizer = told(MaskOptimizer(SPACE, np.ones(16), settings), lambda keep: 1.0)
    kept = 1 - optimizer.prune_prob()
    return [float(kept[:8].sum()), float(kept[8:].sum())]


def test_of_masks_with_the_same_loss_those_that_leave_more_parameters_win() -> None:
    first, second = widths_after_equal_scores(2.0)
    assert second > first + 3


def test_without_a_weight_parameters_do_not_count() -> None:
    by_loss = MaskOptimizer(replace(SPACE, tensor_sizes=()), np.ones(16), SETTINGS)
    same = MaskOptimizer(SPACE, np.ones(16), SETTINGS)
    for optimizer in (by_loss, same):
        told(optimizer, lambda keep: 1.0 + 0.01 * float(keep[:4].sum()))
    assert (by_loss.prune_prob() == same.prune_prob()).all()


def test_a_weight_that_cannot_be_used_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a space with tensor_sizes, got one without"):
        MaskOptimizer(
            replace(SPACE, tensor_sizes=()), np.ones(16), replace(SETTINGS, capacity_weight=1.0)
        )
    for changes in ({"capacity_weight": -1.0}, {"capacity_weight": 1.0, "rank_by": "val_accuracy"}):
        with pytest.raises(ValueError, match="capacity_weight must be at least 0, and 0 where"):
            replace(SETTINGS, **changes)


def test_a_mask_without_a_number_of_parameters_has_no_cost_where_parameters_count():
    merit = Merit(capacity_weight=0.5, dense_parameters=100)
    with pytest.raises(ValueError, match="needs the parameters that a mask leaves, got 0; give"):
        merit.cost(Feedback(proposal_id=0, val_loss=1.0), 0)
