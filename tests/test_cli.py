from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fppmo_ray.service.journal.facts import Asked, EpochFinished, Scored, Started
from fppmo_ray.service.journal.run_directory import open_run

REPOSITORY = Path(__file__).resolve().parents[1]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def fppmo_ray(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run("-c", "from fppmo_ray.cli import main; main()", *arguments)


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    """The run directory of a search that has scored one of 32 proposals."""
    with open_run(tmp_path, resume=False) as directory:
        directory.record(
            [
                Started(
                    search_id="c0ffee",
                    identity={"settings": {"macs_cut": 0.5, "proposals": 32}},
                    versions={},
                    groups=["conv1"],
                    dense_macs=1000,
                ),
                EpochFinished(
                    task="baseline",
                    epoch=4,
                    train_loss=0.25,
                    seconds=1,
                    artifact="a",
                    sha256="b",
                ),
                Asked(id=0, generation=0, macs=499, mask="gA=="),
                Scored(
                    id=0,
                    round=1,
                    rung=0,
                    val_loss=0.5,
                    val_accuracy=0.875,
                    seconds=1,
                    worker="0",
                    at=0,
                ),
            ]
        )
    return tmp_path


def test_status_says_how_far_a_search_is(unfinished: Path) -> None:
    done = fppmo_ray("status", str(unfinished))
    assert done.returncode == 0
    for part in ("c0ffee", "searching", "1 scored, 0 failed of 32", "0.8750", "epoch 4 done"):
        assert part in done.stdout


def test_exporting_from_an_unfinished_search_is_refused_in_a_sentence(unfinished: Path) -> None:
    done = fppmo_ray("export", str(unfinished), "--output", str(unfinished / "out"))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "has not finished" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_status_of_a_folder_without_a_search_is_refused_in_a_sentence(tmp_path: Path) -> None:
    done = fppmo_ray("status", str(tmp_path))
    assert done.returncode == 1
    assert "holds no journal.jsonl; expected the run directory of a search" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_relative_run_directory_is_refused_inside_a_ray_job() -> None:
    done = run(
        "jobs/digits.py",
        "--run-dir",
        "runs/lost",
        RAY_JOB_CONFIG_JSON_ENV_VAR=json.dumps({}),
    )
    assert done.returncode == 1
    assert "run directory runs/lost is relative" in done.stderr
    assert not (REPOSITORY / "runs" / "lost").exists()


def test_resuming_where_nothing_began_is_refused_in_a_sentence(tmp_path: Path) -> None:
    done = run("jobs/digits.py", "--run-dir", str(tmp_path / "none"), "--resume")
    assert done.returncode == 1
    assert "holds no journal.jsonl; start it without --resume" in done.stderr
    assert "Traceback" not in done.stderr
