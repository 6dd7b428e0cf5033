"""Tracing: the groups found, the groups left whole, and networks on which the proof fails."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from traced_networks import (
    IMAGE,
    Attentive,
    Depthwise,
    DepthwiseTransposed,
    Excited,
    Flattened,
    Gated,
    Grouped,
    GroupedTransposed,
    GroupNormed,
    GroupNormedBlock,
    Heads,
    LayerNormed,
    Net,
    Normalised,
    Padded,
    PartlyAdded,
    Rescaled,
    Reshaped,
    Returned,
    Scaled,
    Shared,
    Shuffled,
    ShuffledPixels,
    Sorted,
    Standardised,
    TrainedHead,
    Transposed,
    Twice,
)

from fppmo_ray.pruning import check_equivalence, extract, trace
from fppmo_ray.training.networks import resnet20, resnet56, vgg16_bn


def random_mask(space, seed: int, share: float = 0.5) -> np.ndarray:
    keep = np.random.default_rng(seed).random(space.num_filters) < share
    keep[space.offsets] = True
    return keep


def counted_macs(network: nn.Module, inputs: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(inputs)
    return counter.get_total_flops() // 2


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
    "training head": (TrainedHead, {"first": 8, "second": 6}),
    "padding": (Padded, {"first": 8, "second": 6}),
    "shuffle": (Shuffled, {"first": 4, "second": 6}),
    "pixel shuffle": (ShuffledPixels, {"first": 2, "second": 6}),
    "gate": (Gated, {"first": 4, "second": 6}),
    "excitation": (Excited, {"first": 8, "second": 6, "squeeze": 4}),
    "depthwise transposed": (DepthwiseTransposed, {"first": 8, "second": 6}),
    "group norm": (GroupNormed, {"first": 4, "second": 6}),
    "group norm of single channels": (lambda: GroupNormed(8), {"first": 8, "second": 6}),
    "group norm without weights": (lambda: GroupNormed(2, False), {"first": 2, "second": 6}),
    "group norm of a residual stream": (GroupNormedBlock, {"first": 2, "second": 6, "grouped": 4}),
    "grouped transposed": (GroupedTransposed, {"first": 4, "second": 6, "up": 6}),
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
        parameters = sum(parameter.numel() for parameter in smaller.parameters())
        assert tracing.space.parameters(keep) == parameters
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


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Normalised, "mixed with one another"),
        (lambda: GroupNormed(1), "normalised together"),
        (LayerNormed, "normalised together"),
        (Standardised, "mixed with one another"),
        (Rescaled, "weights that read it are computed in the forward"),
        (Heads, "the smaller network raises RuntimeError"),
        (Reshaped, "the smaller network raises RuntimeError"),
        (Returned, "the network returns it"),
        (Sorted, "goes through cummax, which is not followed"),
    ],
)
def test_a_group_that_is_not_exact_is_left_whole_and_named(make: type[Net], reason: str) -> None:
    with pytest.warns(UserWarning, match=rf"left whole.*first \(.*{reason}"):
        tracing = trace(make(), IMAGE)
    assert tracing.left_whole == ("first",)
    assert [group.name for group in tracing.space.groups] == ["second"]


def test_a_product_of_activations_costs_what_it_is_wide() -> None:
    with pytest.warns(UserWarning, match=r"query \(a product of activations sums over it"):
        tracing = trace(Attentive(), IMAGE)
    assert {group.name: group.num_filters for group in tracing.space.groups} == {
        "first": 8,
        "second": 6,
    }
    products = [cost for cost in tracing.space.layer_costs if cost.layer == "Attentive"]
    widths = [(cost.out_width.terms, cost.in_width.terms) for cost in products]
    assert widths == [((), ()), (((0, 1),), ())]
    assert products[1].macs_per_pair * products[1].in_width.constant == 64 * 64


def test_the_check_finds_one_wrong_index() -> None:
    network = Net()
    tracing = trace(network, IMAGE)
    for part in tracing.slices:
        if part.tensor == "bn.running_mean":
            part.units[:2] = part.units[1::-1]
    with pytest.raises(ValueError, match="off by"):
        check_equivalence(network, tracing, IMAGE)


@pytest.mark.parametrize(("make", "blocks"), [(resnet20, 3), (resnet56, 9)])
@pytest.mark.parametrize("ignore", [(), ("conv1",)])
def test_option_a_pads_the_stream_so_that_16_channels_run_through_it(
    make, blocks: int, ignore: tuple[str, ...]
) -> None:
    with pytest.warns(UserWarning, match=r"left whole.*layer2.0.conv2 \(padding"):
        tracing = trace(make(shortcut="A"), torch.zeros(1, 3, 32, 32), ignore=ignore)
    assert [(group.name, group.num_filters) for group in tracing.space.groups] == [
        *([] if ignore else [("conv1", 16)]),
        *(
            (f"layer{stage}.{block}.conv1", 8 * 2**stage)
            for stage in (1, 2, 3)
            for block in range(blocks)
        ),
    ]
    assert tracing.left_whole == ("layer2.0.conv2", "layer3.0.conv2")


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


class Meeting(nn.Module):
    """Two inputs of different shapes meet in the channels of their convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 6, 3), nn.Conv1d(2, 6, 3)
        self.head = nn.Linear(6, 4)

    def forward(self, images: Tensor, sounds: Tensor) -> tuple[list[Tensor], Tensor]:
        features = self.left(images).mean((2, 3)) * self.right(sounds).amax(2)
        logits = self.head(features)
        return [logits], logits.softmax(1)


def test_several_inputs_and_nested_outputs() -> None:
    network, inputs = Meeting(), (IMAGE, torch.zeros(1, 2, 9))
    tracing = trace(network, inputs)
    assert [(group.name, group.num_filters) for group in tracing.space.groups] == [("left", 6)]
    check_equivalence(network, tracing, inputs)


def test_ignored_layers_keep_all_filters_without_a_warning() -> None:
    tracing = trace(Net(), IMAGE, ignore=["first"])
    assert [group.name for group in tracing.space.groups] == ["second"]
    assert tracing.left_whole == ()
    with pytest.raises(ValueError, match=r"does not have: \['fist'\]"):
        trace(Net(), IMAGE, ignore=["fist"])


def test_patterns_ignore_several_layers_and_all_within_a_module() -> None:
    def groups(*ignore: str) -> list[str]:
        tracing = trace(resnet20(shortcut="B"), torch.zeros(1, 3, 32, 32), ignore=ignore)
        return [group.name for group in tracing.space.groups]

    assert groups("layer?.*.conv1", "conv1", "layer2") == ["layer3.0.conv2"]


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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.weight", "1.running_var", "3.weight"])
def test_a_weight_that_is_not_finite_is_named(name: str, value: float) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    ).eval()
    trace(network, IMAGE)
    tensor = network.state_dict()[name]
    tensor.view(-1)[:2] = value
    sentence = f"{name} of the network holds 2 values of {tensor.numel()} that are NaN or infinite"
    with pytest.raises(ValueError, match=sentence):
        trace(network, IMAGE)


def test_masks_of_minus_infinity_in_buffers_are_no_fault() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    network.register_buffer("causal", torch.full((2, 2), -torch.inf))
    assert trace(network, IMAGE).space.num_filters == 8
