"""Batch-norm statistics measured anew."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fppmo_ray.training.compute import DType, arithmetic
from fppmo_ray.training.modes import in_mode


@torch.no_grad()
def recalibrate_batchnorm(
    network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, dtype: DType = "float32"
) -> None:
    """Re-estimate, in place, every BatchNorm's running statistics (EagleEye, 2007.02491).

    The new statistics are the plain mean over all batches, so batches should be of equal size.
    Dropout and the like stay in evaluation mode. A network without BatchNorm is left alone. If a
    forward pass raises, the statistics are as before; modes and momenta are restored in any case.

    Args:
        network: On the batches' device.
        batches: Normalised images (n, C, H, W) and labels, which are not looked at. Use
            search-train images, never the ones that score the network.
        dtype: Of the forward passes; statistics are float32.

    Raises:
        ValueError: there are no batches.
    """
    norms = [
        module
        for module in network.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    ]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    before = [[buffer.clone() for buffer in norm.buffers()] for norm in norms]
    try:
        with in_mode(network, training=False):
            for norm in norms:
                norm.train()
                norm.reset_running_stats()
            _run(network, norms, batches, dtype)
    except BaseException:
        for norm, buffers in zip(norms, before, strict=True):
            for buffer, old in zip(norm.buffers(), buffers, strict=True):
                buffer.copy_(old)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _run(
    network: nn.Module,
    norms: Sequence[_BatchNorm],
    batches: Iterable[tuple[Tensor, Tensor]],
    dtype: DType,
) -> None:
    num_batches = 0
    for images, _ in batches:
        num_batches += 1
        for norm in norms:
            # The cumulative average. Torch's own, None, waits for a GPU at every layer to learn
            # how many batches there were.
            norm.momentum = 1 / num_batches
        with arithmetic(images.device, dtype):
            network(images)
    if not num_batches:
        raise ValueError("a recalibration needs images, got no batches")
