"""The proof: outputs that tell something, random forwards, precisions, batches, modes, wrappers."""

from __future__ import annotations

import random
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fppmo_ray.pruning import Tracing, check_equivalence, extract, trace
from fppmo_ray.pruning.conditions import shortened
from fppmo_ray.pruning.noise import even_noise

IMAGE = torch.zeros(1, 3, 8, 8)
GROUPS = [("first", 8), ("second", 6)]


class Net(nn.Module):
    """Two convolutions with batch norms, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 6, 3, padding=1), nn.Linear(6, 4)

    def features(self, images: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.bn(self.first(images)))))

    def forward(self, images: Tensor):
        return self.head(self.features(images).mean((2, 3)))


class WithZero(Net):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(images), images.new_zeros(())


class WithMaskAndIndex(Net):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        logits = super().forward(images)
        return {"logits": logits, "bright": images[:, 0] > 0, "class": logits.argmax(1)}


class WithInfinities(Net):
    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        missing = torch.full_like(logits[:, :2], float("-inf"))
        return torch.cat([logits, missing, missing + float("inf")], dim=1)


class Positive(Net):
    """Ends in one channel and ReLU, which random weights often leave at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 1)
        nn.init.constant_(self.head.bias, -5.0)

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(super().forward(images))


class AlwaysRandom(Net):
    """Drops, adds noise and scales at random in eval mode too."""

    def features(self, images: Tensor) -> Tensor:
        features = F.dropout(F.relu(self.bn(self.first(images))), 0.5, training=True)
        noise = torch.randn_like(features) + torch.empty_like(features).uniform_(1, 2)
        scale = 0.5 + random.random() + float(np.random.rand())  # noqa: NPY002
        return F.relu(self.second(F.dropout2d(features + noise, 0.5) * scale))


class Casting(Net):
    def features(self, images: Tensor) -> Tensor:
        features = super().features(images)
        return features * torch.sigmoid(features.mean((2, 3), keepdim=True).float()).to(images)


class OwnState(Net):
    """Makes a bias that has float32, whatever precision its weights have."""

    def forward(self, images: Tensor) -> Tensor:
        return F.linear(self.features(images).mean((2, 3)), self.head.weight, torch.ones(4))


class Clips(Net):
    """The batch axis holds clips of four frames."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).view(-1, 4, 4).mean(1)


class Detector(Net):
    """Wants targets in training mode."""

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor:
        if self.training and targets is None:
            raise ValueError("targets must be given in training mode")
        return super().forward(images)


def traced(network: nn.Module, images: Tensor = IMAGE) -> Tracing:
    tracing = trace(network, images)
    assert [(group.name, group.num_filters) for group in tracing.space.groups] == GROUPS
    return tracing


def one_removed(tracing: Tracing) -> np.ndarray:
    keep = np.ones(tracing.space.num_filters, dtype=bool)
    keep[3] = False
    return keep


@pytest.mark.parametrize("make", [WithZero, WithMaskAndIndex, WithInfinities, AlwaysRandom])
def test_outputs_that_tell_nothing_and_random_forwards_do_not_spoil_the_proof(make) -> None:
    network = make()
    check_equivalence(network, traced(network), IMAGE)


@pytest.mark.parametrize("seed", range(3))
def test_an_output_that_is_zero_for_some_weights_is_proven_with_others(seed: int) -> None:
    torch.manual_seed(seed)
    traced(Positive())


@pytest.mark.parametrize("make", [WithZero, WithMaskAndIndex, AlwaysRandom, Casting])
def test_one_wrong_index_is_found_beside_outputs_that_tell_nothing(make) -> None:
    network = make()
    tracing = traced(network)
    for part in tracing.slices:
        if part.tensor == "bn.running_mean":
            part.units[:2] = part.units[1::-1]
    with pytest.raises(ValueError, match="off by"):
        check_equivalence(network, tracing, IMAGE)


def test_a_network_whose_outputs_all_tell_nothing_is_refused() -> None:
    class Nothing(Net):
        def forward(self, images: Tensor) -> Tensor:
            return 0 * super().forward(images)

    with pytest.raises(ValueError, match=r"none of its outputs changes.*such as logits"):
        trace(Nothing(), IMAGE)


class Classes(Net):
    """Returns the classes only."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = super().forward(images)
        return logits.argmax(1), 0 * logits


class Bright(Net):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) > 0


