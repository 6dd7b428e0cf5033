"""Searches whose proposals are scored cheaply first, and dearly where that pays."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from planted_optimum import chain_space, run_shuffled, run_to_end, small_optimizer, small_score

from fppmo_ray.distribution import RULES, Feedback, OptimizerSettings, pack_mask

RUNGS = 5, 20


def trajectory(proposals):
    """What was asked for, by id and rung."""
    return sorted((p.proposal_id, p.rung, pack_mask(p.keep), p.score_seed) for p in proposals)


def noisy(proposal):
    """Shallow scores are wrong by chance; one in nine fails, at whichever rung."""
    score = small_score(proposal)
    rng = np.random.default_rng([proposal.proposal_id, proposal.rung])
    if rng.random() < 1 / 9:
        return failed(proposal)
    loss = score.val_loss + rng.normal() / (1 + proposal.rung)
    return Feedback(
        proposal_id=proposal.proposal_id, val_loss=loss, val_accuracy=0.5, rung=proposal.rung
    )


def failed(proposal):
    error = "CUDA error: out of memory"
    return Feedback(proposal_id=proposal.proposal_id, error=error, rung=proposal.rung)


def loss(proposal, value):
    return Feedback(
        proposal_id=proposal.proposal_id, val_loss=value, val_accuracy=0.5, rung=proposal.rung
    )


@pytest.mark.parametrize("rule", RULES)
class TestEveryRule:
    @pytest.mark.parametrize("lag", [0, 1, 2])
    def test_the_order_of_feedback_is_irrelevant(self, rule, lag):
        in_order, shuffled = (small_optimizer(rule, lag=lag, rungs=RUNGS) for _ in range(2))
        expected = trajectory(run_to_end(in_order, noisy))
        assert trajectory(run_shuffled(shuffled, noisy)) == expected
        assert np.array_equal(shuffled.prune_prob(), in_order.prune_prob())
        assert [f.name for f in shuffled.finalists()] == [f.name for f in in_order.finalists()]

    def test_one_rung_is_as_good_as_none(self, rule):
        without, single = small_optimizer(rule), small_optimizer(rule, rungs=(50,))
        masks = [[pack_mask(p.keep) for p in run_to_end(item)] for item in (without, single)]
        assert masks[0] == masks[1]
        assert np.array_equal(without.prune_prob(), single.prune_prob())


def test_every_proposal_is_asked_for_at_the_first_rung_and_the_best_third_again():
    proposals = run_to_end(small_optimizer("layer_es", rungs=RUNGS))
    first = {p.proposal_id: p for p in proposals if p.rung == 5}
    second = {p.proposal_id: p for p in proposals if p.rung == 20}
    assert len(first) + len(second) == len(proposals)
    assert sorted(first) == list(range(28))
    assert Counter(p.generation for p in second.values()) == {0: 2, 1: 2, 2: 2, 3: 2, 4: 2}
    space = chain_space([8, 8, 8])
    for i, promoted in second.items():
        assert np.array_equal(promoted.keep, first[i].keep)
        assert promoted.macs == space.macs(promoted.keep)
        assert (promoted.generation, promoted.score_seed) == (i // 6, (3, i // 6))


def test_written_out_losses_promote_the_second_and_the_fifth():
    optimizer = small_optimizer("elite", rungs=RUNGS)
    for proposal, value in zip(optimizer.ask(), [0.7, 0.1, 0.5, 0.6, 0.2, 0.4], strict=True):
        optimizer.tell(loss(proposal, value))
    assert [(p.proposal_id, p.rung) for p in optimizer.ask()] == [(1, 20), (4, 20)]
    assert optimizer.generation == 0


def test_the_promoted_are_asked_for_before_new_proposals():
    optimizer = small_optimizer("elite", rungs=RUNGS)
    for proposal in optimizer.ask():
        optimizer.tell(small_score(proposal))
    assert {p.rung for p in optimizer.ask()} == {20}
    assert {(p.generation, p.rung) for p in optimizer.ask()} == {(1, 5)}


def test_a_later_generation_climbs_without_waiting_for_the_one_before():
    optimizer = small_optimizer("elite", rungs=RUNGS)
    first, second = optimizer.ask(), optimizer.ask()
    for proposal in [*first[1:], *second]:
        optimizer.tell(small_score(proposal))
    assert {(p.generation, p.rung) for p in optimizer.ask()} == {(1, 20)}


def test_an_update_ranks_the_promoted_by_their_deep_scores_and_before_all_others():
    def told(losses, deep):
        optimizer = small_optimizer("elite", population_size=8, num_proposals=8, rungs=RUNGS)
        for proposal in optimizer.ask():
            optimizer.tell(loss(proposal, losses[proposal.proposal_id]))
        for proposal in optimizer.ask():
            optimizer.tell(loss(proposal, deep[proposal.proposal_id]))
        assert optimizer.finished
        return optimizer.prune_prob()

    # By the shallow losses 0 and 1 are the best of eight; by the deep ones 2 and 1.
    climbed = told([0.1, 0.2, 0.3, *[0.4] * 5], {0: 9.9, 1: 9.8, 2: 9.7})
    plain = small_optimizer("elite", population_size=8, num_proposals=8)
    for proposal in plain.ask():
        value = {2: 0.1, 1: 0.2, 0: 0.3}.get(proposal.proposal_id, 0.4)
        plain.tell(Feedback(proposal_id=proposal.proposal_id, val_loss=value, val_accuracy=0.5))
    assert np.array_equal(climbed, plain.prune_prob())


def test_a_score_is_refused_at_a_rung_that_nobody_asked_for():
    optimizer = small_optimizer("elite", rungs=RUNGS)
    proposal = optimizer.ask()[0]
    for rung in (0, 20):
        with pytest.raises(ValueError, match=f"got proposal 0 at rung {rung}"):
            optimizer.tell(Feedback(proposal_id=0, val_loss=1.0, val_accuracy=0.5, rung=rung))
    assert optimizer.tell(small_score(proposal)) is True
    assert optimizer.tell(failed(proposal)) is False


def test_a_generation_whose_deep_scores_all_fail_ends_the_search_with_the_first_error():
    optimizer = small_optimizer("layer_es", rungs=RUNGS)
    for proposal in optimizer.ask():
        optimizer.tell(small_score(proposal))
    first, second = optimizer.ask()
    optimizer.tell(failed(second))
    with pytest.raises(RuntimeError, match=r"all 2 .* generation 0 failed at rung 20; .* memory"):
        optimizer.tell(failed(first))


def test_a_single_proposal_that_can_be_scored_climbs_and_makes_no_update():
    optimizer = small_optimizer("layer_es", rungs=RUNGS)
    before = optimizer.prune_prob()
    first, *others = optimizer.ask()
    optimizer.tell(small_score(first))
    for proposal in others:
        optimizer.tell(failed(proposal))
    [deep] = optimizer.ask()
    assert (deep.proposal_id, deep.rung) == (0, 20)
    optimizer.tell(small_score(deep))
    assert optimizer.generation == 1
    assert np.array_equal(optimizer.prune_prob(), before)


def test_the_best_samples_among_the_finalists_are_those_with_deep_scores():
    optimizer = small_optimizer("random", rungs=RUNGS)
    proposals = run_to_end(optimizer, lambda p: loss(p, (p.proposal_id + 1) * (p.rung - 4)))
    deep = sorted(p.proposal_id for p in proposals if p.rung == 20)
    assert deep == [0, 1, 6, 7, 12, 13, 18, 19, 24, 25]
    names = [f.name for f in optimizer.finalists(4) if f.name.startswith("sample")]
    assert names == ["sample 0", "sample 1", "sample 6", "sample 7"]


@pytest.mark.parametrize("rungs", [(5, 5), (20, 5), (-1, 5)])
def test_rungs_that_do_not_ascend_are_refused(rungs):
    with pytest.raises(ValueError, match="rungs must ascend from at least 0, got"):
        OptimizerSettings(macs_cut=0.5, num_proposals=32, rungs=rungs)
