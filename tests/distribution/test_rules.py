"""One step of each update rule, against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from planted_optimum import (
    chain_space,
    packed,
    run_to_end,
    small_importance,
    small_optimizer,
)

from fppmo_ray.distribution import RULES, UpdateRule
from fppmo_ray.distribution.logits import rank_in_layer, sigmoid
from fppmo_ray.distribution.rules import (
    WIDTHS,
    Beliefs,
    Elite,
    LayerES,
    RandomMasks,
    RankedGeneration,
)

SPACE = chain_space([2, 2])
UNDECIDED = Beliefs(keep_logits=np.zeros(4))


def generation(*masks, layer_noise=None):
    keep = np.array(masks, dtype=bool)
    noise = np.zeros((len(masks), 2)) if layer_noise is None else np.array(layer_noise)
    return RankedGeneration(space=SPACE, keep=keep, layer_noise=noise)


FOUR = generation([1, 1, 1, 0], [1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1])
"""Best first: utilities +1, 0, 0, -1, so the gradient is (1, 1, 0, -1)."""


@pytest.mark.parametrize(
    ("num_scored", "utilities"),
    [
        (2, [1, -1]),
        (3, [1, 0, -1]),
        (8, [0.5, 0.5, 0, 0, 0, 0, -0.5, -0.5]),
        (11, [0.5, 0.5, 0, 0, 0, 0, 0, 0, 0, -0.5, -0.5]),
    ],
)
def test_the_best_and_the_worst_quarter_have_utilities(num_scored, utilities):
    masks = np.zeros((num_scored, 4))
    assert generation(*masks).utilities.tolist() == utilities


def test_elite_moves_probabilities_towards_the_best_quarter():
    keep_prob = sigmoid(Elite(step=0.2).update(UNDECIDED, FOUR).keep_logits)
    assert keep_prob == pytest.approx([0.6, 0.6, 0.6, 0.4])


def test_layer_es_follows_the_noise_of_the_layers_and_the_rest_of_the_filters():
    told = generation(*FOUR.keep, layer_noise=[[0.4, -0.1], [0, 0], [9, 9], [-0.4, 0.3]])
    moved = LayerES(layer_step=0.5, filter_step=0.2).update(UNDECIDED, told).keep_logits
    # layers: 0.5 * (0.8, -0.4); rest: 0.2 * (0, 0, 0.5, -0.5)
    assert moved == pytest.approx([0.4, 0.4, -0.1, -0.3])


def test_widths_move_layers_alone():
    told = generation(*FOUR.keep, layer_noise=[[0.4, -0.1], [0, 0], [9, 9], [-0.4, 0.3]])
    moved = WIDTHS.update(UNDECIDED, told).keep_logits
    assert moved == pytest.approx([0.7 * 0.8] * 2 + [0.7 * -0.4] * 2)


def test_widths_keep_the_most_important_filters_of_every_layer():
    space = chain_space([8, 8, 8])
    optimizer = small_optimizer("widths", space)
    found = [*run_to_end(optimizer), *optimizer.finalists()]
    rank = rank_in_layer(space, small_importance(space))
    for item in found:
        widths = space.widths(item.keep)
        assert item.keep.tolist() == (rank < widths[space.group_of]).tolist()
    assert len({tuple(space.widths(item.keep)) for item in found}) >= 8


def test_random_masks_learn_nothing():
    assert RandomMasks().update(UNDECIDED, FOUR) is UNDECIDED


def test_elite_keeps_a_margin():
    keep_prob = sigmoid(Elite(step=1.0).update(UNDECIDED, FOUR).keep_logits)
    assert keep_prob.min() == pytest.approx(0.02)
    assert keep_prob.max() == pytest.approx(0.98)


def test_layer_noise_is_antithetic_and_cools_down():
    rule = LayerES(sigma=(0.4, 0.1))
    early = rule.layer_noise(np.random.default_rng(0), (5, 2), 0.0)
    late = rule.layer_noise(np.random.default_rng(0), (5, 2), 1.0)
    assert early.shape == (5, 2)
    assert np.array_equal(early[3:], -early[:2])
    assert late == pytest.approx(early / 4)
    assert [rule.temperature(progress) for progress in (0.0, 1.0)] == pytest.approx([1, 0.3])


def test_a_rule_with_steps_of_its_own_may_take_the_place_of_a_name() -> None:
    def masks(rule: str | UpdateRule) -> list[str]:
        return [packed(item.keep) for item in run_to_end(small_optimizer(rule))]

    assert masks("layer_es") == masks(LayerES()) != masks(LayerES(filter_step=2.0))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_an_update_leaves_the_earlier_beliefs_as_they_were(rule):
    before = Beliefs(keep_logits=np.array([0.5, -0.5, 1.0, 0.0]))
    rule.update(before, generation([1, 1, 1, 0], [1, 0, 1, 1]))
    assert before.keep_logits.tolist() == [0.5, -0.5, 1.0, 0.0]
