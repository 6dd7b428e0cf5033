"""A Ray head of one's own, with a dashboard, a token and 4 pretended CPUs."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fppmo_ray.distribution import Feedback
from fppmo_ray.service.journal.run_directory import read_journal

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = Path(sys.executable).parent


@dataclass(frozen=True)
class Head:
    """A running head node, and a user's shell to speak to it from."""

    address: str
    """Of the dashboard."""
    metrics: str
    """Where Prometheus would look."""
    token: str
    environment: dict[str, str]

    def run(
        self, *command: str | Path, cwd: Path = REPOSITORY, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(part) for part in command],
            cwd=cwd,
            env=self.environment | environment,
            capture_output=True,
            text=True,
        )

    def fppmo_ray(
        self, *arguments: str | Path, cwd: Path = REPOSITORY, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        code = "from fppmo_ray.cli import main; main()"
        everything = (*arguments, "--address", self.address)
        return self.run(sys.executable, "-c", code, *everything, cwd=cwd, **environment)

    def submit(self, *arguments: str | Path, cwd: Path = REPOSITORY) -> str:
        """The id of a submitted search."""
        done = self.fppmo_ray("submit", *arguments, cwd=cwd)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[1]

    def state(self, search: str) -> str:
        """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
        return self.fppmo_ray("status", search).stdout.split()[2]


def stop_and_go_on(head: Head, *command: str | Path, begun: Callable[[], bool]) -> str:
    """Submit a job, stop it once it has begun something, and let what that prints end it.

    Returns:
        The log of the job that was stopped.
    """
    job = head.submit(*command)
    wait_until(begun, "something begun", seconds=600)
    stopped = head.fppmo_ray("stop", job)
    assert stopped.returncode == 0, stopped.stderr
    assert f"search {job}  STOPPED" in stopped.stdout
    way_on = stopped.stdout.splitlines()[-1].split()
    assert way_on[:2] == ["fppmo-ray", "submit"]
    assert way_on[-2:] == ["--address", head.address]
    done = head.fppmo_ray(*way_on[1:-2], "--follow")
    assert done.returncode == 0, done.stdout + done.stderr
    return head.fppmo_ray("logs", job).stdout


def wait_until(holds: Callable[[], bool], what: str, *, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.3)


def num_scored(run_dir: Path) -> int:
    """Scores in the journal of a search that may not have begun."""
    if not (run_dir / "journal.jsonl").is_file():
        return 0
    facts = read_journal(run_dir)
    return sum(isinstance(fact, Feedback) and not fact.failed for fact in facts)


@contextmanager
def ray_head() -> Iterator[Head]:
    """A head node on ports and in a folder of its own, stopped with all its processes.

    The folder says which Ray a submitted job joins: in a shared one, the last that was started.
    """
    port, dashboard, agent, metrics, client = (free_port() for _ in range(5))
    token = secrets.token_hex(32)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = clean | {
        "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",  # a job's python is the cluster's
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_metrics_report_interval_ms": "1000",
    }
    command = [
        *(SCRIPTS / "ray", "start", "--head", "--block", "--num-cpus=4"),
        *("--node-ip-address=127.0.0.1", f"--port={port}", "--dashboard-host=127.0.0.1"),
        *(f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
        *(f"--metrics-export-port={metrics}", f"--ray-client-server-port={client}"),
    ]
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [*command, f"--temp-dir={folder}"],
            cwd=folder,
            env=environment,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        urls = (f"http://127.0.0.1:{number}" for number in (dashboard, metrics))
        head = Head(*urls, token, environment)
        try:
            wait_until(lambda: takes_jobs(head), "a head that takes jobs")
            yield head
        finally:
            stop(process)


def takes_jobs(head: Head) -> bool:
    """Whether the head has an agent to run jobs, too: it has run one."""
    request = urllib.request.Request(
        f"{head.address}/api/jobs/",
        data=b'{"entrypoint": "true"}',
        headers={"Authorization": f"Bearer {head.token}", "Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=10):
            return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()  # it ends the others, and cannot if they get the signal too
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
