"""How forward and backward passes are computed: number format, layout, mode, CUDA graphs.

A compute configuration changes the speed of passes, and their results by rounding only.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from fppmo_ray.training.device import device_module

_FIRST_BFLOAT16_CAPABILITY = (8, 0)  # NVIDIA Ampere
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # parameters of mallopt in glibc's malloc.h
_NEVER = 2**31 - 1  # threshold in bytes: the largest int
# Only these exact types: a subclass may use its weight differently.
_LOWERED = nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear

DType = Literal["float32", "bfloat16"]
"""Number format of convolutions and matrix products in a pass. Weights always stay float32."""


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How the passes of a search are computed.

    It is chosen once per search, because even rounding decides which of two close masks wins.
    """

    dtype: DType = "float32"
    """``bfloat16`` is about twice as fast as float32 on processors with units for it (see
    ``native_dtype``), and several times slower on others."""
    channels_last: bool = True
    """Whether weights and images are stored with channels last. In float32 on a CPU this is 1.4
    times as fast for ResNet-20 and about three times as fast for ResNet-56."""
    fold_batchnorm: bool = False
    """Whether batch norms are folded into convolutions before a score is read."""
    cuda_graphs: bool = False
    """Whether training steps replay CUDA graphs instead of launching kernels one by one. Trainings
    that several processes share launch them all the same."""
    scoring_batch: int = 250
    """Images per pass while a score is read, >= 1."""
    threads: int = 1
    """Torch's threads on a CPU, >= 1. The owner of the process sets them: scoring workers do."""

    def __post_init__(self) -> None:
        if self.dtype not in get_args(DType):
            raise ValueError(f"dtype must be one of {get_args(DType)}, got {self.dtype!r}")
        for name in ("scoring_batch", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def __str__(self) -> str:
        ways = {
            self.dtype: True,
            "channels last": self.channels_last,
            "folded batch norm": self.fold_batchnorm,
            "CUDA graphs": self.cuda_graphs,
            f"scored by {self.scoring_batch}": True,
            f"{self.threads} thread{'s' * (self.threads > 1)}": True,
        }
        return ", ".join(way for way, is_used in ways.items() if is_used)


PLAIN_COMPUTE = ComputeConfig()
"""The network as written, in float32, on one thread."""


def autocast(device: torch.device, dtype: DType) -> torch.autocast:
    """Return the context in which convolutions and products are computed in a number format.

    Weights that it converts are not kept: a CUDA graph must convert them at every replay.

    Args:
        device: The device of the passes.
        dtype: The number format; float32 switches autocast off.
    """
    return torch.autocast(
        device.type, torch.bfloat16, enabled=dtype == "bfloat16", cache_enabled=False
    )


def native_dtype(device: torch.device) -> DType:
    """Return bfloat16 where this machine's processor has units for it, else float32.

    A processor without such units computes bfloat16 several times slower than float32.

    Args:
        device: The device that computes the passes, in this process.
    """
    if device.type != "cpu":
        capability = device_module(device).get_device_capability(device)
        has_units = capability >= _FIRST_BFLOAT16_CAPABILITY
    else:
        # Every processor with AMX tiles has AMX-BF16 too.
        has_units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if has_units else "float32"


def lay_out(network: nn.Module, compute: ComputeConfig) -> None:
    """Store the network's weights in the configured memory layout, in place.

    Args:
        network: The network whose weights are moved.
        compute: Its ``channels_last`` decides on the layout.
    """
    layout = torch.channels_last if compute.channels_last else torch.contiguous_format
    network.to(memory_format=layout)  # type: ignore[call-overload]  # missing in torch's stubs


@contextmanager
def in_mode(network: nn.Module, *, training: bool) -> Iterator[None]:
    """Switch a network to training or evaluation mode; restore every module's mode at the end.

    Args:
        network: The network to switch, in place.
        training: True for training mode, False for evaluation mode.
    """
    modes = {module: module.training for module in network.modules()}
    network.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def lowered_weights(network: nn.Module, dtype: DType) -> Iterator[None]:
    """Keep the weights of convolutions and linear layers in a number format for several passes.

    Autocast would convert them again in every pass, which is a fifth of all kernels that a ResNet
    launches. The passes' results stay the same. Weights must not change meanwhile.

    Args:
        network: The network, which computes without gradients.
        dtype: The number format of the passes; float32 changes nothing.
    """
    layers: list[nn.Module] = [
        module for module in network.modules() if dtype == "bfloat16" and type(module) in _LOWERED
    ]
    before = [layer._parameters for layer in layers]
    try:
        for layer in layers:
            layer._parameters = {
                name: None if weights is None else _lowered(weights)
                for name, weights in layer._parameters.items()
            }
        yield
    finally:
        for layer, parameters in zip(layers, before, strict=True):
            layer._parameters = parameters


def _lowered(weights: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(weights.detach().bfloat16(), requires_grad=False)


def keep_freed_memory() -> bool:
    """Let this process keep freed memory for its own next allocations.

    Activations are freed and allocated in every pass. By default glibc returns blocks of their size
    to the kernel, which clears every page again: 130,000 page faults for 1,000 images of a
    ResNet-20, 20 to 30 % of the time of a pass. With this setting the process never shrinks.

    Returns:
        Whether the C library accepted the setting; only glibc has it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _NEVER)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))
