"""Searching on from another search's logits, also within the mask that it found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from planted_optimum import chain_space, packed

from fppmo_ray.distribution import (
    BoolArray,
    Budget,
    Feedback,
    MaskOptimizer,
    OptimizerSettings,
    Proposal,
)

SPACE = chain_space([16, 24, 16])
IMPORTANCE = np.linspace(1.0, 2.0, SPACE.num_filters)
SETTINGS = OptimizerSettings(macs_cut=0.3, num_proposals=24, population_size=8, seed=4)


def run(optimizer: MaskOptimizer, loss: Callable[[BoolArray], float]) -> list[Proposal]:
    """All proposals, each scored at once."""
    proposals = []
    while not optimizer.finished:
        for item in optimizer.ask():
            proposals.append(item)
            optimizer.tell(
                Feedback(proposal_id=item.proposal_id, val_loss=loss(item.keep), val_accuracy=0.5)
            )
    return proposals


def odd_kept(keep: BoolArray) -> float:
    return float(keep[1::2].mean())


@pytest.fixture
def earlier() -> MaskOptimizer:
    """A search that removed 30 % of the MACs, and odd filters first."""
    optimizer = MaskOptimizer(SPACE, IMPORTANCE, SETTINGS)
    run(optimizer, odd_kept)
    return optimizer


def test_a_search_goes_on_from_the_logits_but_for_the_shift_to_its_budget(earlier) -> None:
    logits = earlier.keep_logits()
    tighter = MaskOptimizer(SPACE, IMPORTANCE, replace(SETTINGS, macs_cut=0.6), logits)
    shift = tighter.keep_logits() - logits
    assert shift.max() < 0
    assert shift.max() == pytest.approx(shift.min(), abs=1e-12)
    for item in tighter.ask():
        assert item.macs == SPACE.macs(item.keep) <= 0.4 * SPACE.dense_macs


def test_a_search_that_goes_on_knows_what_the_earlier_one_learned(earlier) -> None:
    warm = MaskOptimizer(SPACE, IMPORTANCE, SETTINGS, earlier.keep_logits())
    cold = MaskOptimizer(SPACE, IMPORTANCE, SETTINGS)
    np.testing.assert_allclose(warm.prune_prob(), earlier.prune_prob(), atol=1e-9)
    assert warm.prune_prob()[1::2].mean() > cold.prune_prob()[1::2].mean() + 0.01


def test_the_importance_only_mask_comes_from_the_importance_all_the_same(earlier) -> None:
    warm = MaskOptimizer(SPACE, IMPORTANCE, SETTINGS, earlier.keep_logits())
    assert warm.importance_only().tolist() == earlier.importance_only().tolist()


def test_logits_at_the_budget_already_change_no_mask() -> None:
    cold = MaskOptimizer(SPACE, IMPORTANCE, SETTINGS)
    warm = MaskOptimizer(SPACE, IMPORTANCE, SETTINGS, cold.keep_logits() + 7.5)
    masks = [[packed(item.keep) for item in run(item_of, odd_kept)] for item_of in (cold, warm)]
    assert masks[0] == masks[1]


def test_a_search_within_the_found_mask_keeps_the_survivors_logits(earlier) -> None:
    found = next(item.keep for item in earlier.finalists() if item.name == "mode")
    inside = SPACE.within(found)
    logits = earlier.keep_logits()[found]
    settings = replace(SETTINGS, macs_cut=0.4, seed=5)
    later = MaskOptimizer(inside, IMPORTANCE[found], settings, logits)
    assert np.ptp(later.keep_logits() - logits) < 1e-12
    proposals = run(later, odd_kept)
    for item in [*proposals, *later.finalists()]:
        assert item.keep.shape == (found.sum(),)
        whole = np.zeros(SPACE.num_filters, dtype=bool)
        whole[np.flatnonzero(found)[item.keep]] = True
        assert inside.macs(item.keep) == SPACE.macs(whole)
        assert 0.5 < SPACE.macs(whole) / SPACE.macs(found) <= 0.6


def test_a_space_within_a_mask_costs_the_same_and_has_legal_widths() -> None:
    space = chain_space([16, 24, 16], multiple=4)
    keep = np.arange(space.num_filters) < 16 + 12 + 8
    keep[44:] = True  # widths 16, 16 and 12
    inside = space.within(keep)
    half = np.arange(inside.num_filters) % 2 == 0
    whole = np.zeros(space.num_filters, dtype=bool)
    whole[np.flatnonzero(keep)[half]] = True
    assert inside.macs(half) == space.macs(whole)
    assert inside.min_widths.tolist() == space.min_widths.tolist() == [4, 4, 4]


def test_a_budget_within_a_mask_counts_from_what_the_mask_leaves() -> None:
    keep = np.arange(SPACE.num_filters) % 2 == 0
    assert Budget.from_cut(SPACE.within(keep), 0.5).max_macs == SPACE.macs(keep) // 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros(55), r"warm_start must have shape \(56,\), .* got \(55,\)"),
        (np.full(56, -np.inf), "warm_start must be finite, got -inf for filter 0 in conv0"),
    ],
)
def test_logits_that_do_not_fit_are_refused(wrong, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskOptimizer(SPACE, IMPORTANCE, SETTINGS, wrong)


def test_an_importance_that_does_not_fit_is_refused_beside_fitting_logits() -> None:
    with pytest.raises(ValueError, match=r"importance must have shape \(56,\)"):
        MaskOptimizer(SPACE, np.ones(55), SETTINGS, np.zeros(56))
