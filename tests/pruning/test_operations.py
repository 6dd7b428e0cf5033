"""When two networks perform the same operations, so that one proof by numbers holds for both."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fppmo_ray.pruning import equivalence, trace
from fppmo_ray.pruning.extract import select
from fppmo_ray.pruning.operations import are_alike, perform

IMAGE = torch.zeros(1, 3, 8, 8)


class Net(nn.Module):
    """A convolution, a depthwise one, batch norms and a head on flattened features."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.first, self.bn = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.head, self.other = nn.Linear(16 * width, 4), nn.Linear(16 * width, 4)

    def forward(self, images: Tensor) -> Tensor:
        features = F.max_pool2d(self.depthwise(F.relu(self.bn(self.first(images)))), 2)
        return self.head(self.changed(features).flatten(1))

    def changed(self, features: Tensor) -> Tensor:
        """Return the features, changed in a way that depends on the network."""
        return features


class Scaled(Net):
    def changed(self, features: Tensor) -> Tensor:
        return features * len(features[0])


class Conditional(Net):
    def changed(self, features: Tensor) -> Tensor:
        return features if features.shape[1] == 12 else features.tanh()


class Literal(Net):
    def changed(self, features: Tensor) -> Tensor:
        return features * torch.tensor(2.0 if features.shape[1] == 12 else 3.0)


class Squeezed(Net):
    def changed(self, features: Tensor) -> Tensor:
        return features.squeeze(1)[None].flatten(1)


class OtherWeight(Net):
    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.depthwise(self.first(images)))
        head = self.head if features.shape[1] == 12 else self.other
        return head(F.max_pool2d(features, 2).flatten(1))


class OtherView(Net):
    def changed(self, features: Tensor) -> Tensor:
        rows = 2 if features.shape[1] == 12 else 1
        return features.view(rows, -1).view(1, -1)


class OtherResult(Net):
    def changed(self, features: Tensor) -> Tensor:
        parts = features.relu(), features.tanh()
        return parts[0 if features.shape[1] == 12 else 1] * 2


@torch.library.custom_op("fppmo_ray_tests::narrow", mutates_args=())
def narrow(features: Tensor) -> Tensor:
    return features * 2 if features.shape[1] < 12 else features.clone()


class Opaque(Net):
    def changed(self, features: Tensor) -> Tensor:
        return torch.ops.fppmo_ray_tests.narrow(features)


def alike(make: type[Net], width: int) -> bool:
    dense, narrower = (perform(make(n).eval(), (IMAGE,))[0] for n in (12, width))
    return are_alike(dense, narrower)


@pytest.mark.parametrize("width", [11, 8, 2, 1])
def test_narrower_networks_perform_the_same_operations(width: int) -> None:
    assert alike(Net, width)


@pytest.mark.parametrize(
    "make", [Scaled, Conditional, Literal, OtherWeight, OtherView, OtherResult, Opaque]
)
def test_what_widths_decide_makes_other_operations(make: type[Net]) -> None:
    assert not alike(make, 8)


def test_a_result_of_other_rank_makes_other_operations() -> None:
    assert alike(Squeezed, 8)
    assert not alike(Squeezed, 1)


def test_a_network_that_raises_or_ends_early_performs_other_operations() -> None:
    dense = perform(Net().eval(), (IMAGE,))[0]
    assert not are_alike(dense, None)
    assert not are_alike(dense, perform(Net(8).bn.eval(), (torch.zeros(1, 8, 2, 2),))[0])


def test_smallest_widths_are_proven_by_numbers_only_where_operations_differ(monkeypatch) -> None:
    proofs: list[int] = []
    numbers = equivalence.Proof._no_proof

    def counted(self, tracing, masks):
        proofs.append(len(masks))
        return numbers(self, tracing, masks)

    monkeypatch.setattr(equivalence.Proof, "_no_proof", counted)
    trace(Net(), IMAGE)
    assert proofs == [2]
    with pytest.warns(UserWarning, match=r"keep at least so many: first \(2\)"):
        trace(Hidden(), IMAGE)
    assert len(proofs) > 2


class Hidden(Net):
    """Doubles what is one channel wide, without asking for the width."""

    def changed(self, features: Tensor) -> Tensor:
        return features * (2.0 if features.squeeze(1).dim() < 4 else 1.0)


def test_shared_parameters_are_the_dense_networks_own_and_statistics_are_not() -> None:
    dense = Net()
    smaller = select(dense, {}, shares=True)
    assert smaller.first.weight is dense.first.weight
    assert smaller.bn.running_mean is not dense.bn.running_mean


class Experts(nn.Module):
    """Its code chooses by a value which of two layers runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 6, 3)
        self.experts = nn.ModuleList([nn.Conv2d(12, 12, 1) for _ in range(2)])
        self.head, self.limit = nn.Linear(6, 4), 0.0
        self.gate = nn.Linear(12, 1, bias=False)
        nn.init.ones_(self.gate.weight)

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.first(images))
        chosen = self.experts[self.choice(features)]
        return self.head(F.relu(self.last(F.relu(chosen(features)))).mean((2, 3)))

    def choice(self, features: Tensor) -> int:
        """Return which expert runs."""
        strength = float(self.gate(features.mean((2, 3))).mean())
        self.limit = self.limit or 0.95 * strength
        return int(strength < self.limit)


class Constant(Experts):
    def choice(self, features: Tensor) -> int:
        return int(self.gate(features.mean((2, 3))).isnan().any())


def test_a_choice_by_values_is_named_with_the_way_out() -> None:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="asks for values") as told:
        tracing = trace(Experts(), IMAGE)
    assert [group.name for group in tracing.space.groups] == ["last", "experts.0"]
    left_whole, idle = (str(warning.message) for warning in told)
    assert "first (the smaller network raises RuntimeError: Given groups=1" in left_whole
    assert "(Experts, test_operations.py:" in left_whole
    assert "name them and the layers before in `ignore`" in left_whole
    assert "experts.1 did not run" in idle


def test_layers_that_may_run_for_other_images_are_named() -> None:
    with pytest.warns(UserWarning, match=r"\(Constant, test_.*experts.1 did not run"):
        trace(Constant(), IMAGE)


def test_layers_that_never_run_are_not_spoken_of_where_no_value_is_asked_for() -> None:
    trace(Net(), IMAGE)  # warnings are errors, and `other` does not run
