"""Where keep-logits start, and how they are shifted to the budget."""

from __future__ import annotations

import numpy as np
import pytest
from planted_optimum import chain_space, resnet20_landscape, resnet20_space

from fppmo_ray.distribution import Budget
from fppmo_ray.distribution.logits import (
    layer_mean,
    logit,
    project_to_budget,
    prune_prob,
    sigmoid,
    start_logits,
    uniform_priority,
)


def expected_macs(space, keep_logits):
    return space.expected_macs(layer_mean(space, sigmoid(keep_logits)) * space.dense_widths)


def test_the_start_expects_the_budget_and_the_same_share_of_every_layer():
    landscape, importance = resnet20_landscape(seed=0)
    space = landscape.space
    budget = Budget.from_cut(space, 0.57)
    keep_logits = start_logits(budget, importance)
    shares = layer_mean(space, sigmoid(keep_logits))
    assert shares == pytest.approx(np.full(9, shares[0]), abs=1e-6)
    assert expected_macs(space, keep_logits) == pytest.approx(budget.max_macs, rel=1e-6)


def test_the_start_prefers_important_filters_within_a_layer():
    landscape, importance = resnet20_landscape(seed=0)
    keep_logits = start_logits(Budget.from_cut(landscape.space, 0.57), importance)
    for group in range(9):
        members = landscape.space.group_of == group
        assert np.array_equal(np.argsort(keep_logits[members]), np.argsort(importance[members]))


def test_the_scale_of_a_layers_importance_does_not_matter():
    landscape, importance = resnet20_landscape(seed=0)
    budget = Budget.from_cut(landscape.space, 0.57)
    scaled = importance * 10.0**landscape.space.group_of
    assert start_logits(budget, scaled) == pytest.approx(start_logits(budget, importance))


def test_equal_importance_starts_with_equal_probabilities():
    space = resnet20_space()
    keep_logits = start_logits(Budget.from_cut(space, 0.57), np.full(space.num_filters, 0.1))
    assert np.ptp(keep_logits) < 1e-6


def test_projected_logits_expect_the_budget_and_keep_their_differences():
    space = resnet20_space()
    budget = Budget.from_cut(space, 0.57)
    logits = np.random.default_rng(0).normal(3, 2, size=space.num_filters)
    projected = project_to_budget(budget, logits)
    assert expected_macs(space, projected) == pytest.approx(budget.max_macs, rel=1e-6)
    assert np.ptp(projected - logits) < 1e-9


def test_logits_are_projected_to_the_deepest_cut_that_is_legal():
    space = chain_space([8, 8])
    projected = project_to_budget(Budget(space, space.min_macs), np.zeros(16))
    assert np.all(sigmoid(projected) <= 1 / 8 + 1e-6)


def test_prune_probabilities_stay_off_certainty():
    assert prune_prob(np.array([-99.0, 0.0, 99.0])).tolist() == [0.98, 0.5, 0.02]


def test_logit_inverts_sigmoid():
    assert sigmoid(logit(np.array([0.02, 0.5, 0.9]))) == pytest.approx([0.02, 0.5, 0.9])


def test_the_uniform_mask_of_resnet20_has_the_known_widths():
    space = resnet20_space()
    importance = np.random.default_rng(0).lognormal(size=space.num_filters)
    keep = Budget.from_cut(space, 0.57).fill(uniform_priority(space, importance))
    widths = space.widths(keep)
    # 7 of 16, 13 of 32, 27 of 64; what the budget leaves over may add a filter.
    assert np.all(np.abs(widths - [7, 7, 7, 13, 13, 13, 27, 27, 27]) <= 1)
    for group in range(9):
        members = space.group_of == group
        kept, removed = importance[members & keep], importance[members & ~keep]
        assert kept.min() > removed.max()


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_importance_that_is_not_positive_is_refused_by_name(bad):
    importance = np.ones(16)
    importance[9] = bad
    with pytest.raises(ValueError, match=r"finite and > 0, got .* for filter 9 in conv1"):
        start_logits(Budget.from_cut(chain_space([8, 8]), 0.5), importance)


def test_importance_of_another_network_is_refused():
    with pytest.raises(ValueError, match=r"shape \(16,\), .* got \(15,\)"):
        start_logits(Budget.from_cut(chain_space([8, 8]), 0.5), np.ones(15))
