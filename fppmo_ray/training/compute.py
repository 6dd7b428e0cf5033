"""How passes are computed: what changes their speed, and their numbers only by rounding."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn
from torch.nn import functional as F

_SLOW = 1.5  # bfloat16 over float32, above which nobody can have wanted it

DType = Literal["float32", "bfloat16"]
"""Of convolutions and products in a forward pass (autocast); weights always stay float32."""


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Chosen once for a search, since even rounding changes which mask wins a close race."""

    dtype: DType = "float32"
    """``bfloat16`` is about twice as fast, on CPUs with AVX-512 BF16 too; on CPUs without units for
    it, it is several times slower."""
    channels_last: bool = True
    """Memory layout; 1.4 times as fast as the other for ResNet-20 in float32 on a CPU, and about
    three times for ResNet-56."""
    fold_batchnorm: bool = False
    """Whether a score is read on a network whose batch norms are folded into its convolutions."""
    cuda_graphs: bool = False
    """Whether training passes are replayed instead of launched kernel by kernel."""
    scoring_batch: int = 250
    """Images per pass while a score is read; at least 1."""
    threads: int = 1
    """Of torch on a CPU, at least 1. Set by whoever owns the process: scoring workers do."""

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
"""The network as it is written, in float32."""


def arithmetic(device: torch.device, dtype: DType) -> torch.autocast:
    """The autocast context for a dtype; float32 switches it off."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def slow_bfloat16(compute: ComputeConfig, device: torch.device) -> str | None:
    """Why bfloat16 is slow on this CPU, or None where it is not used or not slow."""
    if compute.dtype != "bfloat16" or device.type != "cpu":
        return None
    slowdown = bfloat16_slowdown()
    if slowdown <= _SLOW:
        return None
    return (
        f"bfloat16 takes {slowdown:.1f} times as long as float32 on this CPU, "
        "which has no units for it"
    )


def bfloat16_slowdown() -> float:
    """How much longer a convolution takes on this CPU in bfloat16 than in float32.

    The least time of three, of a layer like those of a ResNet-20.
    """
    images = torch.zeros(64, 16, 32, 32).to(memory_format=torch.channels_last)
    weight = torch.zeros(16, 16, 3, 3)  # a layer of its own would draw random numbers

    def seconds(dtype: DType) -> float:
        begin = time.perf_counter()
        with torch.inference_mode(), arithmetic(images.device, dtype):
            F.conv2d(images, weight, padding=1)
        return time.perf_counter() - begin

    fast, slow = (min(seconds(dtype) for _ in range(3)) for dtype in get_args(DType))
    return slow / fast


def lay_out(network: nn.Module, compute: ComputeConfig) -> None:
    """Lay the network's weights out as the compute configuration wants them, in place."""
    layout = torch.channels_last if compute.channels_last else torch.contiguous_format
    network.to(memory_format=layout)  # type: ignore[call-overload]  # missing in torch's stubs
