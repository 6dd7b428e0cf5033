"""The cost of pruning: a line for each network, of times that add up."""

from __future__ import annotations

import cost
import pytest


@pytest.mark.filterwarnings("ignore:channel groups left whole")
def test_the_table_has_the_times_of_both_and_of_48_scores(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cost.main(("resnet20",), images=20)
    line = next(line for line in capsys.readouterr().out.splitlines() if "resnet20" in line)
    cells = [cell.strip() for cell in line.split("│")[1:-1]]
    assert cells[:2] == ["resnet20", "20"]
    assert cells[3] == ""  # FastNAS was not asked for
    rival, own, ratio, score, scores = (
        float(cells[index].replace(",", "")) for index in (2, 4, 5, 6, 7)
    )
    assert own > rival >= 0
    assert ratio > 1
    assert scores == pytest.approx(48 * score, abs=0.75)  # the table rounds to a hundredth
