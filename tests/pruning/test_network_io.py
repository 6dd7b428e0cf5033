"""Outputs of any nesting are traced, and outputs that hide tensors are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fppmo_ray.pruning import trace

IMAGE = torch.zeros(1, 3, 8, 8)


class Wrapped(nn.Module):
    """Returns its logits as it is told to."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.wrap = wrap

    def forward(self, image: Tensor) -> Any:
        return self.wrap(self.head(self.body(image).relu()))


@dataclass
class Logits:
    logits: Tensor
    name: str = "mine"


class Pair(NamedTuple):
    logits: Tensor
    other: None


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: [{"out": logits, "auxiliary": None, "temperature": 1.0}],
        lambda logits: Pair(logits, None),
        Logits,
    ],
    ids=["list of dicts", "named tuple", "dataclass"],
)
def test_outputs_are_found_however_they_are_nested(wrap: Callable[[Tensor], Any]) -> None:
    network = Wrapped(wrap)
    assert [group.name for group in trace(network, IMAGE).space.groups] == ["body"]


@pytest.mark.parametrize(
    ("wrap", "told"),
    [
        (lambda logits: "cat", "got str without any"),
        (lambda logits: logits.mean().item(), "got float without any"),
        (lambda logits: (logits, SimpleNamespace(more=logits)), "a part of class SimpleNamespace"),
    ],
    ids=["a string", "a number", "an object"],
)
def test_outputs_of_which_nothing_could_be_proven_are_refused(
    wrap: Callable[[Tensor], Any], told: str
) -> None:
    with pytest.raises(ValueError, match=rf"^the network must return tensors, .*{told}"):
        trace(Wrapped(wrap), IMAGE)


@pytest.mark.parametrize("example", [None, {"image": IMAGE}, (IMAGE, 3), torch.zeros(3)])
def test_example_inputs_other_than_tensors_are_refused_with_the_way_out(example: Any) -> None:
    with pytest.raises(ValueError, match=r"in the order in which forward takes them.*; wrap"):
        trace(Wrapped(Logits), example)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: torch.jit.trace(nn.Conv2d(3, 8, 3), IMAGE), "is TorchScript.*give the network"),
        (lambda: nn.Sequential(nn.LazyConv2d(8, 3)), "has no shape yet; run the network"),
        (lambda: nn.Conv2d(3, 8, 3, device="meta"), "on the meta device.*load its weights"),
    ],
    ids=["TorchScript", "lazy layers", "meta tensors"],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*is deprecated:DeprecationWarning")
def test_networks_whose_weights_cannot_be_selected_are_refused(
    make: Callable[[], nn.Module], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        trace(make(), IMAGE)


def test_what_is_no_network_is_refused() -> None:
    network: Any = torch.relu
    with pytest.raises(ValueError, match=r"expected a network as a torch\.nn\.Module, got"):
        trace(network, IMAGE)
