"""Integers that modules keep and that state widths: they are mended in the smaller network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fppmo_ray.pruning import check_equivalence, extract, load_network, save_network, trace

IMAGE = torch.zeros(1, 3, 8, 8)


class Net(nn.Module):
    """Two convolutions of eight and six filters, and a module between them."""

    def __init__(self, between: nn.Module, read: int = 8) -> None:
        super().__init__()
        self.first, self.between = nn.Conv2d(3, 8, 3, padding=1), between
        self.second, self.head = nn.Conv2d(read, 6, 1), nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = self.second(self.between(self.first(images)))
        return self.head(F.relu(features).mean((2, 3)))


class Between(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width = width


class Blur(Between):
    """A fixed depthwise filter whose groups are a number of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("blur", torch.rand(1, 1, 3, 3).repeat(8, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.blur, padding=1, groups=self.width)


class MaxOut(Between):
    def forward(self, x: Tensor) -> Tensor:
        return torch.max(*torch.split(x, self.width, dim=1))


class Halves(Between):
    """It keeps the widths of its parts in a tuple."""

    def __init__(self) -> None:
        super().__init__(4)
        self.widths = (4, 4)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.split(self.widths, 1)
        return left * right + x[:, : self.width] - x[:, self.width :]


class Viewed(Between):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, 2, self.width // 2, 64).sin().view(-1, self.width, 8, 8)


class Configured(Between):
    """It keeps its numbers in a dict, and divides a width by the number of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.heads = {"width": 8}, 2

    def forward(self, x: Tensor) -> Tensor:
        halves = torch.split(x, self.width // self.heads, 1)
        return torch.cat(halves[::-1], 1).view(-1, self.config["width"], 8, 8)


class Shuffled(Between):
    """A number states the width before and behind a channel shuffle."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, 2, self.width // 2, 8, 8).transpose(1, 2)
        return rows.reshape(-1, self.width, 8, 8)


class Reshaped(Between):
    """A result is given the shape of a tensor that was kept."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        self.shape = x.shape
        return self.inner(x).relu().flatten(1).view(self.shape)


class Flat(Between):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.width * 64).sin().unflatten(1, (self.width, 8, 8))


class Checked(Between):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.width:
            raise ValueError(f"expected {self.width} channels")
        return x.relu()


class Added(Between):
    """New tensors are as wide as a number or as another tensor."""

    def forward(self, x: Tensor) -> Tensor:
        zeros = torch.zeros(len(x), self.width, 1, 1, dtype=x.dtype)
        return x + zeros + x.new_ones((len(x), x.size(1), 8, 8))


class Spread(Between):
    def forward(self, x: Tensor) -> Tensor:
        zeros = torch.zeros(len(x), 1, 1, 1).to(x).expand(-1, self.width, -1, -1)
        return x + x.amax((2, 3), keepdim=True) + zeros


class NormedGroups(Between):
    """Each channel is normalised alone: there are as many norm groups as channels."""

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.width)


@pytest.mark.parametrize(
    ("make", "read", "filters", "numbers"),
    [
        (Blur, 8, 8, {"width": 5}),
        (lambda: MaxOut(4), 4, 4, {"width": 2}),
        (Halves, 4, 4, {"width": 2, "widths": (2, 2)}),
        (Viewed, 8, 4, {"width": 4}),
        (Configured, 8, 4, {"width": 4, "heads": 2, "config": {"width": 4}}),
        (Flat, 8, 8, {"width": 5}),
        (Shuffled, 8, 4, {"width": 4}),
        (Reshaped, 8, 8, {}),
        (Spread, 8, 8, {"width": 5}),
        (Checked, 8, 8, {"width": 5}),
        (Added, 8, 8, {"width": 5}),
        (NormedGroups, 8, 8, {"width": 5}),
    ],
)
def test_numbers_that_the_code_uses_as_widths_are_mended(
    make, read: int, filters: int, numbers: dict[str, object]
) -> None:
    torch.manual_seed(0)
    network = Net(make(), read)
    tracing = trace(network, IMAGE)
    assert tracing.left_whole == ()
    assert [group.num_filters for group in tracing.space.groups] == [filters, 6]
    keep = np.ones(filters + 6, dtype=bool)
    keep[: filters // 2] = False
    keep[1] = filters == 8
    smaller = extract(network, tracing, keep)
    state = vars(smaller.between)
    assert {name: state[name] for name in numbers} == numbers
    assert type(vars(network.between)["width"]) is int  # the traced network is as it was
    check_equivalence(network, tracing, IMAGE, keep=keep)


class Recurrent(nn.Module):
    """A recurrent layer reads the columns of a map, and checks how wide they are."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.features, self.layer = nn.Conv2d(3, 8, (8, 1)), layer
        self.head = nn.Linear(5, 3)

    def forward(self, images: Tensor) -> Tensor:
        columns = F.relu(self.features(images)).squeeze(2).permute(2, 0, 1)
        return self.head(self.layer(columns)[0])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_read_fewer_channels(kind: type[nn.Module]) -> None:
    network = Recurrent(kind(8, 5))
    tracing = trace(network, IMAGE)
    assert "features" in [group.name for group in tracing.space.groups]
    keep = np.arange(tracing.space.num_filters) % 2 == 0
    smaller = extract(network, tracing, keep)
    assert smaller.layer.input_size == 4
    assert smaller(IMAGE).shape == (8, 1, 3)


class Split(nn.Module):
    """Another forward, which exporters call, splits by a number that the usual one never reads."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.kernel = 4, 3
        self.inner = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(x.chunk(2, 1))
        return torch.cat([*parts, self.inner(parts[1])], 1)

    def forward_split(self, x: Tensor) -> Tensor:
        parts = list(x.split((self.c, self.c), 1))
        return torch.cat([*parts, self.inner(parts[1])], 1)


def test_a_number_that_no_code_has_read_is_mended_if_it_can_be_one_width_alone() -> None:
    network = Net(Split(), 12)
    tracing = trace(network, IMAGE)
    keep = np.arange(tracing.space.num_filters) % 2 == 0
    smaller = extract(network, tracing, keep).between
    assert (smaller.c, smaller.kernel) == (2, 3)
    features = torch.randn(1, 4, 8, 8)
    assert torch.equal(smaller(features), smaller.forward_split(features))


class Misleading(nn.Module):
    """A number in it happens to be as large as a width, and another range would compute else."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 8

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.steps):
            x = x.sin()
        return x


def test_a_number_that_is_no_width_stays() -> None:
    network = Net(Misleading())
    tracing = trace(network, IMAGE)
    assert [group.num_filters for group in tracing.space.groups] == [8, 6]
    keep = np.arange(14) % 2 == 0
    assert extract(network, tracing, keep).between.steps == 8
    check_equivalence(network, tracing, IMAGE, keep=keep)


def test_mended_numbers_are_saved_and_loaded(tmp_path) -> None:
    network = Net(Halves(), 4)
    tracing = trace(network, IMAGE)
    keep = np.arange(10) % 2 == 0
    smaller = extract(network, tracing, keep)
    path = save_network(smaller, tmp_path / "net", tracing=tracing, keep=keep)
    loaded = load_network(path, lambda: Net(Halves(), 4))
    assert (loaded.between.width, loaded.between.widths) == (2, (2, 2))
    assert torch.equal(loaded(IMAGE + 1), smaller.eval()(IMAGE + 1))
