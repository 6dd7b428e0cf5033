"""Dependency rules: each operation between two convolutions of eight filters, and proven."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fppmo_ray.pruning import check_equivalence, equivalence, trace
from fppmo_ray.pruning.dependency import RuleError, rules
from fppmo_ray.pruning.dependency.operation import Channels, Operation, UnsupportedForm

IMAGE = torch.zeros(1, 3, 8, 8)
Between = Callable[[Tensor], Tensor]


class Pair(nn.Module):
    def __init__(self, between: Between, read: int) -> None:
        super().__init__()
        self.first, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.between = between
        self.second, self.head = nn.Conv2d(read, 4, 1), nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = self.second(self.between(self.bn(self.first(images))))
        return self.head(F.relu(features).mean((2, 3)))


def times_means(x: Tensor) -> Tensor:
    return torch.einsum("nchw,nc->nchw", x, x.mean((2, 3)))


def unfolded(x: Tensor) -> Tensor:
    return F.unfold(x, 2, stride=2).unflatten(2, (4, 4))


def one_by_one(x: Tensor) -> Tensor:
    return torch.stack([half.relu() for half in x.unbind(3)], dim=3)


def into_zeros(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    return out.add_(x)


def halves(x: Tensor) -> Tensor:
    return x[:, : x.shape[1] // 2] * x[:, x.shape[1] // 2 :]


def in_place(x: Tensor) -> Tensor:
    return F.relu(x, inplace=True).mul_(2).clamp_(0, 6)


EVERY = [[channel] for channel in range(8)]
PAIRS = [[channel, channel + 4] for channel in range(4)]
FREE = {
    "in place": (in_place, 8, EVERY),
    "dropout": (nn.Sequential(nn.Dropout(0.1), nn.Dropout2d(0.1)), 8, EVERY),
    "pooling": (lambda x: F.max_pool2d(F.avg_pool2d(x, 3, 1), 2), 8, EVERY),
    "average of each channel": (lambda x: F.adaptive_avg_pool2d(x, 1), 8, EVERY),
    "adaptive pooling": (lambda x: F.adaptive_max_pool2d(x, 2), 8, EVERY),
    "resizing": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), 8, EVERY),
    "border padding": (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), 8, EVERY),
    "roll and flip of pixels": (lambda x: x.roll((1, 2), (2, 3)).flip(3), 8, EVERY),
    "every second pixel": (lambda x: x[:, :, ::2, 1::2], 8, EVERY),
    "softmax over pixels": (lambda x: x.flatten(2).softmax(2).unflatten(2, (8, 8)), 8, EVERY),
    "instance norm": (F.instance_norm, 8, EVERY),
    "product with means": (times_means, 8, EVERY),
    "stack of columns": (one_by_one, 8, EVERY),
    "sum into zeros": (into_zeros, 8, EVERY),
    "where": (lambda x: torch.where(x > 0, x, x.exp() - 1), 8, EVERY),
    "maximum over rows": (lambda x: x.max(3)[0][..., None] - x.amin(3, keepdim=True), 8, EVERY),
    "permuted and back": (lambda x: x.permute(0, 2, 3, 1).contiguous().movedim(3, 1), 8, EVERY),
    "another dtype and back": (lambda x: x.double().to(x.dtype), 8, EVERY),
    "repeat": (lambda x: x.repeat(1, 2, 1, 1), 16, EVERY),
    "stack beside itself": (lambda x: torch.stack([x, x.sin()], 2).flatten(1, 2), 16, EVERY),
    "pixels to channels": (lambda x: F.pixel_unshuffle(x, 2), 32, EVERY),
    "patches": (unfolded, 32, EVERY),
    "channel shuffle": (lambda x: F.channel_shuffle(x, 2), 8, PAIRS),
    "halves multiplied": (halves, 4, PAIRS),
    "chunks added": (lambda x: sum(x.chunk(2, 1)), 4, PAIRS),
    "beside a constant": (lambda x: torch.cat([x, torch.ones(len(x), 1, 8, 8).to(x)], 1), 9, EVERY),
}  # fmt: skip
STAYS = {
    "one channel by number": (lambda x: x[:, 3:4], 1),
    "unequal parts": (lambda x: torch.cat(x.split([3, 5], 1)[::-1], 1), 8),
    "channels in another order": (lambda x: x[:, torch.arange(7, -1, -1)], 8),
    "roll of channels": (lambda x: x.roll(1, 1), 8),
    "sum over channels": (lambda x: x / x.norm(dim=1, keepdim=True), 8),
    "sorted channels": (lambda x: x.sort(1).values, 8),
    "running sum of channels": (lambda x: x.cumsum(1), 8),
    "a constant per channel": (lambda x: x + torch.arange(8.0).to(x)[:, None, None], 8),
    "local response": (lambda x: F.local_response_norm(x, 3), 8),
    "a mask over two axes": (lambda x: x[torch.ones(x.shape[:2], dtype=bool)].view(x.shape), 8),
}


@pytest.mark.parametrize("name", FREE)
def test_channels_are_followed_through(name: str) -> None:
    between, read, together = FREE[name]
    network = Pair(between, read)
    tracing = trace(network, IMAGE)
    assert tracing.left_whole == ()
    assert [group.name for group in tracing.space.groups] == ["first", "second"]
    [units] = [part.units for part in tracing.slices if part.tensor == "bn.running_var"]
    found = [np.flatnonzero(units == unit).tolist() for unit in range(len(together))]
    assert found == together
    check_equivalence(network, tracing, IMAGE)


@pytest.mark.parametrize("name", STAYS)
def test_channels_that_cannot_go_stay_and_others_still_go(name: str) -> None:
    between, read = STAYS[name]
    with pytest.warns(UserWarning, match=r"left whole.*: first \("):
        tracing = trace(Pair(between, read), IMAGE)
    assert [group.name for group in tracing.space.groups] == ["second"]


@pytest.mark.parametrize(
    ("first", "second", "image"),
    [
        (nn.Conv1d(3, 8, 3), nn.Conv1d(8, 4, 1), torch.zeros(1, 3, 16)),
        (nn.Conv3d(3, 8, 3), nn.Conv3d(8, 4, 1), torch.zeros(1, 3, 4, 4, 4)),
        (nn.Conv2d(3, 8, 3), nn.LazyLinear(4), IMAGE),
    ],
)
def test_convolutions_of_any_dimension(first: nn.Module, second: nn.Module, image: Tensor) -> None:
    flat = [nn.Flatten()] if isinstance(second, nn.LazyLinear) else []
    network = nn.Sequential(first, nn.ReLU(), *flat, second, nn.Flatten(), nn.LazyLinear(2))
    network(image)
    groups = trace(network, image).space.groups
    assert [group.num_filters for group in groups] == [8, 4]


@pytest.mark.parametrize("error", [KeyError, IndexError, AttributeError, TypeError, ValueError])
def test_an_exception_inside_a_rule_is_a_bug_and_is_raised(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def broken(op: Operation) -> list[Channels]:
        raise error("dim")

    monkeypatch.setitem(rules._BY_NAME, "sin", broken)
    with pytest.raises(RuleError, match=rf"aten\.sin\.default failed .*{error.__name__}.* bug in"):
        trace(Pair(torch.sin, 8), IMAGE)


def test_a_rule_that_returns_too_few_positions_is_a_bug_and_is_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def halved(op: Operation) -> list[Channels]:
        return [{1: op.first.channels[1][:4]}]

    monkeypatch.setitem(rules._BY_NAME, "sin", halved)
    with pytest.raises(RuleError, match=r"\(4,\) positions along axis 1 of \(2, 8, 8, 8\)"):
        trace(Pair(torch.sin, 8), IMAGE)


def test_what_a_rule_refuses_is_left_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(op: Operation) -> list[Channels]:
        raise UnsupportedForm("not today")

    monkeypatch.setitem(rules._BY_NAME, "sin", refusing)
    with pytest.warns(UserWarning, match=r"left whole.*: first \(it goes through sin"):
        tracing = trace(Pair(torch.sin, 8), IMAGE)
    assert [group.name for group in tracing.space.groups] == ["second"]


def test_an_exception_in_our_own_extraction_is_not_blamed_on_the_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> nn.Module:
        raise IndexError("ours")

    monkeypatch.setattr(equivalence, "sharing_extract", broken)
    with pytest.raises(IndexError, match="ours"):
        trace(Pair(torch.sin, 8), IMAGE)


def test_a_convolution_from_one_channel_to_one_costs_a_constant() -> None:
    gray = nn.Conv2d(1, 1, 3, padding=1)
    network = nn.Sequential(gray, nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    tracing = trace(network, torch.zeros(1, 1, 8, 8))
    assert [group.name for group in tracing.space.groups] == ["1"]
    assert tracing.space.constant_macs == 9 * 64
    assert tracing.space.dense_macs == (9 + 9 * 8 + 8 * 4) * 64