class Saturated(Net):
    """Its bias is so large that nothing else shows, until the proof draws another."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.constant_(self.head.bias, -100.0)

    def forward(self, images: Tensor) -> Tensor:
        return F.relu6(super().forward(images))


def test_large_biases_do_not_hide_what_is_proven() -> None:
    torch.manual_seed(0)
    traced(Saturated())


@pytest.mark.parametrize("make", [Classes, Bright])
def test_a_network_that_returns_choices_is_proven_by_what_it_chooses_from(make) -> None:
    torch.manual_seed(0)
    network = make()
    tracing = traced(network)
    check_equivalence(network, tracing, IMAGE, keep=one_removed(tracing))
    part = next(part for part in tracing.slices if part.tensor == "bn.running_mean")
    part.units[:2] = part.units[1::-1]
    with pytest.raises(ValueError, match="off by"):
        check_equivalence(network, tracing, IMAGE)


@pytest.mark.filterwarnings("ignore:Using .torch.compile")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile's own imports
def test_a_compiled_module_within_a_network_is_followed_uncompiled() -> None:
    network = Net()
    network.second = torch.compile(network.second, backend="eager")
    tracing = trace(network, IMAGE)
    assert [group.name for group in tracing.space.groups] == ["first", "second._orig_mod"]
    smaller = extract(network, tracing, one_removed(tracing))
    assert smaller.second._orig_mod.weight.shape == (6, 7, 3, 3)


def test_a_list_of_outputs_may_be_as_long_as_the_batch() -> None:
    class Apart(Net):
        def forward(self, images: Tensor) -> list[Tensor]:
            return [super(Apart, self).forward(image[None]) for image in images]

    traced(Apart())


@pytest.mark.parametrize("error", [KeyError, AttributeError, ZeroDivisionError])
def test_whatever_a_training_forward_raises_the_network_is_followed_in_eval_mode(error) -> None:
    class Failing(Net):
        def forward(self, images: Tensor) -> Tensor:
            if self.training:
                raise error("targets")
            return super().forward(images)

    with pytest.warns(UserWarning, match=f"in training mode it raises {error.__name__}"):
        traced(Failing())


def test_one_number_per_image_and_one_for_all_are_example_inputs() -> None:
    class Timed(Net):
        def forward(self, images: Tensor, time: Tensor, scale: Tensor) -> Tensor:
            return super().forward(images) * time[:, None] * scale

    tracing = trace(Timed(), (IMAGE, torch.tensor([7]), torch.tensor(2.0)))
    assert [(group.name, group.num_filters) for group in tracing.space.groups] == GROUPS


@pytest.mark.filterwarnings("ignore:the network computes in float32")
@pytest.mark.parametrize("make", [Casting, OwnState])
def test_a_network_that_computes_in_float32_is_proven_in_float32(make) -> None:
    network = make()
    check_equivalence(network, traced(network), IMAGE)


def test_a_batch_of_frames_is_one_input() -> None:
    frames = torch.zeros(8, 3, 8, 8)
    tracing = traced(Clips(), frames)
    assert tracing.space.dense_macs == 8 * (64 * 27 * 8 + 64 * 9 * 8 * 6 + 6 * 4)


def test_a_network_that_does_not_run_in_training_mode_is_followed_in_eval_mode() -> None:
    with pytest.warns(UserWarning, match="eval mode only.*ValueError: targets must be given"):
        tracing = trace(Detector(), IMAGE)
    assert [(group.name, group.num_filters) for group in tracing.space.groups] == GROUPS


def test_a_network_that_never_runs_is_refused_with_what_it_raises() -> None:
    with pytest.raises(ValueError, match=r"eval mode.*\(1, 4, 8, 8\).*expected input.* 3 channels"):
        trace(Net(), torch.zeros(1, 4, 8, 8))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile's own imports
@pytest.mark.parametrize("wrapped", [nn.DataParallel, partial(torch.compile, backend="eager")])
def test_wrapped_networks_are_opened(wrapped) -> None:
    network = Net().eval()
    wrapper = wrapped(network)
    tracing = traced(wrapper)
    smaller = extract(wrapper, tracing, one_removed(tracing))
    assert type(smaller) is Net
    assert torch.equal(smaller(IMAGE), extract(network, tracing, one_removed(tracing))(IMAGE))
    check_equivalence(wrapper, tracing, IMAGE)


def test_a_half_precision_network_is_proven() -> None:
    network = Net().bfloat16()
    check_equivalence(network, traced(network), IMAGE)


def test_large_images_are_proven_on_a_crop() -> None:
    images, clip, features = torch.rand(1, 3, 224, 64), torch.rand(2, 3, 8, 160, 160), IMAGE[0]
    crops = shortened((images, clip, features), 96)
    assert torch.equal(crops[0], images[:, :, :96])
    assert torch.equal(crops[1], clip[..., :96, :96])
    assert crops[2] is features


def test_noise_is_equal_for_all_channels_and_passes_and_leaves_the_generators() -> None:
    states = torch.get_rng_state(), random.getstate()
    with even_noise():
        first = torch.randn(2, 9), torch.empty(9).uniform_(3, 4), random.random()
        assert torch.equal(F.dropout(torch.ones(9), 0.5), torch.full((9,), 2.0))
    with even_noise():
        second = torch.randn(1, 99), torch.empty(7).uniform_(3, 4), random.random()
    assert len({*first[0].flatten().tolist(), *second[0].flatten().tolist()}) == 1
    assert len({*first[1].tolist(), *second[1].tolist()}) == 1
    assert 3 <= first[1][0] <= 4
    assert first[2] == second[2]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
