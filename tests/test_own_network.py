"""A user's own network and images, from the command line alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fppmo_ray import Transform, load_network, save_network
from fppmo_ray.own_network import open_data, open_network
from fppmo_ray.pruning import trace

NETWORK = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2))
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(NETWORK)
    for part, count in (("train", 40), ("val", 10)):
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                colour = (200 * label, 5 * number, 0)
                Image.new("RGB", (16, 16), colour).save(folder / f"{number}.png")
    return tmp_path


def fppmo_ray(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys; from fppmo_ray.cli import main; main(); "
        "print('ray imported:', 'ray' in sys.modules, file=sys.stderr)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env=os.environ | {"COLUMNS": "100", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_networks_of_timm_are_built_by_name_with_weights_from_a_safetensors_file(
    tmp_path: Path,
) -> None:
    timm = pytest.importorskip("timm", reason="the extra timm is not installed")
    safetensors = pytest.importorskip("safetensors.torch", reason="needs the extra export")
    dense = timm.create_model("resnet10t", num_classes=2).eval()
    safetensors.save_file(dense.state_dict(), tmp_path / "weights.safetensors")
    network, source = open_network("timm:resnet10t", tmp_path / "weights.safetensors", 2)
    example = torch.randn(1, 3, 32, 32)
    assert torch.equal(network.eval()(example), dense(example))
    tracing = trace(network, example)
    keep = np.ones(tracing.space.num_filters, dtype=bool)
    path = save_network(network, tmp_path / "n", tracing=tracing, keep=keep, source=source)
    assert torch.equal(load_network(path)(example), dense(example))
    (tmp_path / "weights.safetensors").write_bytes(b"no file")
    with pytest.raises(ValueError, match=r"weights.safetensors is corrupt or truncated"):
        open_network("timm:resnet10t", tmp_path / "weights.safetensors", 2)


def test_classes_are_named_in_the_order_of_the_outputs(project: Path) -> None:
    found = open_data("image_folder", str(project / "images"), Transform(), ["dog", "cat"], seed=0)
    assert found.dataset.class_names == ("dog", "cat")
    assert found.dataset.train.labels.tolist() == [0] * 40 + [1] * 40
    assert open_data("digits", "", Transform(), (), seed=0).dataset.name == "digits"


def test_prune_writes_a_smaller_network_without_ray(project: Path) -> None:
    flags = ("--network", "mine:make", "--data", "images", "--output", "out/small")
    done = fppmo_ray(project, "prune", *flags, "--macs-cut", "0.4", "--images", "30")
    assert done.returncode == 0, done.stderr
    assert "ray imported: False" in done.stderr
    assert "of 20 test images" in done.stdout
    assert "by 30 images: out/small.json" in done.stdout
    names: dict[str, object] = {}
    exec(NETWORK, names)
    make = names["make"]
    assert callable(make)
    smaller = load_network(project / "out/small.json", constructor=make)
    example = torch.zeros(1, 3, 16, 16)
    cut = 1 - trace(smaller, example).space.dense_macs / trace(make(), example).space.dense_macs
    assert 0.4 <= cut < 0.6


def test_help_lists_the_groups_of_flags_and_names_the_ten_that_matter_first(tmp_path: Path) -> None:
    done = fppmo_ray(tmp_path, "search", "--help")
    assert done.returncode == 0, done.stderr
    words = " ".join(done.stdout.replace("│", " ").split())
    first = (
        "Flags that matter first: --network, --weights, --data, --run-dir, --macs-cut, "
        "--proposals, --min-keep, --fine-tune-epochs, --workers, --gpus-per-worker. -H explains"
    )
    assert first in words
    assert words.index(first) < words.index("settings.space options") < words.index("--min-keep F")
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_a_command_that_there_is_not_gets_a_suggestion(tmp_path: Path) -> None:
    done = fppmo_ray(tmp_path, "reprot", "runs/mine")
    assert done.returncode == 1
    assert "has no command 'reprot'; did you mean report?" in done.stderr
    needed = ("--network", "mine:make", "--data", "images", "--run-dir", "run")
    done = fppmo_ray(tmp_path, "search", *needed, "--mac-cut", "0.5")
    assert done.returncode == 2
    assert "--macs-cut FLOAT" in done.stderr.partition("Perhaps you meant")[2]


def test_the_version_is_that_of_the_package(tmp_path: Path) -> None:
    from importlib.metadata import version

    assert fppmo_ray(tmp_path, "--version").stdout == f"fppmo-ray {version('fppmo-ray')}\n"


def test_networks_are_opened_by_name_with_weights_from_a_file(tmp_path: Path) -> None:
    network, source = open_network("resnet18", None, 3, seed=1)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    again, _ = open_network("resnet18", tmp_path / "weights.pt", 3, seed=2)
    assert isinstance(again.fc, nn.Linear)
    assert torch.equal(again.fc.weight, network.fc.weight)  # type: ignore[union-attr]
    assert source == {
        "constructor": "torchvision.models:resnet18",
        "arguments": {"weights": None, "num_classes": 3},
    }
    _, source = open_network("resnet20", None, 10)
    assert source["arguments"] == {"name": "resnet20", "num_classes": 10}
    with pytest.raises(ValueError, match=r"no classification network 'resnet51'; near it"):
        open_network("resnet51", None, 3)
    with pytest.raises(ValueError, match="expected MODULE:FUNCTION as a constructor, got none:x"):
        open_network("none:x", None, 3)


def test_timm_networks_are_opened_by_name() -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    network, source = open_network("timm:resnet10t", None, 3)
    assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    assert source["constructor"] == "timm:create_model"
