"""Weights in their own precision that are cast to float64 only while their layer computes.

A copy of all weights in float64 would take more time than the passes of a large network: a new page
of memory costs as much as 3,000 multiplications.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as module_hooks
from torch.utils._python_dispatch import _disable_current_modes

_KINDS = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)

READ_BY = ("aten.convolution.default", "aten.t.default", "prim.device.default")
"""Operations by which such a layer reads its weight."""
Zeroed = Mapping[int, list[tuple[int, Tensor]]]
"""Axis and indices where a weight is zero, by the weight's ``id``."""


def castable_weights(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return, by name, the weights that a single layer of torch's own kind holds.

    Others may read them all the same. Such a weight is read by other operations than ``READ_BY``,
    or a pass with weights that are cast on use raises, or does not compute in float64 throughout.

    Args:
        network: A network in any floating-point precision.
    """
    owners = Counter(
        id(parameter)
        for module in network.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    held = {id(layer._parameters["weight"]) for layer in _layers(network)}
    return {
        name: weight
        for name, weight in network.named_parameters()
        if id(weight) in held
        and owners[id(weight)] == 1
        and weight.is_floating_point()
        and weight.numel() > max(weight.shape)  # the scales of a vector may be drawn
    }


def _layers(network: nn.Module) -> Iterator[nn.Module]:
    """The modules of a network that compute by torch's own code for their kind alone."""
    for module in network.modules():
        is_plain = "forward" not in vars(module) and not module._forward_pre_hooks
        if type(module) in _KINDS and is_plain and "weight" in module._parameters:
            yield module


class CastOnUse:
    """Casts weights to float64 in memory that is used again for the next layer."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.float64)

    @contextmanager
    def within(self, network: nn.Module, zeroed: Zeroed | None = None) -> Iterator[None]:
        """Let layers compute with float64 weights within a block.

        Args:
            network: Its weights have float64 already, or are among ``castable_weights``.
            zeroed: Where these are zero.
        """
        layers = set(_layers(network))
        own: dict[nn.Module, nn.Parameter] = {}

        def enter(module: nn.Module, _: Any) -> None:
            weight = module._parameters.get("weight") if module in layers else None
            if weight is None or weight.dtype == torch.float64:
                return
            own[module] = weight
            with torch.no_grad(), _disable_current_modes():
                wide = self._cast(weight, (zeroed or {}).get(id(weight), []))
                module._parameters["weight"] = nn.Parameter(wide, requires_grad=False)

        def leave(module: nn.Module, *_: Any) -> None:
            if module in own:
                module._parameters["weight"] = own.pop(module)

        entering = module_hooks.register_module_forward_pre_hook(enter)
        leaving = module_hooks.register_module_forward_hook(leave, always_call=True)
        try:
            yield
        finally:
            entering.remove()
            leaving.remove()
            for module, weight in own.items():
                module._parameters["weight"] = weight

    def _cast(self, weight: Tensor, zeroed: list[tuple[int, Tensor]]) -> Tensor:
        """The weight in float64, valid until the next call."""
        if isinstance(weight, FakeTensor):  # it has no numbers
            return weight.new_empty(weight.shape, dtype=torch.float64)
        if weight.numel() > self._memory.numel():
            self._memory = torch.empty(weight.numel(), dtype=torch.float64)
        wide = self._memory[: weight.numel()].view(weight.shape).copy_(weight)
        for axis, indices in zeroed:
            wide.index_fill_(axis, indices, 0)
        return wide
