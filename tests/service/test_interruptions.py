"""A driver that is asked to stop, and one whose cluster is lost: both go on by resume."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from simulated_driver import SETTINGS

from fppmo_ray.distribution import Feedback, Proposal
from fppmo_ray.service.journal.facts import EpochFinished, Fact, pack_mask
from fppmo_ray.service.journal.run_directory import read_journal
from fppmo_ray.testing.simulated_search import Pace, simulated_search

REPOSITORY = Path(__file__).resolve().parents[2]
DRIVER = Path(__file__).with_name("simulated_driver.py")
RAY = Path(sys.executable).with_name("ray")


@pytest.fixture(scope="module")
def undisturbed(
    local_ray: None, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[int, str, float]]:
    """The trajectory of a search that nothing happens to."""
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    simulated_search(run_dir, SETTINGS, pace=Pace(mean_seconds=0.0))
    return trajectory(run_dir)


def trajectory(run_dir: Path) -> list[tuple[int, str, float]]:
    """Sorted (id, mask, loss) of all proposals."""
    facts = read_journal(run_dir)
    asked = [fact for fact in facts if isinstance(fact, Proposal)]
    masks = {fact.proposal_id: pack_mask(fact.keep) for fact in asked}
    return sorted(
        (fact.proposal_id, masks[fact.proposal_id], fact.val_loss)
        for fact in facts
        if isinstance(fact, Feedback)
    )


def count(kind: type[Fact], run_dir: Path) -> int:
    """Facts of a kind in the journal of a search that may not have begun."""
    if not (run_dir / "journal.jsonl").is_file():
        return 0
    return sum(isinstance(fact, kind) for fact in read_journal(run_dir))


def start(run_dir: Path, score_seconds: float, *flags: str) -> subprocess.Popen[str]:
    """The driver in a process group of its own."""
    command = [sys.executable, str(DRIVER), "--run-dir", str(run_dir)]
    return subprocess.Popen(
        [*command, "--score-seconds", str(score_seconds), *flags],
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_driver_that_is_terminated_ends_after_its_running_scores_and_can_be_resumed(
    undisturbed: list[tuple[int, str, float]], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    address = ray.get_runtime_context().gcs_address
    driver = start(run_dir, 0.6, "--address", address)  # a Ray of its own takes seconds to start
    wait_until(lambda: count(Feedback, run_dir) >= 2)
    before = count(Feedback, run_dir)
    driver.terminate()
    _, log = driver.communicate(timeout=120)
    scored = count(Feedback, run_dir)
    assert driver.returncode == 143
    assert f"stopped on request: {scored} of 32 proposals are scored; go on with --resume" in log
    assert before < scored <= before + 4  # the two that ran, and two that may have begun meanwhile
    simulated_search(run_dir, SETTINGS, pace=Pace(mean_seconds=0.0), resume=True)
    assert trajectory(run_dir) == undisturbed


@pytest.mark.slow
def test_a_second_interrupt_ends_a_driver_that_waits_for_its_scores(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    driver = start(run_dir, 5.0)
    wait_until(lambda: count(Feedback, run_dir) >= 1)  # and the next score is under way
    assert driver.stderr is not None
    os.killpg(driver.pid, signal.SIGINT)  # as Ctrl-C does
    for line in driver.stderr:
        if "stopping once the running calls have ended" in line:
            break
    os.killpg(driver.pid, signal.SIGINT)
    driver.communicate(timeout=120)
    assert driver.returncode not in (0, 143)


@pytest.mark.slow
def test_a_driver_that_is_terminated_while_it_trains_ends_after_its_epoch(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    driver = subprocess.Popen(
        [sys.executable, "jobs/digits.py", "--run-dir", str(run_dir)],
        cwd=REPOSITORY,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: count(EpochFinished, run_dir) >= 1)
    driver.terminate()
    _, log = driver.communicate(timeout=120)
    assert driver.returncode == 143
    assert "stopped on request: 0 of 96 proposals are scored; go on with --resume" in log
    assert 1 <= count(EpochFinished, run_dir) < 12
    assert isinstance(read_journal(run_dir)[-1], EpochFinished)


@pytest.fixture
def head() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The address of a head node without dashboard, and its process group."""
    port, agent = free_port(), free_port()
    head = subprocess.Popen(
        [
            *(RAY, "start", "--head", "--block", "--num-cpus=2", "--include-dashboard=false"),
            *("--node-ip-address=127.0.0.1", f"--port={port}"),
            f"--dashboard-agent-listen-port={agent}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_until(lambda: accepts(port))
    yield f"127.0.0.1:{port}", head
    if head.poll() is None:
        os.killpg(head.pid, signal.SIGKILL)
    head.wait()


def accepts(port: int) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.mark.slow
def test_a_search_whose_cluster_is_lost_goes_on_with_another(
    undisturbed: list[tuple[int, str, float]],
    head: tuple[str, subprocess.Popen[bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address, cluster = head
    run_dir = tmp_path / "run"
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "3")  # a minute by default
    driver = start(run_dir, 0.3, "--address", address)
    wait_until(lambda: count(Feedback, run_dir) >= 8)
    os.killpg(cluster.pid, signal.SIGKILL)
    driver.communicate(timeout=120)  # it ends by itself: a cluster does not come back
    assert driver.returncode != 0
    assert 8 <= count(Feedback, run_dir) < SETTINGS.num_proposals
    simulated_search(run_dir, SETTINGS, pace=Pace(mean_seconds=0.0), resume=True)
    assert trajectory(run_dir) == undisturbed
