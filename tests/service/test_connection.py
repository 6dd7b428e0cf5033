"""How a search joins Ray, and which lines of its workers reach the driver's stderr."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fppmo_ray.service.connection import _line_filter, connection
from fppmo_ray.service.settings import Placement

SCRIPT = """
import logging, sys, warnings
import torch
from torch import nn
from fppmo_ray import FunctionTask, Placement, SearchSettings, search

def score(network, seed):
    print(f"printed with seed {seed}")
    warnings.warn("warned")
    logging.getLogger("theirs").warning("logged")
    return -sum(float(parameter.detach().abs().sum()) for parameter in network.parameters())

if __name__ == "__main__":
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 3)
    search(
        nn.Sequential(*layers),
        FunctionTask(example_inputs=torch.zeros(1, 1, 8, 8), score=score),
        SearchSettings(macs_cut=0.4, proposals=16, population=8, importance="l1"),
        run_dir=sys.argv[1],
        placement=Placement(workers=2),
    )
"""


def test_prints_warnings_and_logs_of_a_score_function_appear_once_on_the_drivers_stderr(
    tmp_path: Path,
) -> None:
    (tmp_path / "theirs.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "theirs.py", "run"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    of_workers = re.findall(r"^\w+\(\d, cpu\): (.*)$", done.stderr, flags=re.MULTILINE)
    assert Counter(re.sub(r"^/.*/|\d+", "", line) for line in of_workers) == {
        "printed with seed ": 1,
        "theirs.py:: UserWarning: warned": 1,
        '  warnings.warn("warned")': 1,
        "logged": 1,
    }
    assert "pid=" not in done.stderr  # Ray's own prefix
    assert "repeated" not in done.stderr


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
    with connection(Placement(cpus_per_worker=64)):
        pass
    assert [record.getMessage() for record in caplog.records] == [
        "no node has room for a worker: each asks for 64 CPUs and 0 GPUs; the cluster has 2 CPUs "
        "and 0 GPUs on 1 node (at most 2 CPUs and 0 GPUs on one), of which 2 CPUs and 0 GPUs are "
        "free; the search waits for a larger node to join; if none will, lower cpus_per_worker or "
        "gpus_per_worker"
    ]


@pytest.mark.usefixtures("local_ray")
def test_workers_that_fit_are_not_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), connection(Placement(cpus_per_worker=2)):
        pass
    assert caplog.records == []
