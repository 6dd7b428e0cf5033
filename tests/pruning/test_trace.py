"""Tracing: which groups there are, what is left whole, and that the proof can fail."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fppmo_ray.pruning import check_equivalence, extract, trace
from fppmo_ray.training.networks import resnet20, resnet56, vgg16_bn

IMAGE = torch.zeros(1, 3, 8, 8)


def random_mask(space, seed: int, share: float = 0.5) -> np.ndarray:
    keep = np.random.default_rng(seed).random(space.num_filters) < share
    keep[space.offsets] = True
    return keep


def counted_macs(network: nn.Module, inputs: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(inputs)
    return counter.get_total_flops() // 2


class Net(nn.Module):
    """Two convolutions, an operation between them that the subclass gives, and a head."""

    def __init__(self, channels: int = 8, read: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(read, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def between(self, features: Tensor) -> Tensor:
        return F.relu(features)

    def forward(self, images: Tensor) -> Tensor:
        features = self.second(self.between(self.bn(self.first(images))))
        return self.head(F.relu(features).mean((2, 3)))


class Flattened(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6 * 8 * 8, 4)

    def forward(self, images: Tensor) -> Tensor:
        features = self.second(F.relu(self.bn(self.first(images))))
        return self.head(torch.flatten(F.relu(features), 1))


class Twice(Net):
    def __init__(self) -> None:
        super().__init__(read=16)

    def between(self, features: Tensor) -> Tensor:
        return torch.cat([features, F.relu(features)], dim=1)


class PartlyAdded(Net):
    """The concatenation of two layers is added to a third, so the third has two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 5, 1)

    def forward(self, images: Tensor) -> Tensor:
        joined = torch.cat([self.left(images), self.right(images)], dim=1)
        features = self.second(F.relu(self.bn(self.first(images)) + joined))
        return self.head(F.relu(features).mean((2, 3)))


class Depthwise(Net):
    def __init__(self, filters: int = 1) -> None:
        super().__init__(read=8 * filters)
        self.depthwise = nn.Conv2d(8, 8 * filters, 3, padding=1, groups=8)

    def between(self, features: Tensor) -> Tensor:
        return F.relu(self.depthwise(features))


class Grouped(Net):
    def __init__(self) -> None:
        super().__init__(read=12)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2)

    def between(self, features: Tensor) -> Tensor:
        return F.relu(self.grouped(features))


class Shared(Net):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(8, 8, 3, padding=1)

    def between(self, features: Tensor) -> Tensor:
        return self.shared(F.relu(self.shared(features)))


class Transposed(Net):
    def __init__(self) -> None:
        super().__init__(read=10)
        self.up = nn.ConvTranspose2d(8, 10, 2, stride=2)

    def between(self, features: Tensor) -> Tensor:
        return F.relu(self.up(features))


class Scaled(Net):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.prelu = nn.PReLU(8)

    def between(self, features: Tensor) -> Tensor:
        return self.prelu(features * self.scale)


class Attending(Net):
    """A product of activations, whose cost no layer has."""

    def between(self, features: Tensor) -> Tensor:
        return F.relu(features)

    def forward(self, images: Tensor) -> Tensor:
        features = self.second(self.between(self.bn(self.first(images)))).flatten(2)
        return self.head((features.detach() * 0 + features).mean(2)) @ torch.eye(4).to(images)


class Normalised(Net):
    """Mixes channels without a module, so only the comparison of outputs can tell."""

    def between(self, features: Tensor) -> Tensor:
        return features.softmax(dim=1)


class GroupNormed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 8)

    def between(self, features: Tensor) -> Tensor:
        return self.norm(features)


class Padded(Net):
    """Channels move by two, which the dependency graph does not see."""

    def __init__(self) -> None:
        super().__init__(read=12)

    def between(self, features: Tensor) -> Tensor:
        return F.pad(F.relu(features), (0, 0, 0, 0, 2, 2))


