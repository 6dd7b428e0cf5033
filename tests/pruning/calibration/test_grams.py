"""Gram matrices: what they hold, how they are bounded, and what cannot be observed."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from calibrated_networks import (
    IMAGE,
    IMAGES,
    Chain,
    Concatenated,
    Doubled,
    Flattened,
    Grouped,
    Transposed,
    made,
)
from torch import nn
from torch.nn import functional as F

from fppmo_ray.pruning import trace
from fppmo_ray.pruning.calibration import calibrate
from fppmo_ray.pruning.calibration.grams import RIDGE

BATCHES = [IMAGES[:10], IMAGES[10:20], IMAGES[20:]]


def gram_of(network: nn.Module, layer: str, **options):
    calibration = calibrate(network, trace(network, IMAGE), BATCHES, **options)
    return next(gram for gram in calibration.grams if gram.consumer.modules == (layer,))


def without_ridge(block: torch.Tensor) -> torch.Tensor:
    """The matrix before ``RIDGE * its mean diagonal`` was added to its diagonal."""
    scale = block.diagonal(dim1=1, dim2=2).mean(1) / (1 + RIDGE)
    return block - RIDGE * scale[:, None, None] * torch.eye(block.shape[1], dtype=block.dtype)


@pytest.mark.parametrize("strip", [512, 50])
def test_it_is_the_covariance_of_all_input_patches(strip, monkeypatch):
    monkeypatch.setattr("fppmo_ray.pruning.calibration.grams._STRIP", strip)
    network = made(Chain())
    gram = gram_of(network, "second")
    inputs = F.relu(network.bn(network.first(IMAGES)))
    patches = F.unfold(inputs, 3, padding=1).transpose(1, 2).flatten(0, 1)  # channel by channel
    patches = patches.unflatten(1, (8, 9)).transpose(1, 2).flatten(1)  # tap by tap
    assert gram.num_patches == 24 * 64
    assert gram.is_centred
    assert torch.allclose(gram.mean[0], patches.mean(0), atol=1e-12)
    assert torch.allclose(
        without_ridge(gram.blocks[0][1])[0], patches.T.cov(correction=0), atol=1e-12
    )


def test_without_bias_or_batch_norm_moments_are_about_zero():
    network = made(Chain(bias=False))
    gram = gram_of(network, "second")
    inputs = F.relu(network.bn(network.first(IMAGES)))
    patches = F.unfold(inputs, 3, padding=1).transpose(1, 2).flatten(0, 1)
    patches = patches.unflatten(1, (8, 9)).transpose(1, 2).flatten(1)
    assert not gram.is_centred
    assert not gram.mean.any()
    expected = patches.T @ patches / len(patches)
    assert torch.allclose(without_ridge(gram.blocks[0][1])[0], expected, atol=1e-12)


def test_a_batch_norm_behind_a_layer_without_bias_takes_up_the_mean():
    class Normed(Chain):
        def __init__(self) -> None:
            super().__init__(bias=False)
            self.bn2 = nn.BatchNorm2d(6)

        def forward(self, images):
            features = self.bn2(self.second(F.relu(self.first(images))))
            return self.head(F.relu(features).mean((2, 3)))

    assert gram_of(made(Normed()), "second").is_centred


@pytest.mark.parametrize(
    ("network", "layer", "groups", "columns"),
    [
        (Concatenated(), "second", 1, 16 * 9),
        (Flattened(), "head", 1, 6 * 64),
        (Grouped(), "grouped", 2, 4 * 9),
        (Transposed(), "up", 1, 8 * 9),
        (Transposed(groups=2), "up", 2, 4 * 9),
    ],
)
def test_every_kind_of_consumer_has_one(network, layer, groups, columns):
    gram = gram_of(made(network), layer)
    assert gram.blocks[0][1].shape == (groups, columns, columns)
    assert gram.consumer.units.shape[0] == groups


def test_batches_make_no_difference():
    network = made(Chain())
    tracing = trace(network, IMAGE)
    for one, other in zip(
        calibrate(network, tracing, [IMAGES]).grams,
        calibrate(network, tracing, [(part, None) for part in IMAGES.split(5)]).grams,
        strict=True,
    ):
        assert torch.allclose(one.blocks[0][1], other.blocks[0][1], atol=1e-12)


def test_float32_networks_are_summed_up_in_float64():
    network = made(Chain())
    exact = gram_of(network, "second").blocks[0][1]
    single = copy.deepcopy(network).float()
    tracing = trace(single, IMAGE)
    grams = calibrate(single, tracing, [batch.float() for batch in BATCHES]).grams
    block = next(g.blocks[0][1] for g in grams if g.consumer.modules == ("second",))
    assert block.dtype == torch.float64
    assert float((block - exact).abs().max() / exact.abs().max()) < 1e-5


def test_fewer_patches_are_used_of_many():
    network = made(Chain())
    tracing = trace(network, torch.zeros(1, 3, 64, 64))
    images = torch.randn(16, 3, 64, 64, dtype=torch.float64)
    grams = calibrate(network, tracing, images.split(1), num_images=16).grams
    gram = next(g for g in grams if g.consumer.modules == ("second",))
    assert gram.num_patches == 16384  # of 65,536
    exact = calibrate(network, tracing, images.split(1)).grams
    whole = next(g for g in exact if g.consumer.modules == ("second",)).blocks[0][1]
    assert float((gram.blocks[0][1] - whole).norm() / whole.norm()) < 0.05


def test_above_the_memory_cap_columns_are_split_and_filters_are_not():
    network = made(Flattened())
    tracing = trace(network, IMAGE)
    whole = calibrate(network, tracing, BATCHES)
    bounded = calibrate(network, tracing, BATCHES, max_bytes=whole.num_bytes // 2)
    assert bounded.num_bytes <= whole.num_bytes // 2
    head = next(g for g in bounded.grams if g.consumer.modules == ("head",))
    assert len(head.blocks) > 1
    columns = np.sort(np.concatenate([part for part, _ in head.blocks]))
    assert columns.tolist() == list(range(6 * 64))
    filters = [set(head.consumer.units[0][part]) for part, _ in head.blocks]
    assert sum(map(len, filters)) == 6  # no filter has columns in two blocks
    complete = next(g for g in whole.grams if g.consumer.modules == ("head",)).blocks[0][1]
    for part, block in head.blocks:
        expected = without_ridge(complete)[:, part][:, :, part]
        assert torch.allclose(without_ridge(block), expected, atol=1e-12)


def test_a_cap_that_cannot_be_met_is_refused_with_one_that_can():
    network = made(Chain())
    with pytest.raises(ValueError, match=r"even in blocks of 64 columns; allow [\d,]+ or more"):
        calibrate(network, trace(network, IMAGE), BATCHES, max_bytes=1000)


def test_a_layer_that_changes_its_weight_first_is_named_and_left_out():
    network = made(Doubled())
    tracing = trace(network, IMAGE)
    with pytest.warns(UserWarning, match=r"could not be observed: second\.weight"):
        calibration = calibrate(network, tracing, BATCHES)
    assert [part.tensor for part in calibration.unseen] == ["second.weight"]
    assert [gram.consumer.modules for gram in calibration.grams] == [("head",)]


def test_the_network_is_left_as_it_is():
    network = made(Chain()).train()
    before = copy.deepcopy(network.state_dict())
    calibrate(network, trace(network, IMAGE), BATCHES)
    assert network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_no_images_are_refused():
    network = made(Chain())
    with pytest.raises(ValueError, match="needs images"):
        calibrate(network, trace(network, IMAGE), [])


def test_activations_that_are_not_finite_are_refused():
    network = made(Chain())
    with pytest.raises(ValueError, match="inputs of second are not finite"):
        calibrate(network, trace(network, IMAGE), [IMAGES * float("nan")])
