"""Exported files, opened by what would run them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fppmo_ray.pruning import export, extract, trace
from fppmo_ray.pruning.export import export_network
from fppmo_ray.training.networks import resnet20

SHAPE = (3, 32, 32)


@pytest.fixture(scope="module")
def pruned() -> nn.Module:
    """ResNet-20 with half of its filters; its statistics are those of random images."""
    torch.manual_seed(0)
    dense = resnet20(shortcut="B")
    with torch.no_grad():
        dense.train()(torch.randn(64, *SHAPE))
    tracing = trace(dense, torch.zeros(1, *SHAPE))
    keep = np.arange(tracing.space.num_filters) % 2 == 0
    return extract(dense, tracing, keep).eval()


def in_another_process(code: str) -> list[list[float]]:
    """What a program prints that has torch and numpy, and none of ours."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows: list[list[float]] = json.loads(done.stdout)
    return rows


@pytest.mark.parametrize(
    ("format", "name", "run"),
    [
        ("torchscript", "n.torchscript.pt", "torch.jit.load(path)(torch.tensor(images))"),
        ("torch.export", "n.pt2", "torch.export.load(path).module()(torch.tensor(images))"),
        (
            "onnx",
            "n.onnx",
            "torch.tensor(__import__('onnxruntime').InferenceSession(path, providers=["
            "'CPUExecutionProvider']).run(['logits'], {'images': images})[0])",
        ),
    ],
)
def test_a_file_computes_what_the_network_does_without_its_class(
    pruned: nn.Module, format: str, name: str, run: str, tmp_path: Path
) -> None:
    path = export_network(pruned, tmp_path / "new" / "n", format=format, image_shape=SHAPE)
    assert path == tmp_path / "new" / name
    images = np.random.default_rng(0).normal(size=(5, *SHAPE)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    found = in_another_process(
        "import numpy as np, torch, sys\n"
        f"path, images = {str(path)!r}, np.load({str(tmp_path / 'images.npy')!r})\n"
        f"outputs = {run}\n"
        "assert not any(name.startswith('fppmo_ray') for name in sys.modules)\n"
        "print(outputs.tolist())"
    )
    with torch.no_grad():
        expected = pruned(torch.from_numpy(images))
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-4)


def test_exporting_leaves_the_network_in_its_mode(pruned: nn.Module, tmp_path: Path) -> None:
    pruned.train()
    pruned.bn1.eval()
    export_network(pruned, tmp_path / "n", format="torch.export", image_shape=SHAPE)
    assert pruned.training
    assert not pruned.bn1.training
    pruned.eval()


class Noisy(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) + torch.rand(1)


class Branching(nn.Module):
    """Two ways, of which a trace sees one."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) * (1 if len(images) == 2 else 2)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("make", [Noisy, Branching])
def test_a_file_that_computes_something_else_is_refused(make, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="computes something else than the network: off by"):
        export_network(make(), tmp_path / "n", format="torchscript", image_shape=SHAPE)


class TwoOutputs(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, images


def test_what_cannot_be_exported_is_refused_in_a_sentence(
    pruned: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"format must be one of .*, got 'tflite'"):
        export_network(pruned, tmp_path / "n", format="tflite", image_shape=SHAPE)
    with pytest.raises(ValueError, match=r"must run on images of shape \(1, 4, 32, 32\)"):
        export_network(pruned, tmp_path / "n", format="torchscript", image_shape=(4, 32, 32))
    with pytest.raises(ValueError, match="return one tensor are exported, got tuple"):
        export_network(TwoOutputs(), tmp_path / "n", format="torchscript", image_shape=SHAPE)
    monkeypatch.setattr(export, "_ONNX_PACKAGES", ("onnx", "not_there"))
    with pytest.raises(ValueError, match=r"needs not_there; pip install 'fppmo-ray\[export\]'"):
        export_network(pruned, tmp_path / "n", format="onnx", image_shape=SHAPE)
    assert list(tmp_path.iterdir()) == []
