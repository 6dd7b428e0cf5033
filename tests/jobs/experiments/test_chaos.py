"""A few kills on a cluster of four nodes; the job itself does more of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from archive import read_rows, unflattened

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_a_search_of_60_proposals_ends_the_same_after_4_kills(tmp_path: Path) -> None:
    summary = tmp_path / "chaos.csv"
    command = [sys.executable, "jobs/experiments/chaos.py", "--seeds", "1", "--kills", "4"]
    done = subprocess.run(
        [*command, "--proposals", "60", "--output", str(summary)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    [trial] = [unflattened(row) for row in read_rows(summary)]
    assert trial["kills"] == {"worker": 1, "exit": 1, "node": 1, "model": 1}
    assert trial["is_equal"] is True
