"""Passes over shapes and types alone: what a network does with images, without their numbers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fppmo_ray.pruning.extract import named_tensors, replaced
from fppmo_ray.pruning.network_io import FORWARD_ERRORS

_Result = TypeVar("_Result")
_LARGE = 1e12  # parameters times pixels; ResNet-50 at 224 pixels has a little more
_PER_LAYER = 1.5e10  # what a CPU computes in the time of a layer without numbers


class ShapeOnly:
    """A network whose tensors have no numbers, so that a pass costs some milliseconds.

    Args:
        network: The network on the CPU; not changed.
    """

    def __init__(self, network: nn.Module) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        tensors = named_tensors(network).values()
        self.network = replaced(network, {id(tensor): self._like(tensor) for tensor in tensors})
        """The network without numbers; modules keep their other attributes."""

    def _like(self, tensor: Tensor) -> Tensor:
        fake: Tensor = self._mode.from_tensor(tensor.detach())
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, requires_grad=tensor.requires_grad)
        return fake

    def attempt(
        self, function: Callable[..., _Result], inputs: tuple[Tensor, ...]
    ) -> _Result | None:
        """Return what a function of inputs without numbers returns; None if it needs the numbers.

        Args:
            function: Runs the network or one that was extracted from it.
            inputs: Tensors of which shapes and types are used.
        """
        with suppress(*FORWARD_ERRORS), self._mode:
            return function(*map(self._mode.from_tensor, inputs))
        return None


def is_large(network: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    """Return whether a pass of a network takes so long that passes should be spared.

    Args:
        network: The network.
        inputs: Arguments of its forward.
    """
    return _work(network, inputs) >= _LARGE


def worthwhile(network: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    """Return whether a pass of a network without numbers is faster than one with them.

    Without numbers, operations take the same time however large they are.

    Args:
        network: The network.
        inputs: Arguments of its forward.
    """
    layers = sum(not module._modules for module in network.modules())
    return _work(network, inputs) >= max(_LARGE, layers * _PER_LAYER)


def _work(network: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Parameters times pixels; multiply-accumulates are about 1/256 of it."""
    pixels = sum(tensor[:1, :1].numel() for tensor in inputs if tensor.dim() > 1)
    return pixels * sum(parameter.numel() for parameter in network.parameters())
