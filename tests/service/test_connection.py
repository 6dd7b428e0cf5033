"""How a search joins Ray, and which lines of its workers reach the driver's stderr."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fppmo_ray.service.pool.cluster import Demand
from fppmo_ray.service.resources import (
    Resources,
    _check_resources,
    _line_filter,
    connection,
)

SCRIPT = """
import logging, sys, warnings
import torch
from torch import nn
from fppmo_ray import FunctionTask, Resources, SearchSettings, run_search
from fppmo_ray.service.resources import connection

def score(network, seed):
    print(f"printed with seed {seed}")
    warnings.warn("warned")
    logging.getLogger("theirs").warning("logged")
    return -sum(float(parameter.detach().abs().sum()) for parameter in network.parameters())

if __name__ == "__main__":
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 3)
    with connection(Resources()):
        run_search(
            nn.Sequential(*layers),
            FunctionTask(example_inputs=torch.zeros(1, 1, 8, 8), score=score),
            SearchSettings(macs_cut=0.4, proposals=16).changed(population=8, importance="l1"),
            run_dir=sys.argv[1],
            resources=Resources(workers=2),
        )
        print("searched", flush=True)
        sys.stdin.read()
"""
LOOPBACK = {
    "0100007F": "127.0.0.1",
    "0000000000000000FFFF00000100007F": "::ffff:127.0.0.1",
    "00000000000000000000000001000000": "::1",
}


def processes_below(process: int) -> set[int]:
    """The process and all that it started, by /proc."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            parents[int(folder.name)] = int(
                (folder / "stat").read_text().rpartition(")")[2].split()[1]
            )
    found, new = set(), {process}
    while new:
        found |= new
        new = {child for child, parent in parents.items() if parent in new}
    return found


def listening_addresses(process: int) -> list[str]:
    """The addresses of all TCP sockets on which a process or one that it started listens."""
    sockets = set()
    for each in processes_below(process):
        with contextlib.suppress(OSError):  # it has ended
            for link in Path(f"/proc/{each}/fd").iterdir():
                with contextlib.suppress(OSError):
                    sockets.add(os.readlink(link))
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]:
            entries = line.split()
            if entries[3] == "0A" and f"socket:[{entries[9]}]" in sockets:
                address = entries[1].partition(":")[0]
                found.append(LOOPBACK.get(address, address))
    return found


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    """What a search prints to stderr, and the addresses on which its own Ray listens."""
    folder = tmp_path_factory.mktemp("searched")
    (folder / "theirs.py").write_text(SCRIPT)
    with (folder / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "theirs.py", "run"],
            cwd=folder,
            env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        assert process.stdout is not None
        said = process.stdout.readline()
        addresses = listening_addresses(process.pid) if Path("/proc/net/tcp").exists() else []
        rest, _ = process.communicate()
    printed = (folder / "stderr").read_text()
    assert (process.returncode, said + rest) == (0, "searched\n"), printed
    return printed, addresses


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="finds sockets in /proc")
def test_a_ray_that_a_search_starts_listens_on_loopback_only(
    searched: tuple[str, list[str]],
) -> None:
    _, addresses = searched
    assert len(addresses) >= 5  # the driver, two workers, raylet and GCS at least
    assert {*addresses} <= {*LOOPBACK.values()}


def test_prints_warnings_and_logs_of_a_score_function_appear_once_on_the_drivers_stderr(
    searched: tuple[str, list[str]],
) -> None:
    printed, _ = searched
    of_workers = re.findall(r"^\w+\(\d, cpu\): (.*)$", printed, flags=re.MULTILINE)
    assert Counter(re.sub(r"^/.*/|\d+", "", line) for line in of_workers) == {
        "printed with seed ": 1,
        "theirs.py:: UserWarning: warned": 1,
        '  warnings.warn("warned")': 1,
        "logged": 1,
    }
    assert "pid=" not in printed  # Ray's own prefix
    assert "repeated" not in printed


def batch(*lines: str, pid: object = 17, actor: str | None = "PruningWorker(0, cpu)") -> dict:
    return {"pid": pid, "lines": lines, "actor_name": actor}


