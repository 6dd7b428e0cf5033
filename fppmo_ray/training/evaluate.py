"""Loss and accuracy of a network on a set of images."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fppmo_ray.training.compute import DType, autocast, in_mode, lowered_weights
from fppmo_ray.training.distill import answer_distance

_TOP = 5
_FEW_CLASSES = 10  # among so few classes, five guesses are hardly ever wrong


@dataclass(frozen=True)
class Metrics:
    """Loss and accuracy of a network on a set of images."""

    loss: float
    """Mean cross-entropy in nats, or mean divergence from given answers; finite."""
    accuracy: float
    """Share of images classified correctly, in [0, 1]."""
    top5_accuracy: float | None = None
    """Share of images whose class is among the five likeliest; None with ten classes or fewer."""
    right: Tensor | None = field(default=None, repr=False, compare=False)
    """Whether each image is classified correctly, bool (N,), on the images' device."""

    def figures(self) -> dict[str, float]:
        """Return loss and accuracies that are not None, by name, as results store them."""
        names = ("loss", "accuracy", "top5_accuracy")
        return {name: found for name in names if (found := getattr(self, name)) is not None}


@torch.no_grad()
def evaluate(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    dtype: DType = "float32",
    targets: Tensor | None = None,
    temperature: float = 1.0,
) -> Metrics:
    """Return mean loss and accuracy in evaluation mode; the network's own mode is restored.

    Args:
        network: A network on the batches' device.
        batches: Normalised images (n, C, H, W) and labels (n,).
        dtype: Number format of the forward passes; the loss is always computed in float32.
        targets: Logits of another network for the images of all batches, (N, classes). The loss is
            then the Kullback-Leibler divergence from its answers instead of the cross-entropy with
            the labels; see ``answer_distance``.
        temperature: Softens both networks' probabilities in that divergence, > 0.

    Raises:
        ValueError: there are no batches.
        RuntimeError: the loss is not finite.
    """
    totals: Tensor | float = 0.0
    num_images, each_right = 0, list[Tensor]()
    with in_mode(network, training=False), lowered_weights(network, dtype):
        for images, labels in batches:
            with autocast(images.device, dtype):
                logits = network(images)
            logits = logits.float()
            if targets is None:
                loss = F.cross_entropy(logits, labels, reduction="sum")
            else:
                wished = targets[num_images : num_images + len(labels)]
                loss = len(labels) * answer_distance(logits, wished, temperature)
            each_right.append(logits.argmax(1) == labels)
            num_right = [each_right[-1].sum(), *_num_in_top5(logits, labels)]
            totals = totals + torch.stack([loss, *num_right]).double()
            num_images += len(labels)
    if not isinstance(totals, Tensor):
        raise ValueError("an evaluation needs images, got no batches")
    total_loss, *rights = totals.tolist()
    if not math.isfinite(total_loss):
        raise RuntimeError(
            f"the loss on {num_images} images is {total_loss}: the network's weights or "
            "batch-norm statistics are broken; recalibrate, or train with a lower learning rate"
        )
    accuracy, *top5 = (right / num_images for right in rights)
    return Metrics(
        loss=total_loss / num_images,
        accuracy=accuracy,
        top5_accuracy=top5[0] if top5 else None,
        right=torch.cat(each_right),
    )


def _num_in_top5(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """Return how many images have their class among five guesses; nothing with few classes."""
    if logits.shape[1] <= _FEW_CLASSES:
        return []
    guesses = logits.topk(_TOP, dim=1).indices
    return [(guesses == labels[:, None]).sum()]
