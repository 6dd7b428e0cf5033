"""How a network runs: its mode, and the arithmetic of its forward passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

DType = Literal["float32", "bfloat16"]
"""Of convolutions and products in a forward pass (autocast); weights always stay float32."""


@contextmanager
def in_mode(network: nn.Module, *, training: bool) -> Iterator[None]:
    """Training or evaluation mode for a while; every module's own mode is restored."""
    modes = {module: module.training for module in network.modules()}
    network.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def arithmetic(device: torch.device, dtype: DType) -> torch.autocast:
    """The autocast context for a dtype; float32 switches it off."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")
