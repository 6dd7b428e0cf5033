"""Several budgets in one search: one distribution, and masks and ranks for each budget."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from planted_optimum import (
    chain_space,
    packed,
    resnet20_landscape,
    run_shuffled,
    run_to_end,
    small_importance,
    small_optimizer,
    small_score,
)

from fppmo_ray.distribution import (
    RULES,
    Budget,
    Feedback,
    MaskOptimizer,
    OptimizerSettings,
)
from fppmo_ray.distribution.budgets import Budgets
from fppmo_ray.distribution.rules import LayerES, RankedGeneration

CUTS = 0.3, 0.5, 0.7
SPACE = chain_space([8, 8, 8])


def optimizer(rule="layer_es", **changes):
    """Four generations of seven: two proposals, two and three for the three budgets."""
    few = {"macs_cut": CUTS, "num_proposals": 28, "population_size": 7}
    return small_optimizer(rule, SPACE, **few | changes)


def trajectory(proposals):
    return [(p.proposal_id, p.macs_cut, packed(p.keep)) for p in proposals]


def failed(proposal):
    return Feedback(proposal_id=proposal.proposal_id, error="NaN")


def told(proposal, loss):
    return Feedback(proposal_id=proposal.proposal_id, val_loss=loss, val_accuracy=0.5)


@pytest.mark.parametrize("rule", RULES)
class TestEveryRule:
    def test_every_mask_meets_its_own_budget_and_could_not_be_wider(self, rule):
        for proposal in run_to_end(optimizer(rule)):
            most = (1 - proposal.macs_cut) * SPACE.dense_macs
            assert SPACE.macs(proposal.keep) == proposal.macs <= most
            for filter_ in np.flatnonzero(~proposal.keep):
                wider = proposal.keep.copy()
                wider[filter_] = True
                assert SPACE.macs(wider) > most

    def test_scores_of_one_budget_are_never_ranked_against_those_of_another(self, rule):
        def scaled(proposal):  # by powers of two: no two scores change places by rounding
            factor = {0.3: 64.0, 0.5: 1.0, 0.7: 0.25}[proposal.macs_cut]
            return told(proposal, small_score(proposal).val_loss * factor)

        plain, uneven = (optimizer(rule) for _ in range(2))
        assert trajectory(run_to_end(plain)) == trajectory(run_to_end(uneven, scaled))
        assert np.array_equal(plain.prune_prob(), uneven.prune_prob())
        names = [[(f.macs_cut, f.name) for f in item.finalists()] for item in (plain, uneven)]
        assert names[0] == names[1]

    @pytest.mark.parametrize("lag", [0, 1, 2])
    def test_the_order_of_feedback_is_irrelevant(self, rule, lag):
        in_order, shuffled = (optimizer(rule, lag=lag) for _ in range(2))
        expected = trajectory(run_to_end(in_order))
        assert trajectory(run_shuffled(shuffled)) == expected
        assert np.array_equal(shuffled.prune_prob(), in_order.prune_prob())

    def test_a_replay_equals_the_live_search(self, rule):
        live, replayed = optimizer(rule), optimizer(rule)
        journal = [small_score(proposal) for proposal in run_to_end(live)]
        for feedback in journal:
            while replayed.ask():
                pass
            replayed.tell(feedback)
        assert np.array_equal(replayed.prune_prob(), live.prune_prob())

    def test_a_tuple_of_one_cut_is_that_cut(self, rule):
        one, plain = optimizer(rule, macs_cut=(0.5,)), optimizer(rule, macs_cut=0.5)
        assert trajectory(run_to_end(one)) == trajectory(run_to_end(plain))
        assert {finalist.macs_cut for finalist in one.finalists()} == {None}


def test_a_generation_is_dealt_evenly_and_the_widest_budget_comes_first():
    settings = OptimizerSettings(macs_cut=CUTS, num_proposals=27, population_size=10)
    assert settings.ids_by_budget(0) == (range(3), range(3, 6), range(6, 10))
    assert settings.ids_by_budget(2) == (range(20, 22), range(22, 24), range(24, 27))
    cuts = defaultdict(list)
    for proposal in run_to_end(optimizer()):
        cuts[proposal.generation].append(proposal.macs_cut)
    assert dict(cuts) == {g: [0.3, 0.3, 0.5, 0.5, 0.7, 0.7, 0.7] for g in range(4)}


def test_antithetic_noise_is_paired_within_a_budget():
    budgets = Budgets.from_cuts(SPACE, CUTS)
    noise, masks = budgets.sample_masks(
        LayerES(), budgets.start(small_importance(SPACE)), [4, 2, 4], np.random.default_rng(0), 0.0
    )
    assert len(masks) == len(noise) == 10
    for first, mirrored in [(0, 2), (1, 3), (4, 5), (6, 8), (7, 9)]:
        assert np.array_equal(noise[first], -noise[mirrored])


def test_what_the_budgets_agree_on_moves_as_far_as_for_one():
    budgets = Budgets.from_cuts(SPACE, CUTS)
    start = budgets.start(small_importance(SPACE))
    rng = np.random.default_rng(0)
    ranked = RankedGeneration(
        space=SPACE,
        keep=rng.random((8, 24)) < 0.5,
        layer_noise=rng.normal(size=(8, 3)),
    )
    alone = Budgets.from_cuts(SPACE, CUTS[:1]).learn(LayerES(), start, [ranked])
    together = budgets.learn(LayerES(), start, [ranked] * 3)
    assert np.abs(alone.keep_logits - start.keep_logits).max() > 0.1
    np.testing.assert_allclose(together.keep_logits, alone.keep_logits, atol=1e-8)


def test_a_budget_without_ranks_has_no_say_and_no_weight():
    budgets = Budgets.from_cuts(SPACE, CUTS)
    start = budgets.start(small_importance(SPACE))
    rng = np.random.default_rng(0)
    ranked = RankedGeneration(
        space=SPACE,
        keep=rng.random((8, 24)) < 0.5,
        layer_noise=rng.normal(size=(8, 3)),
    )
    of_all = budgets.learn(LayerES(), start, [ranked] * 3)
    of_one = budgets.learn(LayerES(), start, [None, ranked, None])
    np.testing.assert_allclose(of_one.keep_logits, of_all.keep_logits, atol=1e-8)
    assert budgets.learn(LayerES(), start, [None] * 3) is start


def test_a_budget_whose_proposals_all_fail_does_not_end_the_search():
    search = optimizer()
    run_to_end(search, lambda p: failed(p) if p.macs_cut == 0.7 else small_score(p))
    names = [f.name for f in search.finalists() if f.macs_cut == 0.7]
    assert not [name for name in names if name.startswith("sample")]


def test_a_generation_of_which_nothing_is_scored_ends_the_search():
    search = optimizer()
    *others, last = search.ask()
    for proposal in others:
        search.tell(failed(proposal))
    with pytest.raises(RuntimeError, match=r"all 7 proposals of generation 0 failed; .* NaN"):
        search.tell(failed(last))


def test_every_budget_has_finalists_that_meet_it_the_importance_only_mask_last():
    search = optimizer()
    proposals = {p.proposal_id: p for p in run_to_end(search)}
    finalists = search.finalists(num_samples=2)
    assert [f.macs_cut for f in finalists] == sorted(f.macs_cut for f in finalists)
    for cut in CUTS:
        own = [finalist for finalist in finalists if finalist.macs_cut == cut]
        assert own[-1].name == "importance-only"
        assert all(SPACE.macs(f.keep) <= (1 - cut) * SPACE.dense_macs for f in own)
        samples = [int(f.name.split()[1]) for f in own if f.name.startswith("sample")]
        assert samples
        assert {proposals[i].macs_cut for i in samples} == {cut}


def test_learning_beats_random_masks_at_every_budget():
    cuts, noise = (0.5, 0.64), np.random.default_rng(0)
    landscape, importance = resnet20_landscape(0)

    def noisy(proposal):
        return told(proposal, landscape.loss(proposal.keep) + 0.05 * noise.standard_normal())

    def found_losses(rule):
        settings = OptimizerSettings(macs_cut=cuts, num_proposals=320, rule=rule)
        search = MaskOptimizer(landscape.space, importance, settings)
        run_to_end(search, noisy)
        finalists = search.finalists()
        return [min(landscape.loss(f.keep) for f in finalists if f.macs_cut == cut) for cut in cuts]

    learned, by_chance = found_losses("layer_es"), found_losses("random")
    for with_feedback, without in zip(learned, by_chance, strict=True):
        assert with_feedback < 0.85 * without


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"macs_cut": (0.57, 0.4)},
            r"macs_cut must ascend, each given once, got 0.57,0.4; give 0.4,0.57",
        ),
        ({"macs_cut": (0.4, 0.4)}, r"each given once, got 0.4,0.4; give 0.4"),
        ({"macs_cut": (0.4, 1.0)}, r"macs_cut must be in \(0, 1\), got 1.0"),
        ({"macs_cut": ()}, "macs_cut must be one share of the MACs or several, got none"),
        ({"population_size": 5}, "population_size must be at least 6 for 3 budgets, .* got 5"),
        ({"num_proposals": 37}, "last generation must have at least 6 .* got 5; .* a multiple of"),
    ],
)
def test_budgets_that_make_no_search_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        OptimizerSettings(**{"macs_cut": CUTS, "num_proposals": 32} | changes)


def test_an_unreachable_cut_among_several_is_refused():
    space = chain_space([4, 4], min_keep=0.5)
    with pytest.raises(ValueError, match=r"macs_cut must be at most 0\.5588.*, got 0.6"):
        Budgets.from_cuts(space, (0.4, 0.6))
    assert Budgets.from_cuts(space, (0.4,)).each == (Budget.from_cut(space, 0.4),)
