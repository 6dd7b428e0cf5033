"""A few kills on a cluster of four nodes; the job itself does more of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_a_search_of_60_proposals_ends_the_same_after_4_kills(tmp_path: Path) -> None:
    summary = tmp_path / "chaos.json"
    command = [sys.executable, "jobs/experiments/chaos.py", "--seeds", "1", "--kills", "4"]
    done = subprocess.run(
        [*command, "--proposals", "60", "--output", str(summary)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    [trial] = json.loads(summary.read_text())
    assert trial["kills"] == {"worker": 1, "exit": 1, "node": 1, "model": 1}
    assert trial["is_equal"] is True
