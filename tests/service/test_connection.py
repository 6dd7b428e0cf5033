"""Which lines of workers reach the driver's stderr, with a Ray that the search starts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from fppmo_ray.service.connection import _line_filter

SCRIPT = """
import logging, sys, warnings
import torch
from torch import nn
from fppmo_ray import Placement, SearchSettings, Task, search

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
        Task(example_inputs=torch.zeros(1, 1, 8, 8), score=score),
        SearchSettings(macs_cut=0.4, proposals=16, population=8, importance="l1"),
        run_dir=sys.argv[1],
        placement=Placement(workers=2),
    )
"""


def test_what_a_score_function_prints_warns_and_logs_is_seen_once_on_the_drivers_stderr(
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


def batch(*lines: str, pid: object = 17, actor: str | None = "ScoringWorker(0, cpu)") -> dict:
    return {"pid": pid, "lines": lines, "actor_name": actor}


def test_lines_that_differ_in_numbers_only_are_shown_once() -> None:
    lines_to_show = _line_filter()
    assert lines_to_show(batch("epoch 1, loss 0.5", "", "epoch 2, loss 0.25")) == [
        "ScoringWorker(0, cpu): epoch 1, loss 0.5"
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
    assert lines_to_show(batch("[1] is a list")) == ["ScoringWorker(0, cpu): [1] is a list"]


def test_a_flood_of_different_lines_ends_with_a_sentence_that_says_where_they_are() -> None:
    shown = _line_filter()(batch(*("x" * length for length in range(1, 400))))
    assert len(shown) == 201
    assert shown[-1].endswith(
        "workers print many different lines; the others are only in Ray's logs"
    )
