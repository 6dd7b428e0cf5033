"""What travels between the probability model and the workers."""

from __future__ import annotations

import numpy as np
import pytest

from fppmo_ray.distribution import Feedback, pack_mask, unpack_mask


def test_a_packed_mask_is_short_text_and_comes_back():
    keep = np.array([1, 0, 1, 1, 0, 0, 0, 0, 1], dtype=bool)
    assert pack_mask(keep) == "sIA="
    assert unpack_mask("sIA=", 9).tolist() == keep.tolist()


def test_a_mask_of_another_network_is_refused():
    with pytest.raises(ValueError, match="belongs to another network"):
        unpack_mask("sIA=", 30)


@pytest.mark.parametrize(
    "scores",
    [
        {"val_loss": float("nan"), "val_accuracy": 0.5},
        {"val_loss": 1.0, "val_accuracy": float("inf")},
        {"val_accuracy": 0.5},
        {},
    ],
)
def test_feedback_without_finite_scores_is_refused(scores):
    with pytest.raises(ValueError, match="proposal 4 must be finite"):
        Feedback(proposal_id=4, **scores)


def test_feedback_of_what_classifies_nothing_has_no_accuracy():
    assert Feedback(proposal_id=4, val_loss=-31.5).val_accuracy is None


def test_failed_feedback_has_no_score():
    assert Feedback(proposal_id=4, error="diverged").failed
    with pytest.raises(ValueError, match="must have no score"):
        Feedback(proposal_id=4, error="diverged", val_loss=1.0, val_accuracy=0.1)


def test_a_rung_below_zero_is_refused():
    with pytest.raises(ValueError, match="rung of proposal 4 must be at least 0, got -1"):
        Feedback(proposal_id=4, val_loss=1.0, val_accuracy=0.1, rung=-1)
