"""Commands to a cluster, as far as they go without one; tests/jobs has the rest."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fppmo_ray.job_client.commands import split_flags


def fppmo_ray(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-c", "from fppmo_ray.cli import main; main()", *arguments],
        cwd=cwd,
        env=clean | environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def nobody() -> str:
    """An address at which nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize(
    ("line", "ours", "jobs"),
    [
        ("job.py", "job.py", ""),
        ("job.py --stop_wait 5 --seed 1", "job.py --stop_wait 5", "--seed 1"),
        ("job.py --proposals 32 -v", "job.py", "--proposals 32 -v"),
        ("job.py --run-dir /r --address http://h:1", "job.py --address http://h:1", "--run-dir /r"),
        ("--address http://h:1 job.py --seed 1", "--address http://h:1 job.py", "--seed 1"),
        ("job.py --address=http://h:1 --seed 1", "job.py --address=http://h:1", "--seed 1"),
        ("job.py --a 1 --follow --b 2", "job.py --follow", "--a 1 --b 2"),
        ("job.py --stop-wait 30 x", "job.py --stop-wait 30", "x"),
        ("job.py --seed 1 -- --address its --follow", "job.py", "--seed 1 --address its --follow"),
        ("job.py --help", "job.py --help", ""),
        ("--nonsense job.py --seed 1", "--nonsense job.py", "--seed 1"),
        ("job.py --address", "job.py --address", ""),
    ],
)
def test_own_options_are_found_anywhere_before_a_double_dash_and_the_rest_is_the_jobs(
    line: str, ours: str, jobs: str
) -> None:
    assert split_flags(line.split()) == (ours.split(), jobs.split())


def test_the_command_line_starts_without_ray_and_torch() -> None:
    code = "import sys, fppmo_ray.cli; print(sorted({'ray', 'torch', 'pyarrow'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_cluster_that_does_not_answer_is_told_in_a_sentence(nobody: str, tmp_path: Path) -> None:
    (tmp_path / "job.py").touch()
    for command in ("list", "submit job.py"):
        done = fppmo_ray(*command.split(), "--address", nobody, cwd=tmp_path)
        assert done.returncode == 1
        assert done.stderr.startswith("error: no cluster answers")
        assert nobody in done.stderr
        assert "give --address http://HEAD:8265" in done.stderr
        assert "Traceback" not in done.stderr


def test_the_flag_counts_more_than_the_environment_and_that_more_than_the_default(
    nobody: str, tmp_path: Path
) -> None:
    environment = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}
    done = fppmo_ray("list", "--address", nobody, cwd=tmp_path, **environment)
    assert nobody in done.stderr
    done = fppmo_ray("list", cwd=tmp_path, **environment)
    assert "127.0.0.1:9)" in done.stderr


def test_a_job_file_that_is_not_there_is_refused_in_a_sentence(tmp_path: Path) -> None:
    for name in ("nono.py", "../outside.py", "/bin/sh"):
        done = fppmo_ray("submit", name, cwd=tmp_path)
        assert done.returncode == 1
        assert f"error: expected a job file below {tmp_path}" in done.stderr
        assert "Traceback" not in done.stderr
