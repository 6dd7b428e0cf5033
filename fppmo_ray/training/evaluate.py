"""Loss and accuracy of a network."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fppmo_ray.training.engine import DType, arithmetic
from fppmo_ray.training.modes import in_mode


@dataclass(frozen=True)
class Metrics:
    """How a network does on a set of images."""

    loss: float
    """Mean cross-entropy in nats, finite."""
    accuracy: float
    """Share of images classified rightly, in [0, 1]."""


@torch.no_grad()
def evaluate(
    network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, dtype: DType = "float32"
) -> Metrics:
    """Mean loss and accuracy in evaluation mode; the network's own mode is restored.

    Args:
        network: On the batches' device.
        batches: Normalised images (n, C, H, W) and labels (n,).
        dtype: Of the forward passes; the loss is always taken in float32.

    Raises:
        ValueError: there are no batches.
        RuntimeError: the loss is not finite.
    """
    totals: Tensor | float = 0.0
    num_images = 0
    with in_mode(network, training=False):
        for images, labels in batches:
            with arithmetic(images.device, dtype):
                logits = network(images)
            logits = logits.float()
            loss = F.cross_entropy(logits, labels, reduction="sum")
            num_right = (logits.argmax(1) == labels).sum()
            totals = totals + torch.stack([loss, num_right]).double()
            num_images += len(labels)
    if not isinstance(totals, Tensor):
        raise ValueError("an evaluation needs images, got no batches")
    total_loss, total_right = totals.tolist()
    if not math.isfinite(total_loss):
        raise RuntimeError(
            f"the loss on {num_images} images is {total_loss}: the network's weights or "
            "batch-norm statistics are broken; recalibrate, or train with a lower learning rate"
        )
    return Metrics(loss=total_loss / num_images, accuracy=total_right / num_images)
