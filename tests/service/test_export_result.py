"""Networks of finished searches, handed out by the command that people type."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fppmo_ray.pruning import extract, save_network, trace
from fppmo_ray.service.result import export_result, load_constructor

IMAGE = torch.zeros(1, 3, 8, 8)
MY_NETWORK = """
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
"""


def dense_network() -> nn.Module:
    """The same as that of the module."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """What a search for half of the filters of a network of one's own left."""
    torch.manual_seed(0)
    dense = dense_network()
    tracing, keep = trace(dense, IMAGE), np.arange(8) % 2 == 0
    run_dir = tmp_path / "run"
    smaller = extract(dense, tracing, keep)
    save_network(smaller, run_dir / "network", tracing=tracing, keep=keep)
    inputs = [{"shape": [3, 8, 8], "dtype": "float32"}]
    result = {"settings": {"macs_cut": 0.5}, "inputs": inputs}
    (run_dir / "result.json").write_text(json.dumps(result))
    return run_dir


def exported(finished: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a folder beside the run, with a module of one's own."""
    (finished.parent / "mine.py").write_text(MY_NETWORK)
    command = "from fppmo_ray.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", command, "export", str(finished), *arguments],
        cwd=finished.parent,
        env=os.environ | {"PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
    )


def test_a_network_of_ones_own_is_exported_by_naming_what_makes_it(finished: Path) -> None:
    arguments = ("--format", "torch.export", "--constructor", "mine:make", "--fixed-batch", "2")
    done = exported(finished, *arguments)
    assert done.returncode == 0, done.stderr
    images = torch.randn(2, 3, 8, 8)
    outputs = torch.export.load(finished.parent / "exported" / "network.pt2").module()(images)
    assert outputs.shape == (2, 2, 6, 6)


def test_a_file_may_take_one_batch_size_only(finished: Path, tmp_path: Path) -> None:
    [path] = export_result(
        finished,
        tmp_path / "out",
        format="torch.export",
        constructor=dense_network,
        fixed_batch=2,
    )
    network = torch.export.load(path).module()
    assert network(torch.randn(2, 3, 8, 8)).shape == (2, 2, 6, 6)
    with pytest.raises(AssertionError, match="size"):
        network(torch.randn(3, 3, 8, 8))


def test_weights_alone_have_no_batch_size(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fixed_batch = 1 has no meaning for the format 'torch'"):
        export_result(finished, tmp_path / "out", constructor=dense_network, fixed_batch=1)


def test_without_a_name_the_way_out_is_told(finished: Path) -> None:
    done = exported(finished)
    assert done.returncode == 1
    expected = "error: the file does not name a constructor of its dense network"
    assert done.stderr.startswith(expected)
    assert "--constructor MODULE:FUNCTION" in done.stderr.replace("\n", " ")


@pytest.mark.parametrize("name", ["", "make", "not_there:make", "torch.nn:NotThere"])
def test_constructors_that_are_not_there_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"expected MODULE:FUNCTION as a constructor, got {name}"):
        load_constructor(name)


def test_a_constructor_of_another_network_is_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a network whose 0\.weight has length 8"):
        export_result(finished, tmp_path / "out", constructor=nn.Identity)
