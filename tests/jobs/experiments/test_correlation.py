from __future__ import annotations

import numpy as np
import pytest
from agreement.correlation import average_ranks, spearman


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
