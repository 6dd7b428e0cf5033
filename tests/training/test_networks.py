from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fppmo_ray.training.checkpoints import load_weights
from fppmo_ray.training.networks import NETWORKS, build_network, resnet20, resnet110


def macs(network: torch.nn.Module, *shape: int) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.zeros(1, *shape))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", list(NETWORKS))
def test_every_network_maps_images_to_one_logit_per_class_and_survives_pickling(name):
    network = build_network(name, 7).eval()
    images = torch.randn(2, 1, 8, 8) if name == "digits_cnn" else torch.randn(2, 3, 32, 32)
    logits = network(images)
    assert logits.shape == (2, 7)
    again = pickle.loads(pickle.dumps(copy.deepcopy(network)))
    assert torch.equal(again(images), logits)


@pytest.mark.parametrize(
    ("name", "millions_of_parameters", "millions_of_macs"),
    [
        ("resnet20", 0.27, 40.6),
        ("resnet32", 0.46, 68.9),
        ("resnet44", 0.66, 97.2),
        ("resnet56", 0.85, 125.5),
        ("resnet110", 1.73, 252.9),
        ("vgg16_bn", 14.73, 313.2),
    ],
)
def test_sizes_are_those_of_the_literature(name, millions_of_parameters, millions_of_macs):
    network = build_network(name, 10)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert parameters / 1e6 == pytest.approx(millions_of_parameters, abs=0.006)
    assert macs(network, 3, 32, 32) / 1e6 == pytest.approx(millions_of_macs, abs=0.06)


def test_initial_weights_come_from_the_seed_alone():
    before = torch.get_rng_state()
    first, again, other = (build_network("digits_cnn", 10, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.conv3.weight, again.conv3.weight)
    assert not torch.equal(first.conv3.weight, other.conv3.weight)
    assert torch.equal(before, torch.get_rng_state())


def test_option_a_shortcut_keeps_every_second_pixel_and_pads_with_zeros():
    shortcut = resnet20().layer2[0].shortcut
    images = torch.arange(16 * 16, dtype=torch.float32).reshape(1, 16, 4, 4)
    padded = shortcut(images)
    assert padded.shape == (1, 32, 2, 2)
    assert padded[0, 8].tolist() == [[0, 2], [8, 10]]
    assert padded[0, :8].abs().sum() == 0
    assert padded[0, 24:].abs().sum() == 0


def test_option_b_shortcuts_are_named_as_in_the_public_code():
    names = set(resnet20(shortcut="B").state_dict()) - set(resnet20().state_dict())
    assert "layer2.0.shortcut.0.weight" in names
    assert "layer3.0.shortcut.1.running_var" in names
    assert all(".0.shortcut." in name for name in names)


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"one of digits_cnn, resnet20.*got 'resnet21'"):
        build_network("resnet21", 10)
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        build_network("resnet20", 1)
    with pytest.raises(ValueError, match="shortcut must be 'A' or 'B', got 'C'"):
        resnet20(shortcut="C")


@pytest.mark.parametrize("depth", [20, 32, 44, 56])
def test_public_weights_load(shared_data, depth):
    [path] = (shared_data / "pretrained").glob(f"resnet{depth}-*.th")
    network = build_network(f"resnet{depth}", 10)
    load_weights(network, path)
    stored = torch.load(path, weights_only=True, map_location="cpu")["state_dict"]
    assert torch.equal(network.linear.bias, stored["module.linear.bias"])


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "net"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_checkpoints_of_the_usual_layouts_load(tmp_path, wrapper, prefix):
    source = build_network("digits_cnn", 10)
    weights = {prefix + name: value for name, value in source.state_dict().items()}
    torch.save({wrapper: weights, "epoch": 3} if wrapper else weights, tmp_path / "w.pt")
    network = build_network("digits_cnn", 10)
    load_weights(network, tmp_path / "w.pt")
    for name, value in network.state_dict().items():
        assert torch.equal(value, source.state_dict()[name])


def test_another_networks_checkpoint_is_refused_by_naming_tensors(tmp_path):
    path = tmp_path / "w.pt"
    torch.save(resnet20().state_dict(), path)
    with pytest.raises(ValueError, match=r"missing: layer1.3.conv1.weight, .* more"):
        load_weights(resnet110(), path)
    with pytest.raises(ValueError, match=r"linear.weight \(10, 64\) instead of \(100, 64\)"):
        load_weights(resnet20(100), path)
    with pytest.raises(ValueError, match=r"unexpected: layer1.0.conv1.weight"):
        load_weights(build_network("digits_cnn", 10), path)


def test_a_refused_checkpoint_leaves_the_network_as_it_was(tmp_path):
    torch.save(resnet20(100).state_dict(), tmp_path / "w.pt")
    network = resnet20()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match="another network"):
        load_weights(network, tmp_path / "w.pt")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_file_cut_anywhere_is_refused_with_a_sentence(tmp_path):
    whole, cut = tmp_path / "whole.pt", tmp_path / "cut.pt"
    network = build_network("digits_cnn", 10)
    torch.save(network.state_dict(), whole)
    content = whole.read_bytes()
    for share in (0, 0.001, 0.3, 0.9, 0.999):
        cut.write_bytes(content[: int(share * len(content))])
        with pytest.raises(ValueError, match=r"cut\.pt is (corrupt|no file of plain tensors)"):
            load_weights(network, cut)


def test_files_without_weights_are_refused_with_a_sentence(tmp_path: Path):
    network = build_network("digits_cnn", 10)
    path = tmp_path / "w.pt"
    with pytest.raises(ValueError, match="there is no file of weights at"):
        load_weights(network, path)
    path.write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match=r"w\.pt is "):
        load_weights(network, path)
    torch.save(network, path)
    with pytest.raises(ValueError, match="holds a whole pickled module"):
        load_weights(network, path)
    torch.save({"state_dict": {"epoch": 3}}, path)
    with pytest.raises(ValueError, match="holds a int under 'epoch'"):
        load_weights(network, path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="holds no state dict"):
        load_weights(network, path)
