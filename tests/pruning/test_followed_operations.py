"""Operations between two convolutions through which channels are followed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fppmo_ray.pruning import check_equivalence, extract, trace

IMAGE = torch.zeros(1, 3, 8, 8)


class Between(nn.Module):
    """Applies a function to the 8 channels of one convolution, before another reads them."""

    def __init__(self, function: Callable[[Between, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3)
        self.head, self.untouched, self.touched = nn.Linear(6, 4), 3, 5
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        features = self.function(self, F.relu(self.first(images)))
        return self.head(F.relu(self.second(features)).mean((2, 3)))


def spectrum(_: Between, x: Tensor) -> Tensor:
    parts = torch.view_as_real(torch.fft.rfft2(x)) * 1.5
    return torch.fft.irfft2(torch.view_as_complex(parts), s=(8, 8))


def warped(_: Between, x: Tensor) -> Tensor:
    grid = F.affine_grid(torch.tensor([[[0.9, 0.1, 0], [0, 1, 0]]]).to(x), [1, 1, 8, 8], False)
    return F.grid_sample(x, grid.expand(len(x), -1, -1, -1), align_corners=False)


def folded(_: Between, x: Tensor) -> Tensor:
    return F.fold(F.unfold(x, 2, stride=2) * 2, (8, 8), 2, stride=2)


def written(_: Between, x: Tensor) -> Tensor:
    twice = torch.zeros(len(x), x.shape[1] + x.shape[1], 8, 8).to(x)
    twice[:, : x.shape[1]] = x
    twice[:, x.shape[1] :] = x.flip(2)
    return twice.unflatten(1, (2, -1)).sum(1)


def drawn(_: Between, x: Tensor) -> Tensor:
    return x + torch.randn(x.shape[1]).to(x).view(1, -1, 1, 1) * torch.rand(x.shape[1], 1, 1).to(x)


def partial(network: Between, x: Tensor) -> Tensor:
    one, other = x.split([network.untouched, network.touched], 1)
    return torch.cat([one, other.sin()], 1)


def checked(_: Between, x: Tensor) -> Tensor:
    return torch.distributions.Normal(x, 1.0, validate_args=True).mean


OPERATIONS: dict[str, tuple[Callable[[Between, Tensor], Tensor], dict[str, int]]] = {
    "a Fourier transform": (spectrum, {"first": 8, "second": 6}),
    "sampling on a grid": (warped, {"first": 8, "second": 6}),
    "patches that are added up": (folded, {"first": 8, "second": 6}),
    "the largest pixels": (lambda _, x: x.topk(4, -1).values, {"first": 8, "second": 6}),
    "writing into zeros": (written, {"first": 8, "second": 6}),
    "noise of its own width": (drawn, {"first": 8, "second": 6}),
    "parts of numbers that the module keeps": (partial, {"first": 8, "second": 6}),
    "a check of all values": (checked, {"first": 8, "second": 6}),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_channels_are_followed_through(name: str) -> None:
    function, groups = OPERATIONS[name]
    torch.manual_seed(0)
    network = Between(function)
    tracing = trace(network, IMAGE)
    assert {group.name: group.num_filters for group in tracing.space.groups} == groups
    assert tracing.left_whole == ()
    check_equivalence(network, tracing, IMAGE)


def test_numbers_of_unequal_parts_are_mended() -> None:
    network = Between(partial)
    tracing = trace(network, IMAGE)
    keep = np.ones(14, dtype=bool)
    keep[[0, 3, 4]] = False
    smaller = extract(network, tracing, keep)
    assert (smaller.untouched, smaller.touched) == (2, 3)


def test_channels_stay_where_code_counts_them() -> None:
    def constant(_: Between, x: Tensor) -> Tensor:
        return torch.cat([x[:, :3] * 2, x[:, 3:].sin()], 1)

    with pytest.warns(UserWarning, match=r"left whole.*first \("):
        tracing = trace(Between(constant), IMAGE)
    assert [group.name for group in tracing.space.groups] == ["second"]


def test_convolutions_of_complex_numbers_are_pruned() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(*widths, 3, dtype=torch.cfloat) for widths in ((3, 8), (8, 6), (6, 2))]
    network, image = nn.Sequential(*layers), torch.zeros(1, 3, 8, 8, dtype=torch.cfloat)
    tracing = trace(network, image)
    assert {group.name: group.num_filters for group in tracing.space.groups} == {"0": 8, "1": 6}
    smaller = extract(network, tracing, np.arange(14) % 2 == 0)
    assert smaller[1].weight.shape == (3, 4, 3, 3)
    assert smaller(image).dtype == torch.cfloat