class TrainedHead(Net):
    """A second head that runs in training mode only and reads the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Conv2d(8, 4, 1)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        features = F.relu(self.bn(self.first(images)))
        logits = self.head(F.relu(self.second(features)).mean((2, 3)))
        return (logits, self.auxiliary(features).mean((2, 3))) if self.training else logits


EXACT = {
    "plain": (Net, {"first": 8, "second": 6}),
    "flatten": (Flattened, {"first": 8, "second": 6}),
    "concat with itself": (Twice, {"first": 8, "second": 6}),
    "partly added": (PartlyAdded, {"first": 3, "first (2)": 5, "second": 6}),
    "depthwise": (Depthwise, {"first": 8, "second": 6}),
    "depthwise, two filters": (lambda: Depthwise(2), {"first": 8, "second": 6}),
    "grouped": (Grouped, {"first": 4, "second": 6, "grouped": 6}),
    "shared layer": (Shared, {"first": 8, "second": 6}),
    "transposed": (Transposed, {"first": 8, "second": 6, "up": 10}),
    "scale and PReLU": (Scaled, {"first": 8, "second": 6}),
    "matrix product": (Attending, {"first": 8, "second": 6}),
    "training head": (TrainedHead, {"first": 8, "second": 6}),
}


@pytest.mark.parametrize("name", EXACT)
def test_groups_and_macs_of_small_networks(name: str) -> None:
    make, groups = EXACT[name]
    torch.manual_seed(0)
    network = make()
    tracing = trace(network, IMAGE)
    assert {group.name: group.num_filters for group in tracing.space.groups} == groups
    assert tracing.left_whole == ()
    assert tracing.space.dense_macs == counted_macs(network, IMAGE)
    for seed in range(3):
        keep = random_mask(tracing.space, seed)
        smaller = extract(network, tracing, keep)
        assert tracing.space.macs(keep) == counted_macs(smaller, IMAGE)
        smaller.train()(IMAGE.expand(2, -1, -1, -1))
    check_equivalence(network, tracing, IMAGE)


def test_the_units_of_a_flattened_layer_are_written_out() -> None:
    tracing = trace(Flattened(), IMAGE)
    units = {(part.tensor, part.axis): part.units.tolist() for part in tracing.slices}
    first, second = list(range(8)), list(range(8, 14))
    assert units == {
        ("first.weight", 0): first,
        ("first.bias", 0): first,
        ("bn.weight", 0): first,
        ("bn.bias", 0): first,
        ("bn.running_mean", 0): first,
        ("bn.running_var", 0): first,
        ("second.weight", 1): first,
        ("second.weight", 0): second,
        ("second.bias", 0): second,
        ("head.weight", 1): np.repeat(second, 64).tolist(),
    }


@pytest.mark.parametrize("make", [Normalised, GroupNormed, Padded])
def test_a_group_that_is_not_exact_is_left_whole_and_named(make: type[Net]) -> None:
    with pytest.warns(UserWarning, match=r"left whole.*first \("):
        tracing = trace(make(), IMAGE)
    assert tracing.left_whole == ("first",)
    assert [group.name for group in tracing.space.groups] == ["second"]


def test_the_check_finds_one_wrong_index() -> None:
    network = Net()
    tracing = trace(network, IMAGE)
    for part in tracing.slices:
        if part.tensor == "bn.running_mean":
            part.units[:2] = part.units[1::-1]
    with pytest.raises(ValueError, match="off by"):
        check_equivalence(network, tracing, IMAGE)


@pytest.mark.parametrize(("make", "blocks"), [(resnet20, 3), (resnet56, 9)])
def test_option_a_keeps_the_stream_whole_and_every_block_prunable(make, blocks: int) -> None:
    with pytest.warns(UserWarning, match="left whole"):
        tracing = trace(make(shortcut="A"), torch.zeros(1, 3, 32, 32))
    assert [(group.name, group.num_filters) for group in tracing.space.groups] == [
        (f"layer{stage}.{block}.conv1", 8 * 2**stage)
        for stage in (1, 2, 3)
        for block in range(blocks)
    ]
    assert "conv1" in tracing.left_whole


@pytest.mark.parametrize(("make", "blocks"), [(resnet20, 3), (resnet56, 9)])
def test_option_b_has_one_group_per_block_and_one_per_stage(make, blocks: int) -> None:
    tracing = trace(make(shortcut="B"), torch.zeros(1, 3, 32, 32))
    assert len(tracing.space.groups) == 3 * blocks + 3
    assert tracing.left_whole == ()


@pytest.mark.parametrize(
    ("make", "macs"),
    [  # stem + stages + head, by hand
        (resnet20, 442_368 + 6 * 2_359_296 + 2 * (1_179_648 + 5 * 2_359_296) + 640),
        (resnet56, 442_368 + 18 * 2_359_296 + 2 * (1_179_648 + 17 * 2_359_296) + 640),
    ],
)
def test_dense_macs_are_those_counted_by_hand(make, macs: int) -> None:
    with pytest.warns(UserWarning, match="left whole"):
        assert trace(make(), torch.zeros(1, 3, 32, 32)).space.dense_macs == macs


def test_every_layer_of_vgg_can_be_pruned() -> None:
    tracing = trace(vgg16_bn(), torch.zeros(1, 3, 32, 32))
    widths = [64, 64, 128, 128, 256, 256, 256, *[512] * 6]
    assert [group.num_filters for group in tracing.space.groups] == widths


def test_tracing_leaves_the_network_and_the_random_state_alone() -> None:
    network = Net().train()
    network.bn.eval()
    network.second.requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    random_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    trace(network, IMAGE)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert network.training
    assert not network.bn.training
    assert not network.second.weight.requires_grad
    assert network.first.weight.grad is None
    assert not network.first._forward_hooks


def test_tracing_twice_gives_the_same_space_and_travels_as_bytes() -> None:
    network = resnet20(shortcut="B")
    first, second = (trace(network, torch.zeros(1, 3, 32, 32)) for _ in range(2))
    assert first.space.fingerprint() == second.space.fingerprint()
    copied = pickle.loads(pickle.dumps(first))
    keep = random_mask(first.space, 0)
    for part, other in zip(first.slices, copied.slices, strict=True):
        assert (part.kept(keep) == other.kept(keep)).all()


def test_a_network_can_be_traced_under_no_grad_and_with_frozen_weights() -> None:
    with torch.no_grad():
        tracing = trace(Net().requires_grad_(False), IMAGE)
    assert len(tracing.space.groups) == 2


def test_an_extracted_network_can_be_traced_again() -> None:
    network = Depthwise()
    tracing = trace(network, IMAGE)
    smaller = extract(network, tracing, random_mask(tracing.space, 0))
    again = trace(smaller, IMAGE)
    assert again.space.dense_macs == tracing.space.macs(random_mask(tracing.space, 0))


def test_ignored_layers_keep_all_filters_without_a_warning() -> None:
    tracing = trace(Net(), IMAGE, ignore=["first"])
    assert [group.name for group in tracing.space.groups] == ["second"]
    assert tracing.left_whole == ()
    with pytest.raises(ValueError, match=r"does not have: \['fist'\]"):
        trace(Net(), IMAGE, ignore=["fist"])


class Reading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Conv2d(3, 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.only(images)


@pytest.mark.parametrize(
    ("make", "inputs", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 3)), torch.zeros(1, 3), "network with convolutions"),
        (Reading, IMAGE, "no channel group that can be pruned"),
        (Net, torch.zeros(1, 4, 8, 8), "must run in eval mode on inputs"),
        (Net, torch.zeros(8), "batch axis"),
        (Net, (3, 8, 8), "batch axis"),
    ],
)
def test_what_cannot_be_traced_is_refused_with_a_sentence(make, inputs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trace(make(), inputs)
