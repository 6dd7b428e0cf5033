"""Compensation: never worse on what it is fitted to, and exact where it can be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fppmo_ray.pruning import compensate, extract, trace
from fppmo_ray.training.networks import resnet20


class Chain(nn.Module):
    """Convolutions of every kind the fit knows, then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.strided = nn.Conv2d(8, 6, 3, stride=2, padding=(1, 2), dilation=2, bias=False)
        self.same = nn.Conv2d(6, 6, (3, 2), padding="same", padding_mode="reflect")
        self.head = nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        features = self.same(self.strided(self.first(images).relu()).relu())
        return self.head(features.relu().mean((2, 3)))


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(6, dtype=torch.long)
    return [(torch.randn(6, 3, 12, 12, generator=generator), labels) for _ in range(2)]


def half(space) -> np.ndarray:
    return np.arange(space.num_filters) % 2 == 0


def layer_errors(pruned: nn.Module, dense: nn.Module, kept: dict, images: Tensor) -> list[float]:
    """Mean squared error of every layer's output, each fed what the layers before it make."""
    outputs: dict[str, list[Tensor]] = {name: [] for name in kept}
    for network in (dense, pruned):
        handles = [
            network.get_submodule(name).register_forward_hook(
                lambda _layer, _args, output, name=name: outputs[name].append(output)
            )
            for name in kept
        ]
        with torch.no_grad():
            network.eval()(images)
        for handle in handles:
            handle.remove()
    return [
        float((reference[:, kept[name]] - output).square().mean())
        for name, (reference, output) in outputs.items()
    ]


def test_every_fitted_layer_is_nearer_to_the_dense_one(batches) -> None:
    torch.manual_seed(0)
    dense = Chain()
    tracing = trace(dense, batches[0][0])
    keep = half(tracing.space)
    kept = {name: slice(None, None, 2) for name in ("strided", "same")} | {"head": slice(None)}
    images = torch.cat([images for images, _ in batches])
    pruned = extract(dense, tracing, keep)
    before = layer_errors(pruned, dense, kept, images)
    compensate(pruned, dense, tracing, keep, batches)
    after = layer_errors(pruned, dense, kept, images)
    assert all(new < 0.9 * old for new, old in zip(after, before, strict=True))


def test_a_full_mask_changes_nothing(batches) -> None:
    dense = Chain()
    tracing = trace(dense, batches[0][0])
    keep = np.ones(tracing.space.num_filters, dtype=bool)
    pruned = extract(dense, tracing, keep)
    compensate(pruned, dense, tracing, keep, batches)
    for name, tensor in pruned.state_dict().items():
        assert torch.equal(tensor, dense.state_dict()[name])


def test_a_channel_that_the_others_span_is_replaced_exactly(batches) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3, bias=False), nn.Flatten(), nn.Linear(5 * 8 * 8, 2)
    )
    with torch.no_grad():
        first = dense[0]
        first.weight[3] = 2 * first.weight[0] - first.weight[1]
        first.bias[3] = 2 * first.bias[0] - first.bias[1]
    tracing = trace(dense, batches[0][0])
    keep = np.ones(tracing.space.num_filters, dtype=bool)
    keep[3] = False
    pruned = extract(dense, tracing, keep)
    images = batches[0][0]
    with torch.no_grad():
        expected, without = dense(images), pruned(images)
        compensate(pruned, dense, tracing, keep, batches)
        assert (pruned(images) - expected).abs().max() < 1e-3 * (without - expected).abs().max()


def test_layers_used_twice_and_grouped_ones_are_left_alone(batches) -> None:
    class Other(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Conv2d(8, 8, 1)
            self.grouped = nn.Conv2d(8, 8, 1, groups=2)

        def forward(self, images: Tensor) -> Tensor:
            features = self.shared(self.shared(self.first(images)).relu())
            features = self.same(self.strided(self.grouped(features).relu()).relu())
            return self.head(features.relu().mean((2, 3)))

    dense = Other()
    tracing = trace(dense, batches[0][0])
    keep = half(tracing.space)
    pruned, untouched = extract(dense, tracing, keep), extract(dense, tracing, keep)
    compensate(pruned, dense, tracing, keep, batches)
    assert torch.equal(pruned.shared.weight, untouched.shared.weight)
    assert torch.equal(pruned.grouped.weight, untouched.grouped.weight)
    assert not torch.equal(pruned.strided.weight, untouched.strided.weight)


def test_it_is_deterministic_and_leaves_modes_hooks_and_the_dense_network_alone() -> None:
    torch.manual_seed(0)
    dense = resnet20(shortcut="B").train()
    tracing = trace(dense, torch.zeros(1, 3, 32, 32))
    keep = half(tracing.space)
    batch = (torch.randn(70, 3, 32, 32), torch.zeros(70, dtype=torch.long))
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    pruned, again = extract(dense, tracing, keep), extract(dense, tracing, keep)
    compensate(pruned, dense, tracing, keep, [batch])
    compensate(again, dense, tracing, keep, [batch])
    for name, tensor in pruned.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    for module in [*dense.modules(), *pruned.modules()]:
        assert module.training
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_no_images_are_refused(batches) -> None:
    dense = Chain()
    tracing = trace(dense, batches[0][0])
    keep = half(tracing.space)
    with pytest.raises(ValueError, match="at least one batch of images"):
        compensate(extract(dense, tracing, keep), dense, tracing, keep, [])
