"""Devices: copies to a GPU that do not wait for it, and torch's functions for a device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def visible_gpu() -> torch.device | None:
    """Return the GPU that this process computes on, or None where torch sees none."""
    return torch.device("cuda") if torch.cuda.is_available() else None


def device_module(device: torch.device) -> Any:
    """Return the module with a device's functions: ``torch.cuda`` for a GPU, else ``torch.cpu``."""
    return torch.get_device_module(device)


def copy_to(device: torch.device, tensor: Tensor) -> Tensor:
    """Return a CPU tensor on a device; a copy to a GPU is queued behind the GPU's other work.

    A copy from memory that is not pinned would wait until all of that work is done.

    Args:
        device: The CPU or a GPU. On the CPU the tensor itself is returned.
        tensor: A tensor on the CPU. It may be freed at once.
    """
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
