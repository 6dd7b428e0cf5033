from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fppmo_ray.distribution import Feedback, Proposal
from fppmo_ray.service.journal.facts import EpochFinished, Started
from fppmo_ray.service.journal.run_directory import open_run
from fppmo_ray.service.setting_groups import Scoring
from fppmo_ray.service.settings import SearchSettings

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
    """Write a search that has scored two of 32 proposals, the better one with the higher loss."""
    settings = SearchSettings(macs_cut=0.5, proposals=32, scoring=Scoring(capacity_weight=1.0))
    proposals = [
        Proposal(
            proposal_id=i,
            generation=0,
            keep=np.array([True, False, i == 0]),
            macs=499,
            parameters=parameters,
        )
        for i, parameters in enumerate((250, 1000))
    ]
    scores = [
        Feedback(proposal_id=0, val_loss=0.25, val_accuracy=0.75, seconds=1.0, at=0.0),
        Feedback(proposal_id=1, val_loss=0.5, val_accuracy=0.875, seconds=1.0, at=0.0),
    ]
    started = Started(
        search_id="c0ffee",
        identity={"settings": settings.journaled()},
        versions={},
        groups=["conv1"],
        num_filters=3,
        dense_macs=1000,
        dense_parameters=1000,
    )
    baseline = EpochFinished(
        task="baseline", epoch=4, train_loss=0.25, seconds=1, artifact="a", sha256="b"
    )
    with open_run(tmp_path, resume=False, started=started) as directory:
        directory.record([baseline, *proposals, *scores])
    return tmp_path


def test_status_shows_how_far_a_search_is_and_its_best_proposal(unfinished: Path) -> None:
    done = fppmo_ray("status", str(unfinished))
    assert done.returncode == 0
    for part in ("c0ffee", "searching", "2 scored, 0 failed of 32", "epoch 4 done, loss 0.2500"):
        assert part in done.stdout
    # Weighed by the parameters left, 0.25 counts 1.0 and 0.5 stays 0.5.
    assert "best on search-val" in done.stdout
    assert "0.8750 (proposal 1)" in done.stdout


def test_exporting_from_an_unfinished_search_is_refused_in_a_sentence(unfinished: Path) -> None:
    done = fppmo_ray("export", str(unfinished), "--output", str(unfinished / "out"))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "has not finished" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_journal_is_named_with_the_command_that_repairs_it(unfinished: Path) -> None:
    journal = unfinished / "journal.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b'"val_loss":0.5', b'"val_loss":0.4'))
    done = fppmo_ray("status", str(unfinished))
    assert done.returncode == 1
    assert "line 6 is damaged: its checksum does not fit" in done.stderr
    assert f"`fppmo-ray repair {unfinished}` keeps the 5 lines before it" in done.stderr
    done = fppmo_ray("repair", str(unfinished))
    assert done.returncode == 0
    assert "now ends after line 5" in done.stdout
    assert "1 scored, 0 failed of 32" in fppmo_ray("status", str(unfinished)).stdout


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
