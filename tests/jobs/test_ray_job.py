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
from ray.job_submission import JobStatus, JobSubmissionClient

from fppmo_ray.service.facts import Finished, Scored
from fppmo_ray.service.run_directory import read_journal

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[JobSubmissionClient]:
    """A head node on ports of its own, stopped with all its processes in the end."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    port, dashboard, agent = free_port(), free_port(), free_port()
    head = subprocess.Popen(
        [
            Path(sys.executable).with_name("ray"),
            *("start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1"),
            *(f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
            f"--dashboard-agent-listen-port={agent}",
        ],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield connect(f"http://127.0.0.1:{dashboard}")
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        try:
            head.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)


def connect(address: str) -> JobSubmissionClient:
    deadline = time.monotonic() + 90
    while True:
        try:
            return JobSubmissionClient(address)
        except ConnectionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


def submit(client: JobSubmissionClient, entrypoint: str) -> str:
    """Submit as soon as the node's agent is there to start jobs."""
    deadline = time.monotonic() + 60
    while True:
        try:
            job_id: str = client.submit_job(
                entrypoint=f"{sys.executable} {entrypoint}",
                runtime_env={"working_dir": str(REPOSITORY)},
            )
            return job_id
        except RuntimeError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


def wait_for(client: JobSubmissionClient, job_id: str) -> JobStatus:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        status = client.get_job_status(job_id)
        if status.is_terminal():
            return status
        time.sleep(1)
    return client.get_job_status(job_id)


def test_a_submitted_job_searches_to_its_end(client: JobSubmissionClient, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job_id = submit(client, f"jobs/digits.py --run-dir {run_dir} --proposals 32")
    assert wait_for(client, job_id) == JobStatus.SUCCEEDED
    facts = read_journal(run_dir)
    assert sum(isinstance(fact, Scored) for fact in facts) == 32
    assert isinstance(facts[-1], Finished)
    assert "FPPMO" in client.get_job_logs(job_id)


def test_a_submitted_job_refuses_a_run_directory_that_would_be_deleted(
    client: JobSubmissionClient,
) -> None:
    job_id = submit(client, "jobs/digits.py --run-dir runs/lost")
    assert wait_for(client, job_id) == JobStatus.FAILED
    assert "run directory runs/lost is relative" in client.get_job_logs(job_id)
