"""How forward and backward passes are computed: number format, layout, mode, CUDA graphs."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

_FIRST_BFLOAT16_CAPABILITY = (8, 0)  # NVIDIA Ampere

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


def autocast(device: torch.device, dtype: DType) -> torch.autocast:
    """The autocast context for a dtype; float32 switches it off."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def native_dtype(device: torch.device) -> DType:
    """Return bfloat16 where this machine's processor has units for it, else float32.

    A processor without such units computes bfloat16 several times slower than float32.

    Args:
        device: The device that computes the passes, in this process.
    """
    if device.type == "cuda":
        has_units = torch.cuda.get_device_capability(device) >= _FIRST_BFLOAT16_CAPABILITY
    else:
        # Every processor with AMX tiles has AMX-BF16 too.
        has_units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if has_units else "float32"


def lay_out(network: nn.Module, compute: ComputeConfig) -> None:
    """Lay the network's weights out as the compute configuration wants them, in place."""
    layout = torch.channels_last if compute.channels_last else torch.contiguous_format
    network.to(memory_format=layout)  # type: ignore[call-overload]  # missing in torch's stubs


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


@contextmanager
def replayed_cuda_graphs(network: nn.Module, images: Tensor, dtype: DType) -> Iterator[None]:
    """For a while, calls in training mode replay a captured forward and backward pass.

    A small network's kernels are over before the next one is launched, so launching is what takes
    the time. Evaluation is not affected. Batch-norm statistics move as in three training passes;
    torch's generators are left alone.

    Args:
        network: On a GPU, without hooks.
        images: A batch of the size of all that follow, on the same GPU; its numbers do not matter.
        dtype: Of the passes.

    Raises:
        ValueError: the images are not on a GPU, or the network has hooks.
        RuntimeError: something in the network cannot be captured, such as a look at a number.
    """
    if images.device.type != "cuda":
        raise ValueError(
            f"CUDA graphs need a CUDA device, the images are on {images.device}; "
            "use a compute configuration without cuda_graphs"
        )
    try:
        with torch.random.fork_rng([images.device]), in_mode(network, training=True):
            _capture(network, images, dtype)
        yield
    finally:
        # It stands in front of the class's own, holds the graphs' memory, and refers to the network
        # in a circle.
        network.__dict__.pop("forward", None)


def _capture(network: nn.Module, images: Tensor, dtype: DType) -> None:
    is_bfloat16 = dtype == "bfloat16"
    # What autocast would cache here could not be computed anew when it is replayed.
    with torch.autocast("cuda", torch.bfloat16, enabled=is_bfloat16, cache_enabled=False):
        try:
            torch.cuda.make_graphed_callables(network, (images,))
        except AssertionError as error:  # torch's word for a network with hooks
            raise ValueError(f"the network's passes cannot be captured: {error}") from error


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_NEVER = 2**31 - 1  # bytes, the largest int


def keep_freed_memory() -> bool:
    """Let this process keep the memory it frees, for its own next allocations.

    Activations are freed and allocated again all the time. glibc hands blocks of their size back
    to the kernel, which clears every page once more: 130,000 page faults for 1,000 images of a
    ResNet-20, 20 to 30 % of the time of a pass. The process stays as large as it ever was.

    Returns:
        Whether the C library took it; others than glibc are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _NEVER)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))
