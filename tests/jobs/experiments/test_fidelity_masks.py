"""The masks on which scores are compared with truths."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from agreement.masks import (
    Mask,
    different_masks,
    masks_from_json,
    masks_of_search,
    masks_to_json,
    near_masks,
)
from simulated_masks import (
    BUDGET,
    CUT,
    all_masks,
    facts_of,
    found_masks,
    importances,
    packed,
    write_search,
)

from fppmo_ray.distribution import (
    Budget,
    ChannelGroup,
    LayerCost,
    PruningSpace,
    Width,
)
from fppmo_ray.distribution.logits import uniform_priority
from fppmo_ray.service.journal.facts import pack_mask
from fppmo_ray.testing.simulated_search import SIMULATED_SPACE


def test_all_masks_meet_the_budget_and_differ() -> None:
    masks = all_masks(24, seed=0)
    macs = [SIMULATED_SPACE.macs(mask.keep) for mask in masks]
    assert max(macs) <= 0.43 * SIMULATED_SPACE.dense_macs
    assert min(macs) >= 0.40 * SIMULATED_SPACE.dense_macs  # the smallest legal step is 2 %
    assert len(set(packed(masks))) == len({mask.name for mask in masks}) == 24
    assert [mask.is_near for mask in masks] == 12 * [False] + 12 * [True]


def test_masks_are_a_function_of_the_seed_and_more_of_them_begin_with_the_same() -> None:
    assert packed(all_masks(24, seed=0)) == packed(all_masks(24, seed=0))
    assert packed(all_masks(24, seed=0)) != packed(all_masks(24, seed=1))
    few, many = all_masks(16, seed=0), all_masks(24, seed=0)
    assert packed(few) == packed(many[:8] + many[12:20])


def test_the_first_masks_are_uniform_and_global_rankings_and_layers_spread_ever_more() -> None:
    masks = different_masks(BUDGET, importances(), 12, seed=0)
    names = [mask.name for mask in masks]
    assert names[:4] == ["uniform l1", "global l1", "global fpgm", "global bn_scale"]
    assert names[4:7] == [
        "random widths, spread 0.5",
        "random filters 1",
        "random widths, spread 1",
    ]
    uniform = BUDGET.fill(uniform_priority(SIMULATED_SPACE, importances()["l1"]))
    assert np.array_equal(masks[0].keep, uniform)


def test_two_masks_of_searches_in_turn_then_one_close_to_a_mode() -> None:
    searches = [found_masks(1), found_masks(2)]
    masks = near_masks(BUDGET, searches, 12, seed=0)
    assert packed(masks[0:2]) == packed([searches[0][0], searches[1][0]])
    assert packed(masks[3:5]) == packed([searches[0][1], searches[1][1]])
    for sample, centre in ((masks[2], searches[0][0]), (masks[5], searches[1][0])):
        assert 0 < np.mean(sample.keep != centre.keep) < 0.3
    assert np.mean(searches[0][0].keep != searches[1][0].keep) > 0.3


def test_more_masks_than_there_are_are_refused() -> None:
    cost = LayerCost(
        layer="a", macs_per_pair=9, out_width=Width(terms=((0, 1),)), in_width=Width(constant=1)
    )
    pair = PruningSpace((ChannelGroup(name="a", num_filters=2),), (cost,))
    budget = Budget.from_cut(pair, 0.5)  # the one filter, or the other
    found = [Mask("mode", budget.fill(np.array([1.0, 0])), is_near=True)]
    assert packed(near_masks(budget, [found], 2, seed=0)) == [
        pack_mask(np.array(keep)) for keep in ([True, False], [False, True])
    ]
    with pytest.raises(ValueError, match=r"expected 3 different masks, found 2 that meet the"):
        near_masks(budget, [found], 3, seed=0)


def test_masks_that_results_were_begun_with_need_no_search() -> None:
    near, different = found_masks(1)[:4], [replace(m, is_near=False) for m in found_masks(2)[:4]]
    kept = json.loads(json.dumps(masks_to_json([*different, *near])))
    again = masks_from_json(kept, 5, SIMULATED_SPACE.num_filters)
    assert packed(again) == packed([*different[:3], *near[:2]])
    assert [mask.name for mask in again] == [mask.name for mask in [*different[:3], *near[:2]]]
    with pytest.raises(ValueError, match="expected 10 masks, the results were begun with 8; give"):
        masks_from_json(kept, 10, SIMULATED_SPACE.num_filters)


def test_a_searchs_mode_comes_first_and_its_samples_by_loss(tmp_path: Path) -> None:
    masks = [mask.keep for mask in found_masks(1)[:4]]
    facts, space = facts_of(masks, [0.9, 0.7, 0.8]), SIMULATED_SPACE.fingerprint()
    found = masks_of_search(
        write_search(tmp_path / "a", facts, space, CUT), 7, SIMULATED_SPACE, CUT
    )
    names = [f"{name} of search 7" for name in ("mode", "sample 1", "sample 2", "sample 0")]
    assert [mask.name for mask in found] == names
    for mask, number in zip(found, (0, 2, 3, 1), strict=True):
        np.testing.assert_array_equal(mask.keep, masks[number])


def test_searches_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    masks = [mask.keep for mask in found_masks(1)[:2]]
    facts, space = facts_of(masks, [0.9]), SIMULATED_SPACE.fingerprint()
    for facts_there, space_there, cut, expected in (
        (facts[:-1], space, CUT, "has not finished; go on with it by --resume"),
        (facts, "another", CUT, "was for another network or other limits"),
        (facts, space, 0.4, "cut 40% of the MACs, expected 57%"),
        (facts[-1:], space, CUT, "pruned in stages, which have masks of their own"),
    ):
        run_dir = write_search(tmp_path / expected[:9], facts_there, space_there, cut)
        with pytest.raises(ValueError, match=expected):
            masks_of_search(run_dir, 0, SIMULATED_SPACE, CUT)
