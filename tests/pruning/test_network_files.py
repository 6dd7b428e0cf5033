"""Networks on disk: rebuilt from constructor, recipe and weights, or refused with a sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fppmo_ray.pruning import extract, load_network, save_network, trace
from fppmo_ray.pruning.files import _write_recipe
from fppmo_ray.training.networks import resnet20, resnet32

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SOURCE = {
    "constructor": "fppmo_ray.training.networks:resnet20",
    "arguments": {"shortcut": "B", "num_classes": 7},
}


@pytest.fixture(scope="module")
def pruned():
    torch.manual_seed(0)
    dense = resnet20(7, shortcut="B")
    tracing = trace(dense, IMAGES)
    keep = np.arange(tracing.space.num_filters) % 3 > 0
    return extract(dense, tracing, keep).eval(), tracing, keep


@pytest.fixture
def saved(pruned, tmp_path: Path) -> Path:
    network, tracing, keep = pruned
    return save_network(network, tmp_path / "v1.5", tracing=tracing, keep=keep, source=SOURCE)


def test_a_network_is_rebuilt_from_its_files(pruned, saved: Path) -> None:
    network, tracing, keep = pruned
    rebuilt = load_network(saved)
    assert repr(rebuilt) == repr(network)
    assert torch.equal(rebuilt(IMAGES), network(IMAGES))
    recipe = json.loads(saved.read_text())
    assert recipe["macs"] == tracing.space.macs(keep)
    assert recipe["source"] == SOURCE
    assert (
        recipe["kept_channels"]["layer1.0.conv1"] == "0-1,3-4,6-7,9-10,12-13,15"
    )  # 16 filters of conv1 come first
    assert sorted(path.name for path in saved.parent.iterdir()) == ["v1.5.json", "v1.5.pt"]


def test_another_process_rebuilds_it_without_torch_pruning(pruned, saved: Path) -> None:
    code = (
        "import sys, torch; from fppmo_ray.pruning import load_network; "
        f"network = load_network({str(saved)!r}); "
        "images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)); "
        "print('torch_pruning' in sys.modules, network(images).sum().item())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    loaded, total = result.stdout.split()
    assert loaded == "False"
    assert float(total) == pytest.approx(pruned[0](IMAGES).sum().item(), rel=1e-4)


def test_a_full_mask_travels_too(pruned, tmp_path: Path) -> None:
    _, tracing, keep = pruned
    dense = resnet20(7, shortcut="B")
    path = save_network(dense, tmp_path / "dense", tracing=tracing, keep=np.ones_like(keep))
    rebuilt = load_network(path, lambda: resnet20(7, shortcut="B"))
    assert torch.equal(rebuilt(IMAGES), dense.eval()(IMAGES))


def test_the_wrong_constructor_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a network whose conv1\.weight has length 16"):
        load_network(saved, lambda: nn.Sequential(nn.Conv2d(3, 8, 3)))
    with pytest.raises(ValueError, match="another network than the constructor makes"):
        load_network(saved, lambda: resnet32(7, shortcut="B"))
    with pytest.raises(ValueError, match="another network than the constructor makes"):
        load_network(saved, lambda: resnet20(10, shortcut="B"))


@pytest.mark.parametrize("constructor", ["os:system", "fppmo_ray.training.networks:_x", "", None])
def test_other_constructors_are_never_imported(pruned, tmp_path: Path, constructor) -> None:
    network, tracing, keep = pruned
    source = {"constructor": constructor, "arguments": {"command": "true"}}
    path = save_network(network, tmp_path / "n", tracing=tracing, keep=keep, source=source)
    with pytest.raises(ValueError, match="pass constructor="):
        load_network(path)
    assert repr(load_network(path, lambda: resnet20(7, shortcut="B"))) == repr(network)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("create_model", {"model_name": "hf-hub:someone/network", "num_classes": 7}),
        ("create_model", {"model_name": "resnet18", "checkpoint_path": "/tmp/pickle"}),
        ("list_models", {}),
    ],
)
def test_timm_is_called_for_models_by_name_alone(
    pruned, tmp_path: Path, function: str, arguments: dict[str, object]
) -> None:
    pytest.importorskip("timm", reason="the extra timm is not installed")
    network, tracing, keep = pruned
    source = {"constructor": f"timm:{function}", "arguments": arguments}
    path = save_network(network, tmp_path / "n", tracing=tracing, keep=keep, source=source)
    with pytest.raises(ValueError, match=f"the file calls timm:{function}.*pass constructor="):
        load_network(path)


def test_damaged_files_are_refused(saved: Path) -> None:
    weights = saved.with_name("v1.5.pt")
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"v1\.5\.pt is damaged"):
        load_network(saved)
    weights.unlink()
    with pytest.raises(ValueError, match="got no file"):
        load_network(saved)
    saved.write_text(saved.read_text()[:100])
    with pytest.raises(ValueError, match="is no JSON file"):
        load_network(saved)
    saved.write_text("{}")
    with pytest.raises(ValueError, match="format 2"):
        load_network(saved)
    saved.unlink()
    with pytest.raises(ValueError, match="got none"):
        load_network(saved)


def test_saving_another_network_than_the_masks_is_refused(pruned, tmp_path: Path) -> None:
    network, tracing, keep = pruned
    with pytest.raises(ValueError, match="expected a network whose"):
        save_network(network, tmp_path / "n", tracing=tracing, keep=np.ones_like(keep))
    assert list(tmp_path.iterdir()) == []


def test_every_change_of_the_json_file_shows(saved: Path) -> None:
    content = saved.read_bytes()
    places = range(0, len(content), 7)
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1 << place % 7
        if json.loads(content) == _json_or_none(changed):
            continue  # another white space
        saved.write_bytes(changed)
        with pytest.raises(ValueError, match=r"no JSON file|checksum does not fit|of format 2"):
            load_network(saved)
    assert len(places) > 500


def _json_or_none(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None


@pytest.mark.parametrize("content", [b"[]", b"null", b"\xff", 99_999 * b"[", b'{"checksum": 0}'])
def test_a_json_file_of_anything_else_is_refused(saved: Path, content: bytes) -> None:
    saved.write_bytes(content)
    with pytest.raises(ValueError, match=r"no JSON file|checksum does not fit|of format 2"):
        load_network(saved)


@pytest.mark.parametrize("kept", ["0-99999999999", "3-1", "0,0", "-1", "1-2-3", "a", "", "0-16"])
def test_indices_out_of_range_are_refused_before_they_take_memory(saved: Path, kept: str) -> None:
    recipe = json.loads(saved.read_text())
    del recipe["checksum"]
    entry = next(one for one in recipe["axes"] if one["length"] == 16)
    entry["kept"] = kept
    _write_recipe(saved, recipe)
    with pytest.raises(ValueError, match=r"expected ascending indices below 16|invalid literal"):
        load_network(saved)


def test_arguments_that_the_constructor_does_not_take_are_a_sentence(pruned, tmp_path) -> None:
    network, tracing, keep = pruned
    source = SOURCE | {"arguments": {"colour": "red"}}
    path = save_network(network, tmp_path / "n", tracing=tracing, keep=keep, source=source)
    with pytest.raises(
        ValueError, match=r"resnet20 takes other arguments than the file's: .*'colour'"
    ):
        load_network(path)
