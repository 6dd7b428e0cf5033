"""The demo as a submitted Ray job on a cluster of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fppmo_ray.service.record.facts import Finished, Scored
from fppmo_ray.service.record.run_directory import read_journal

pytestmark = pytest.mark.slow

RAY = Path(sys.executable).with_name("ray")
REPOSITORY = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture
def dashboard() -> Iterator[str]:
    """The address of a head node on ports of its own, stopped with all its processes."""
    port, dashboard, agent = free_port(), free_port(), free_port()
    head = subprocess.Popen(
        [
            *(RAY, "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1"),
            *(f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
            f"--dashboard-agent-listen-port={agent}",
        ],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        try:
            head.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
            head.wait()


def submit(dashboard: str, *entrypoint: str) -> subprocess.CompletedProcess[str]:
    """``ray job submit`` from the repository, as soon as the cluster takes jobs."""
    deadline = time.monotonic() + 90
    while True:
        done = subprocess.run(
            [
                *(RAY, "job", "submit", "--address", dashboard, "--working-dir", "."),
                *("--", sys.executable, *entrypoint),
            ],
            cwd=REPOSITORY,
            env=os.environ | {"RAY_AUTH_MODE": "token"},
            capture_output=True,
            text=True,
        )
        is_up = "Failed to connect" not in done.stderr and "No available agent" not in done.stderr
        if is_up or time.monotonic() > deadline:
            return done
        time.sleep(1)


def test_a_submitted_job_searches_to_its_end_and_refuses_a_directory_that_would_be_deleted(
    dashboard: str, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    done = submit(dashboard, "jobs/digits.py", "--run-dir", str(run_dir), "--proposals", "32")
    assert done.returncode == 0, done.stderr
    assert "FPPMO" in done.stdout
    facts = read_journal(run_dir)
    assert sum(isinstance(fact, Scored) for fact in facts) == 32
    assert isinstance(facts[-1], Finished)
    done = submit(dashboard, "jobs/digits.py", "--run-dir", "runs/lost")
    assert done.returncode == 1
    assert "run directory runs/lost is relative" in done.stdout