def test_lines_that_differ_in_numbers_only_are_shown_once() -> None:
    lines_to_show = _line_filter()
    assert lines_to_show(batch("epoch 1, loss 0.5", "", "epoch 2, loss 0.25")) == [
        "PruningWorker(0, cpu): epoch 1, loss 0.5"
    ]
    again = batch("epoch 3, loss 0.1", "done", actor=None)
    assert lines_to_show(again) == ["worker: done"]


def test_lines_of_ray_and_of_torchs_native_code_are_not_shown() -> None:
    lines_to_show = _line_filter()
    native = (
        "[W1126 14:41:58.123456 NNPACK.cpp:64] Could not initialize NNPACK!",
        "[rank1]:[W1126 14:41:58.123456 ProcessGroupNCCL.cpp:1250] Warning: no device id",
        "[2026-11-26 14:41:58,123 E 123 456] core_worker.cc:1 lost",
        "*** SIGTERM received at time=1700000000 on cpu 3 ***",
        "PC: @     0x7f11  (unknown)  (unknown)",
        "    @     0x7f12  (unknown)  (unknown)",
    )
    assert lines_to_show(batch(*native)) == []
    assert lines_to_show(batch("a node has joined", pid="autoscaler", actor=None)) == []
    assert lines_to_show(batch("out of memory", pid="raylet", actor=None)) == []
    assert lines_to_show(batch("Started a group", actor="TrainController")) == []
    assert lines_to_show(batch("[1] is a list")) == ["PruningWorker(0, cpu): [1] is a list"]


def test_a_flood_of_different_lines_ends_with_a_sentence_that_says_where_they_are() -> None:
    shown = _line_filter()(batch(*("x" * length for length in range(1, 400))))
    assert len(shown) == 201
    assert shown[-1].endswith(
        "workers print many different lines; the others are only in Ray's logs"
    )


@pytest.mark.usefixtures("local_ray")
def test_workers_that_fit_on_no_node_are_warned_about_at_the_start(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with connection(Resources(cpus=64)):
        pass
    assert [record.getMessage() for record in caplog.records] == [
        "no node has room for a worker: each asks for 64 CPUs and 0 GPUs; the cluster has 2 CPUs "
        "and 0 GPUs on 1 node (at most 2 CPUs and 0 GPUs on one), of which 2 CPUs and 0 GPUs are "
        "free; the search waits for a larger node to join; if none will, lower "
        "--cpus-per-worker or --gpus-per-worker"
    ]


@pytest.mark.usefixtures("local_ray")
def test_workers_that_fit_are_not_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), connection(Resources(cpus=2)):
        pass
    assert caplog.records == []


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("resources", "sentence"),
    [
        (
            Resources(gpus=1),
            r"no node has room for a worker: each asks for 1 CPU and 1 GPU; the cluster has 2 CPUs "
            r"and 0 GPUs .*; lower --cpus-per-worker or --gpus-per-worker, or set RAY_ADDR",
        ),
        (
            Resources(fine_tune_workers=3),
            r"there is room for 2 of 3 workers that fine-tune together: each asks for 1 CPU and 0 "
            r"GPUs; the cluster has 2 CPUs .*; lower --fine-tune-workers or --cpus-per-worker, ",
        ),
    ],
)
def test_workers_without_room_are_refused_where_no_node_can_join_and_else_warned_about(
    resources: Resources, sentence: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match=sentence):
        _check_resources(resources, is_alone=True)
    _check_resources(resources, is_alone=False)
    [message] = [record.getMessage() for record in caplog.records]
    assert message.startswith(sentence[:70])
    assert re.search(
        r"; the search waits for (a larger node|further nodes) to join; if non", message
    )
    caplog.clear()
    _check_resources(Resources(workers=9, fine_tune_workers=2), is_alone=True)
    assert not caplog.records


@pytest.mark.parametrize(
    ("demand", "count"),
    [
        (Demand(cpus=3), 2),
        (Demand(cpus=0.1), 70),
        (Demand(gpus=0.3), 6),
        (Demand(cpus=1, gpus=1), 2),
        (Demand(cpus=8), 0),
        (Demand(), math.inf),
    ],
)
def test_a_node_has_room_for_whole_workers(demand: Demand, count: float) -> None:
    assert demand.count_on({"CPU": 7.0, "GPU": 2.0, "memory": 1e9}) == count
