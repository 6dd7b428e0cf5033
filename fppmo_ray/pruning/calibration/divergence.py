"""How far a pruned network's answers are from the dense network's: a score without labels."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fppmo_ray.distribution.space import IntArray
from fppmo_ray.pruning.network_io import flat_tensors
from fppmo_ray.training.compute import in_mode
from fppmo_ray.training.distill import answer_distance
from fppmo_ray.training.images import Images

TEMPERATURE = 4.0
"""Softens both networks' probabilities. Among 16 masks near the optimum of ResNet-20, the
divergence on 500 images orders the masks as the cross-entropy on all other images does with a
Spearman correlation of 0.68; the cross-entropy itself on these images reaches 0.65."""


Answers = list[list[Tensor]]
"""The output tensors of a network, batch by batch."""


@torch.no_grad()
def answers(network: nn.Module, batches: Iterable[Any]) -> Answers:
    """Outputs of a network in eval mode; those of the dense one are what others are compared with.

    Args:
        network: Any network.
        batches: Inputs (n, C, H, W), or tuples that begin with them, such as images and labels.
    """
    with in_mode(network, training=False):
        return [flat_tensors(network(_inputs(batch))) for batch in batches]


_ANSWER_BATCH = 250
_MOST_SETS = 4  # two generations are scored at a time, and finalists on one set or a few


class DenseAnswers:
    """The dense network's logits for sets of images, computed once for each of the last few sets.

    Every set is computed by itself, in float32 and in batches of a fixed size, so that its answers
    are the same whatever sets came before. All proposals of a generation are scored on one set.

    Args:
        dense: The dense network; its weights must not change meanwhile.
        images: The images that sets are drawn from, on the network's device.
    """

    def __init__(self, dense: nn.Module, images: Images) -> None:
        self.dense = dense
        self._images = images
        self._known: OrderedDict[bytes, Tensor] = OrderedDict()

    @torch.no_grad()
    def of(self, positions: IntArray) -> Tensor:
        """Return the logits of images, (n, classes).

        Args:
            positions: ``(n,)``, positions of the images.
        """
        key = positions.tobytes()
        if key not in self._known:
            batches = self._images.batches(_ANSWER_BATCH, positions)
            with in_mode(self.dense, training=False):
                self._known[key] = torch.cat([self.dense(images) for images, _ in batches])
            if len(self._known) > _MOST_SETS:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]


@torch.no_grad()
def divergence(network: nn.Module, batches: Iterable[Any], targets: Answers) -> float:
    """Mean divergence of a network's outputs from the dense network's, in eval mode.

    Outputs of shape (N, classes) are taken for logits: the Kullback-Leibler divergence of the
    softmax at ``TEMPERATURE``, times its square, in nats. Other outputs: the squared error over
    the variance of the dense output, summed over the output tensors.

    Args:
        network: The pruned network.
        batches: As for ``answers``.
        targets: ``answers`` of the dense network to the same batches.

    Raises:
        ValueError: there is no batch.
        RuntimeError: the divergence is not finite.
    """
    total, num_images = 0.0, 0
    with in_mode(network, training=False):
        for batch, wished in zip(batches, targets, strict=True):
            images = _inputs(batch)
            pairs = zip(flat_tensors(network(images)), wished, strict=True)
            distances = [answer_distance(own, target, TEMPERATURE) for own, target in pairs]
            total += len(images) * sum(map(float, distances))
            num_images += len(images)
    if not num_images:
        raise ValueError("a divergence needs images, got no batches")
    if not math.isfinite(total):
        raise RuntimeError(
            f"the divergence from the dense network on {num_images} images is {total}: weights or "
            "batch-norm statistics are broken; recalibrate, or cut less"
        )
    return total / num_images


def _inputs(batch: Any) -> Tensor:
    images: Tensor = batch if isinstance(batch, Tensor) else batch[0]
    return images
