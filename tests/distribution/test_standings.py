"""Who goes on to a deeper score, and who is best: a function of the feedback alone."""

from __future__ import annotations

import random

import pytest

from fppmo_ray.distribution import Feedback, OptimizerSettings, Standings


def standings(rungs=(10, 50), rank_by="val_loss"):
    settings = OptimizerSettings(macs_cut=0.5, num_proposals=32, rungs=rungs, rank_by=rank_by)
    return Standings(settings)


def score(proposal_id, loss, rung=10, accuracy=0.5):
    return Feedback(proposal_id=proposal_id, val_loss=loss, val_accuracy=accuracy, rung=rung)


def failure(proposal_id, rung=10):
    return Feedback(proposal_id=proposal_id, error="NaN", rung=rung)


def told(*feedback, **settings):
    standing = standings(**settings)
    for item in feedback:
        assert standing.add(item)
    return standing


def promoted(standing, ids, rung=50):
    return [i for i, at in standing.wanted(ids) if at == rung]


LOSSES = 0.5, 0.1, 0.4, 0.2, 0.6, 0.3, 0.7
SCREENED = [score(i, loss) for i, loss in enumerate(LOSSES)]


def test_without_feedback_a_generation_is_wanted_at_the_first_rung():
    assert standings().wanted(range(3)) == [(0, 10), (1, 10), (2, 10)]
    assert standings(rungs=()).wanted(range(3)) == [(0, None), (1, None), (2, None)]


def test_the_best_third_goes_on_in_the_order_of_ids():
    assert promoted(told(*SCREENED), range(7)) == [1, 3, 5]


def test_nobody_goes_on_before_the_last_score_of_the_rung_is_in():
    standing = told(*SCREENED[:-1])
    assert promoted(standing, range(7)) == []
    assert not standing.is_over(range(7))


@pytest.mark.parametrize(
    ("num_scored", "num_promoted"),
    [(1, 1), (2, 2), (3, 2), (6, 2), (7, 3), (9, 3), (10, 4), (16, 6), (17, 6)],
)
def test_a_third_is_rounded_up_and_two_at_least_where_there_are_two(num_scored, num_promoted):
    standing = told(*(score(i, 1.0 + i) for i in range(num_scored)))
    assert promoted(standing, range(num_scored)) == list(range(num_promoted))


def test_equal_scores_go_on_by_id():
    assert promoted(told(*(score(i, 1.0) for i in range(7))), range(7)) == [0, 1, 2]


def test_accuracy_promotes_where_it_ranks():
    feedback = [score(i, loss=1.0 + i, accuracy=0.1 * i) for i in range(6)]
    assert promoted(told(*feedback, rank_by="val_accuracy"), range(6)) == [4, 5]


def test_what_failed_does_not_go_on_and_the_third_is_of_the_others():
    feedback = [failure(i) if i in (1, 3, 5) else score(i, LOSSES[i]) for i in range(7)]
    assert promoted(told(*feedback), range(7)) == [0, 2]


def test_if_all_failed_nobody_goes_on_and_the_generation_is_over():
    standing = told(*(failure(i) for i in range(4)))
    assert standing.wanted(range(4)) == [(i, 10) for i in range(4)]
    assert standing.is_over(range(4))
    assert [item.proposal_id for item in standing.failed_together(range(4))] == [0, 1, 2, 3]


def test_a_generation_is_over_once_the_promoted_have_ended():
    standing = told(*SCREENED, score(1, 0.3, 50), failure(3, 50))
    assert not standing.is_over(range(7))
    assert standing.add(score(5, 0.2, 50))
    assert standing.is_over(range(7))
    assert standing.failed_together(range(7)) == []


def test_a_generation_whose_promoted_all_failed_has_failed_together():
    standing = told(*SCREENED, *(failure(i, 50) for i in (1, 3, 5)))
    failures = standing.failed_together(range(7))
    assert [(item.proposal_id, item.rung) for item in failures] == [(1, 50), (3, 50), (5, 50)]


def test_the_deeper_rung_ranks_first_and_what_failed_there_has_failed():
    standing = told(*SCREENED, score(1, 0.9, 50), failure(3, 50), score(5, 0.8, 50))
    assert standing.ranked(range(7)) == [5, 1, 2, 0, 4, 6]


def test_of_three_rungs_each_takes_a_third_of_the_one_before():
    standing = told(*(score(i, 1.0 + i, 0) for i in range(18)), rungs=(0, 10, 50))
    assert promoted(standing, range(18), 10) == [0, 1, 2, 3, 4, 5]
    for i in range(6):
        assert promoted(standing, range(18), 50) == []
        assert standing.add(score(i, 1.0 - i / 10, 10))  # turned round
    assert promoted(standing, range(18), 50) == [4, 5]


def test_a_score_told_twice_at_a_rung_counts_once():
    standing = told(*SCREENED)
    assert not standing.add(failure(1))
    assert not standing.add(score(6, 0.0))
    assert promoted(standing, range(7)) == [1, 3, 5]


def test_the_order_of_arrival_does_not_matter():
    feedback = [*SCREENED, score(1, 0.9, 50), failure(3, 50), score(5, 0.8, 50)]
    expected = told(*feedback)
    for seed in range(20):
        shuffled = told(*random.Random(seed).sample(feedback, len(feedback)))
        assert shuffled.wanted(range(7)) == expected.wanted(range(7))
        assert shuffled.ranked(range(7)) == expected.ranked(range(7))


def test_the_scores_to_come_are_foreseen_and_fewer_once_some_have_failed():
    standing, generation = standings(rungs=(0, 10, 50)), range(16)
    assert standing.num_scores(generation) == 16 + 6 + 2
    for i in generation:
        assert standing.add(failure(i, 0) if i % 2 else score(i, 1.0 + i, 0))
    assert standing.num_scores(generation) == 16 + 3 + 2
    assert standings(rungs=()).num_scores(generation) == 16
    assert told(*(failure(i, 0) for i in generation), rungs=(0, 10)).num_scores(generation) == 16


def test_without_rungs_the_first_feedback_ends_a_proposal_at_whatever_rung():
    standing = told(score(0, 0.5, 10), score(1, 0.7, 50), failure(2, 3), rungs=())
    assert standing.is_over(range(3))
    assert standing.ranked(range(3)) == [1, 0]
    assert not standing.add(score(0, 0.1, 50))


def test_scores_are_ranked_by_round_and_rung():
    settings = OptimizerSettings(
        macs_cut=0.5, num_proposals=32, population_size=4, rungs=(10, 50), round_starts=(1,)
    )
    standing = Standings(settings)
    for item in (score(0, 0.2), score(1, 0.1), failure(2), score(1, 0.5, rung=50), score(4, 0.9)):
        standing.add(item)
    # Proposals from 4 on are of the second round; 1 went on to 50 steps.
    assert standing.rankings(range(8)) == [[4], [1], [1, 0]]
