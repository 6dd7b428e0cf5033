"""Exported files, loaded by the runtimes that they are for."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fppmo_ray.pruning import export, extract, trace
from fppmo_ray.pruning.export import export_network
from fppmo_ray.training.networks import resnet20

SHAPE = (3, 32, 32)
IMAGE = torch.zeros(1, *SHAPE)


@pytest.fixture(scope="module")
def pruned() -> nn.Module:
    """ResNet-20 with half of its filters; its statistics are those of random images."""
    torch.manual_seed(0)
    dense = resnet20(shortcut="B")
    with torch.no_grad():
        dense.train()(torch.randn(64, *SHAPE))
    tracing = trace(dense, IMAGE)
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
    path = export_network(pruned, tmp_path / "new" / "n", format=format, example_inputs=IMAGE)
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
    export_network(pruned, tmp_path / "n", format="torch.export", example_inputs=IMAGE)
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
        export_network(make(), tmp_path / "n", format="torchscript", example_inputs=IMAGE)
    assert list(tmp_path.iterdir()) == []


class Segmenting(nn.Module):
    """Two inputs, one of them of whole numbers, and a dict of two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 1)
        self.kinds = nn.Embedding(4, 8)

    def forward(self, images: Tensor, kind: Tensor) -> dict[str, Tensor]:
        features = self.body(images).relu() + self.kinds(kind)[:, 0, :, None, None]
        return {"out": self.head(features), "auxiliary": features.mean((2, 3))}


@pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("format", "suffix"), [("torchscript", ".torchscript.pt"), ("torch.export", ".pt2")]
)
def test_several_inputs_and_nested_outputs_are_exported(
    format: str, suffix: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network, kind = Segmenting(), torch.tensor([[3], [1]])
    path = export_network(network, tmp_path / "n", format=format, example_inputs=(IMAGE, kind))
    assert path == tmp_path / f"n{suffix}"
    loaded = torch.jit.load(path) if format == "torchscript" else torch.export.load(path).module()
    images = torch.randn(2, *SHAPE)
    torch.testing.assert_close(loaded(images, kind), network(images, kind))


def test_an_onnx_file_numbers_several_inputs_and_outputs(tmp_path: Path) -> None:
    import onnxruntime

    torch.manual_seed(0)
    network, kind = Segmenting(), torch.tensor([[3], [1]])
    path = export_network(network, tmp_path / "n", format="onnx", example_inputs=(IMAGE, kind))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images = torch.randn(2, *SHAPE)
    given = {"input_0": images.numpy(), "input_1": kind.numpy()}
    found = session.run(["output_0", "output_1"], given)
    with torch.no_grad():
        expected = network(images, kind)
    for output, name in zip(found, ("out", "auxiliary"), strict=True):
        torch.testing.assert_close(torch.from_numpy(output), expected[name], rtol=1e-4, atol=1e-4)


def test_files_with_another_number_of_outputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="n returns 1 tensors and the network 2; do not use it"):
        export._check([IMAGE], [IMAGE, IMAGE], tmp_path / "n")


def test_what_cannot_be_exported_is_refused_in_a_sentence(
    pruned: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"format must be one of .*, got 'tflite'"):
        export_network(pruned, tmp_path / "n", format="tflite", example_inputs=IMAGE)
    with pytest.raises(ValueError, match=r"must run on inputs of shapes \(1, 4, 32, 32\)"):
        export_network(
            pruned, tmp_path / "n", format="torchscript", example_inputs=torch.zeros(1, 4, 32, 32)
        )
    monkeypatch.setattr(export, "_ONNX_PACKAGES", ("onnx", "not_there"))
    with pytest.raises(ValueError, match=r"needs not_there; pip install 'fppmo-ray\[export\]'"):
        export_network(pruned, tmp_path / "n", format="onnx", example_inputs=IMAGE)
    assert list(tmp_path.iterdir()) == []


class Detecting(nn.Module):
    """Returns tensors nested twice, one of them of booleans."""

    def forward(self, images: Tensor) -> dict[str, object]:
        means = images.mean((2, 3))
        return {"levels": [means, (2 * means, means > 0)], "scores": means.softmax(1)}


def test_torchscript_returns_outputs_that_are_nested_twice_as_a_flat_tuple(tmp_path: Path) -> None:
    path = export_network(Detecting(), tmp_path / "n", format="torchscript", example_inputs=IMAGE)
    means = IMAGE.mean((2, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit.load in newer versions
        found = torch.jit.load(path)(IMAGE)
    torch.testing.assert_close(found, (means, 2 * means, means > 0, means.softmax(1)))


@pytest.mark.parametrize("format", ["torchscript", "torch.export"])
def test_a_network_of_one_batch_size_is_exported_with_a_fixed_batch(
    format: str, tmp_path: Path
) -> None:
    class Clip(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.view(2, 4, *SHAPE).mean((1, 3, 4))

    images = torch.randn(8, *SHAPE)
    with pytest.raises(ValueError, match="must run on inputs of shapes"):
        export_network(Clip(), tmp_path / "n", format=format, example_inputs=images)
    path = export_network(
        Clip(), tmp_path / "n", format=format, example_inputs=images, fixed_batch=8
    )
    run, _ = export.open_exported(path)
    torch.testing.assert_close(run((images,)), [Clip()(images)])


def test_what_an_exporter_raises_becomes_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failure(Exception):
        pass

    def write(network: nn.Module, inputs: object, path: Path, *_: object) -> None:
        path.write_text("half")
        raise Failure("\n[ONNXRuntimeError] : 10 : INVALID_GRAPH : This is an invalid model.\nmore")

    monkeypatch.setitem(export._WAYS, "onnx", (write, export._read_onnx))
    monkeypatch.setattr(export, "_ONNX_PACKAGES", ())
    with pytest.raises(
        RuntimeError,
        match=r"cannot be written as onnx.*Failure: \[ONNX.*model\.; try fixed_batch=1",
    ):
        export_network(nn.ReLU(), tmp_path / "n", format="onnx", example_inputs=IMAGE)
    assert list(tmp_path.iterdir()) == []
