"""The script for the first minutes on a GPU: its commands, and a rehearsal on CPUs."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from job_files import parse_job

from fppmo_ray import Resources

REPOSITORY = Path(__file__).resolve().parents[3]
SCRIPT = REPOSITORY / "jobs" / "experiments" / "first_gpu.sh"


def run(step: str, data: Path, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPT), step, str(data), str(out)],
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def commands(step: str, tmp_path: Path, **environment: str) -> list[list[str]]:
    printed = run(step, Path("/data"), tmp_path, PRINT="1", **environment)
    assert printed.returncode == 0, printed.stderr
    return [shlex.split(line) for line in sorted(printed.stdout.splitlines())]


def test_both_networks_share_the_gpu_and_their_jobs_accept_the_flags(tmp_path: Path) -> None:
    trained = [parse_job(words) for words in commands("baselines", tmp_path)]
    assert [heard["network"] for heard in trained] == ["resnet110", "resnet56"]
    assert [heard["resources"] for heard in trained] == [Resources(gpus=0.5)] * 2
    assert all(heard["cuda_graphs"] for heard in trained)
    pruned = [parse_job(words) for words in commands("searches", tmp_path)]
    assert [heard["resources"] for heard in pruned] == [Resources(workers=2, gpus=0.25)] * 2
    for baseline, search in zip(trained, pruned, strict=True):
        assert search["weights"] == baseline["output"] / "weights.pt"
        assert search["resume_or_start"]
        assert search["settings"].numerics.autotune
    tests, check = commands("check", tmp_path)
    assert tests[1:6] == ["-m", "pytest", "-q", "-m", "gpu"]
    assert parse_job(check)["output"] == tmp_path / "gpu_check.json"
    [rehearsal] = commands("check", tmp_path, GPUS="0")
    assert parse_job(rehearsal)["dry"]


def test_an_unknown_step_is_refused(tmp_path: Path) -> None:
    assert run("everything", tmp_path, tmp_path).returncode == 2


@pytest.mark.slow
def test_the_rehearsal_trains_searches_and_goes_on(few_images: Path, tmp_path: Path) -> None:
    small = {"GPUS": "0", "EPOCHS": "1", "PROPOSALS": "16", "NETWORKS": "resnet20"}
    cut_off = run("baselines", few_images, tmp_path, **small, LIMIT="1")
    assert "baseline-resnet20: not finished, repeat the step" in cut_off.stdout
    assert cut_off.returncode != 0
    for step in ("baselines", "searches"):
        done = run(step, few_images, tmp_path, **small)
        assert done.returncode == 0, done.stdout
    result = json.loads((tmp_path / "search-resnet20" / "result.json").read_bytes())
    names = [row["name"] for row in result["variants"]]
    assert names == ["dense", "importance-only", "allocation", "fppmo"]
