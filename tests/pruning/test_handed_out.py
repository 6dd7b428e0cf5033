"""A fresh process goes from an image file to a class name by what a search hands out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fppmo_ray import export_network, extract, load_classifier, save_network, trace
from fppmo_ray.pruning.files import load_network, read_interface, write_safetensors
from fppmo_ray.training import Interface, Preprocessing, Squash

NAMES = ("ant", "bee", "crab")
INTERFACE = Interface(
    preprocessing=Preprocessing(
        height=8,
        width=8,
        colour="BGR",
        view=Squash(interpolation="bicubic"),
        mean=(0.5, 0.4, 0.3),
        std=(0.5, 0.25, 0.2),
    ),
    class_names=NAMES,
)
SHAPE = (1, 3, 8, 8)


def dense() -> nn.Module:
    """A network whose logits are the means of the channels: blue, green and red."""
    network = nn.Sequential(
        *(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    )
    with torch.no_grad():
        for layer in network[:2]:
            layer.bias.zero_()
            layer.weight.zero_()
            for channel in range(3):
                layer.weight[channel, channel] = 1
    return network


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    network = dense()
    tracing = trace(network, torch.zeros(SHAPE))
    keep = np.arange(8) < 4
    return save_network(
        *(extract(network, tracing, keep), tmp_path / "network"),
        **{"tracing": tracing, "keep": keep, "interface": INTERFACE},
    )


@pytest.fixture
def blue(tmp_path: Path) -> Path:
    """An image that is blue to a network that takes the channels in the right order only."""
    path = tmp_path / "blue.png"
    Image.fromarray(np.full((20, 30, 3), (30, 90, 180), np.uint8)).save(path)
    return path


# Of blue, green and red: (180 / 255 - 0.5) / 0.5 = 0.41, -0.19 and -0.91.
LOGITS = [0.4118, -0.1882, -0.9118]


@pytest.mark.parametrize("format", ["torch", "safetensors", "torchscript", "torch.export", "onnx"])
def test_every_format_leads_from_an_image_file_to_the_class_name(
    saved: Path, blue: Path, format: str, tmp_path: Path
) -> None:
    path = saved
    if format == "safetensors":
        pytest.importorskip("safetensors", reason="the extra export is not installed")
        _, path = write_safetensors(saved, tmp_path / "out")
    elif format != "torch":
        network = load_network(saved, dense)
        path = export_network(
            *(network, tmp_path / "out" / "network"),
            **{"format": format, "example_inputs": torch.zeros(SHAPE), "interface": INTERFACE},
        )
    classify = load_classifier(path, dense)
    assert classify(blue) == "ant"
    assert classify.class_names == NAMES
    assert classify.run(classify.preprocessing(blue))[0].tolist() == pytest.approx(LOGITS, abs=1e-4)
    wanted = torch.tensor(LOGITS).softmax(0).tolist()
    found = classify.probabilities(blue.read_bytes())
    assert list(found.values()) == pytest.approx(wanted, abs=1e-4)


def test_onnx_metadata_is_enough_without_this_package(blue: Path, tmp_path: Path) -> None:
    path = export_network(
        *(dense(), tmp_path / "network"),
        **{"format": "onnx", "example_inputs": torch.zeros(SHAPE), "interface": INTERFACE},
    )
    code = f"""
import json, numpy as np, onnxruntime
from PIL import Image
session = onnxruntime.InferenceSession({str(path)!r}, providers=["CPUExecutionProvider"])
about = {{k: json.loads(v) for k, v in session.get_modelmeta().custom_metadata_map.items()}}
image = Image.open({str(blue)!r}).convert("RGB").resize((about["width"], about["height"]))
pixels = (np.asarray(image)[:, :, ::-1] * about["scale"] - about["mean"]) / about["std"]
[logits] = session.run(None, {{"images": pixels.transpose(2, 0, 1)[None].astype("float32")}})
print(json.dumps([about, about["class_names"][logits.argmax()]]))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    about, name = json.loads(done.stdout)
    assert name == "ant"
    assert about == {
        **{"colour": "BGR", "height": 8, "width": 8, "crop": "squash", "resize": None},
        **{"interpolation": "bicubic", "scale": 1 / 255},
        **{"mean": [0.5, 0.4, 0.3], "std": [0.5, 0.25, 0.2], "class_names": list(NAMES)},
        "inputs": [{"shape": [3, 8, 8], "dtype": "float32"}],
        "outputs": [{"shape": [3], "dtype": "float32"}],
    }


def test_safetensors_carry_the_tensors_and_the_interface(saved: Path, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors", reason="the extra export is not installed")
    weights, recipe = write_safetensors(saved, tmp_path / "out")
    assert [weights.name, recipe.name] == ["network.safetensors", "network.json"]
    with safetensors.safe_open(weights, "pt") as file:
        assert json.loads(file.metadata()["class_names"]) == list(NAMES)
        assert json.loads(file.metadata()["mean"]) == [0.5, 0.4, 0.3]
        assert file.get_tensor("0.weight").shape == (4, 3, 1, 1)
    assert read_interface(recipe) == INTERFACE
    ours, theirs = load_network(recipe, dense), load_network(saved, dense)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"network.safetensors is damaged"):
        load_network(recipe, dense)


def test_a_file_that_does_not_tell_is_refused_with_the_way_out(tmp_path: Path) -> None:
    network = dense()
    plain = {"format": "torchscript", "example_inputs": torch.zeros(SHAPE)}
    path = export_network(network, tmp_path / "plain", **plain)
    with pytest.raises(ValueError, match="does not say how images become its input"):
        load_classifier(path)
    nameless = Interface(preprocessing=INTERFACE.preprocessing)
    path = export_network(network, tmp_path / "nameless", **plain, interface=nameless)
    with pytest.raises(ValueError, match="has no class names"):
        load_classifier(path)
    with pytest.raises(ValueError, match=r"one of the suffixes .*\.onnx, got .*absent\.onnx"):
        load_classifier(tmp_path / "absent.onnx")
