"""Landscapes whose best masks are known, and the table of searches on them."""

from __future__ import annotations

import numpy as np
import pytest
from landscape_searches import DEFAULTS, rows, variations
from landscapes import SPACES, cifar_space, landscape

from fppmo_ray import SearchSettings
from fppmo_ray.distribution import RULES
from fppmo_ray.distribution.logits import uniform_priority


def test_the_spaces_cost_what_the_networks_do():
    # ResNet-20, -56 and torchvision's resnet50, by flop counter.
    dense = {name: space.dense_macs for name, space in SPACES.items()}
    assert dense == {"resnet20": 40551040, "resnet56": 125485696, "resnet50": 4089184256}


@pytest.mark.parametrize("seed", [0, 1])
def test_gain_is_0_for_importance_only_and_at_most_1(seed):
    problem = landscape(cifar_space(1), seed)
    start = problem.budget.fill(uniform_priority(problem.space, problem.importance))
    rng = np.random.default_rng(seed)
    by_worth = rng.logistic(size=(200, problem.space.num_filters)) + 2 * problem.worth
    gains = problem.gain(np.array([start, *map(problem.budget.fill, by_worth)]))
    assert gains[0] == 0
    assert 0 < gains.max() < 1


def test_a_landscape_is_a_function_of_its_number():
    one, same, other = (landscape(cifar_space(1), seed) for seed in (3, 3, 4))
    keep = np.ones((1, one.space.num_filters), dtype=bool)
    keep[0, ::3] = False
    assert one.loss(keep) == same.loss(keep) != other.loss(keep)


def test_variations_are_compared_with_the_default_rule_and_none_repeats_another():
    settled = SearchSettings(macs_cut=0.5).on("cpu", has_images=False)
    first, *others = variations()
    assert first.rule == RULES[settled.sampler.rule]
    assert not first.settings
    ways = [(item.rule, *item.settings.items()) for item in (first, *others)]
    assert len(set(ways)) == len(ways)


def test_candidates_are_compared_with_the_first_on_the_same_landscapes():
    chosen = [item for item in DEFAULTS if item.name in ("layer_es", "random")]
    table = list(rows(chosen, {"resnet20": [0, 1]}, 48))
    assert [(row.candidate, row.space, row.landscapes) for row in table] == [
        ("layer_es", "resnet20", 2),
        ("random", "resnet20", 2),
    ]
    layer_es, random = (row.gains["mode"] for row in table)
    assert [row.over_first for row in table] == pytest.approx([0, random - layer_es], abs=1e-3)
    assert random < layer_es
