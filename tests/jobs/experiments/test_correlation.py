from __future__ import annotations

import numpy as np
import pytest
from agreement import correlation
from agreement.correlation import average_ranks, interval, noise, noise_beside_others, spearman
from agreement.correlation import top_quarter_recall as recall


def costs(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)


def test_ties_share_the_mean_of_their_ranks() -> None:
    assert average_ranks(costs(10, 20, 20, 5)).tolist() == [2, 3.5, 3.5, 1]
    assert average_ranks(np.array([[3.0, 1, 2], [7, 7, 7]])).tolist() == [[3, 1, 2], [2, 2, 2]]


def test_spearman_is_as_computed_by_hand() -> None:
    # 1 - 6 (1 + 1 + 1 + 1) / (5 * 24)
    assert spearman(costs(1, 2, 3, 4, 5), costs(2, 1, 4, 3, 5)) == pytest.approx(0.8)
    # ranks 1, 2.5, 2.5, 4: products sum up to 4.5, squares to 4.5 and 5
    assert spearman(costs(1, 2, 2, 3), costs(1, 2, 3, 4)) == pytest.approx(4.5 / 22.5**0.5)
    assert spearman(costs(1, 2, 3), costs(100, 8, 8 - 1e-9)) == pytest.approx(-1)
    assert np.isnan(spearman(costs(1, 1, 1), costs(1, 2, 3)))


def test_recall_is_the_share_of_the_true_best_quarter_that_is_found() -> None:
    truth = costs(8, 1, 2, 7, 6, 5, 4, 3)  # the best two of eight: 1 and 2
    assert recall(costs(9, 1, 2, 8, 7, 6, 5, 3), truth) == 1
    assert recall(costs(1, 0, 2, 8, 7, 6, 5, 3), truth) == 0.5
    assert recall(costs(0, 8, 7, 1, 2, 3, 4, 5), truth) == 0
    assert recall(costs(1, 2, 3), costs(1, 3, 2)) == 1  # of three masks the best one


def test_agreement_is_the_mean_over_seeds_of_single_scores() -> None:
    two_seeds = np.array([[1.0, 2, 3, 4, 5], [2, 1, 4, 3, 5]])
    assert correlation.agreement(spearman, two_seeds, costs(1, 2, 3, 4, 5)) == pytest.approx(0.9)


def test_the_interval_is_reproducible_and_holds_the_value() -> None:
    rng = np.random.default_rng(3)
    truth = rng.standard_normal(24)
    scores = truth + rng.standard_normal((3, 24))
    low, high = interval(spearman, scores, truth)
    assert (low, high) == interval(spearman, scores, truth)
    assert -1 < low < correlation.agreement(spearman, scores, truth) < high < 1
    assert interval(spearman, truth[None], truth) == (pytest.approx(1), pytest.approx(1))
    assert np.isnan(interval(spearman, np.ones((1, 5)), truth[:5])).all()


def test_what_a_seed_does_to_all_masks_alike_is_noise_but_moves_no_ranks() -> None:
    shifted = np.array([[1.0, 2, 3], [3, 4, 5]])
    assert noise(shifted) == pytest.approx(2**0.5)
    assert noise_beside_others(shifted) == pytest.approx(0)
    crossed = np.array([[0.0, 2], [2, 0]])  # residuals of 1, one degree of freedom
    assert noise_beside_others(crossed) == pytest.approx(2)
    assert np.isnan(noise(shifted[:1]))
    assert np.isnan(noise_beside_others(shifted[:1]))
