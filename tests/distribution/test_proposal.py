"""The records of a search: proposals and their feedback."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from fppmo_ray.distribution import Feedback, Proposal
from fppmo_ray.distribution.proposal import PackedMask


@pytest.mark.parametrize(
    "scores",
    [
        {"val_loss": float("nan"), "val_accuracy": 0.5},
        {"val_loss": 1.0, "val_accuracy": float("inf")},
        {"val_accuracy": 0.5},
        {"val_loss": 1.7e308},
        {"val_loss": -1.1e100},
        {},
    ],
)
def test_feedback_without_finite_scores_is_refused(scores):
    with pytest.raises(ValueError, match="proposal 4 must be finite"):
        Feedback(proposal_id=4, **scores)


def test_feedback_of_what_classifies_nothing_has_no_accuracy():
    assert Feedback(proposal_id=4, val_loss=-31.5).val_accuracy is None


def test_failed_feedback_has_no_score():
    failure = Feedback(proposal_id=4, error="diverged")
    assert failure.failed
    assert failure.score is None
    with pytest.raises(ValueError, match="must have no score"):
        Feedback(proposal_id=4, error="diverged", val_loss=1.0, val_accuracy=0.1)


def test_people_read_the_accuracy_and_else_the_score_of_the_users_own_task():
    assert Feedback(proposal_id=4, val_loss=0.7, val_accuracy=0.9).score == 0.9
    assert Feedback(proposal_id=4, val_loss=0.7, val_accuracy=0.0).score == 0.0
    assert Feedback(proposal_id=4, val_loss=-31.5).score == 31.5


def test_steps_below_zero_are_refused():
    with pytest.raises(ValueError, match="steps of proposal 4 must be at least 0, got -1"):
        Feedback(proposal_id=4, val_loss=1.0, val_accuracy=0.1, steps=-1)


def test_packed_masks_come_back_as_copies():
    keep = np.array([1, 0, 1, 1, 0, 0, 0, 0, 1], dtype=bool)
    proposal = Proposal(proposal_id=0, generation=0, keep=keep, macs=1)
    assert proposal.packed == PackedMask.of(keep) == (b"\xb0\x80", 9)
    proposal.keep[:] = False
    keep[:] = True
    assert proposal.keep.tolist() == [1, 0, 1, 1, 0, 0, 0, 0, 1]
    again = Proposal(proposal_id=0, generation=0, keep=proposal.packed, macs=1)
    assert np.array_equal(again.keep, proposal.keep)
    with pytest.raises(AttributeError):
        again.macs = 2


def test_figures_are_as_small_or_as_large_as_their_means_and_squares_allow():
    for loss in (5e-324, -1e100, 1e100, 0.0):
        assert Feedback(proposal_id=4, val_loss=loss).val_loss == loss
    with pytest.raises(
        ValueError, match=r"got 1\.7e\+308, which is beyond 1e\+100 in size; report"
    ):
        Feedback(proposal_id=4, val_loss=1.7e308)


def test_a_pickled_proposal_comes_back_whole_with_its_mask_as_bits():
    keep = np.random.default_rng(0).random(1003) < 0.5
    sent = Proposal(
        proposal_id=3,
        generation=1,
        keep=keep,
        macs=7,
        parameters=9,
        score_seed=(4, 1),
        macs_cut=0.5,
    )
    packed = pickle.dumps(sent)
    assert len(packed) < 1003 // 8 + 300
    back = pickle.loads(packed)
    assert np.array_equal(back.keep, keep)
    assert back.keep.dtype == bool
    others = (back.proposal_id, back.generation, back.macs, back.parameters, back.score_seed)
    assert (*others, back.macs_cut) == (3, 1, 7, 9, (4, 1), 0.5)
