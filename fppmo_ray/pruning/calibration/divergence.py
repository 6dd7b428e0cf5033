"""How far a pruned network's answers are from the dense network's: a score without labels."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fppmo_ray.distribution.space import IntArray
from fppmo_ray.training.compute import in_mode
from fppmo_ray.training.distill import answer_distance
from fppmo_ray.training.images import Images
from fppmo_ray.training.inputs import Inputs, inputs_of
from fppmo_ray.training.outputs import flat_tensors

TEMPERATURE = 4.0
"""Softens both networks' probabilities. Among 16 masks near the optimum of ResNet-20, the
divergence on 500 images orders the masks as the cross-entropy on all other images does with a
Spearman correlation of 0.68; the cross-entropy itself on these images reaches 0.65."""


Answers = list[list[Tensor]]
"""The output tensors of a network, batch by batch."""


@torch.no_grad()
def answers(network: nn.Module, batches: Iterable[Any], num_inputs: int = 1) -> Answers:
    """Outputs of a network in eval mode; those of the dense one are what others are compared with.

    Args:
        network: Any network.
        batches: Inputs (n, C, H, W), or tuples that begin with them, such as images and labels.
        num_inputs: How many tensors the network's forward takes.
    """
    with in_mode(network, training=False):
        return [flat_tensors(network(*inputs_of(batch, num_inputs))) for batch in batches]


ANSWER_BATCH = 250
"""Images per pass of the dense network."""
_MOST_SETS = 4  # two generations are scored at a time, and finalists on one set or a few


class DenseAnswers:
    """The dense network's answers to sets of images, computed once for each of the last few sets.

    Every set is computed by itself, in float32 and in batches of a fixed size, so that its answers
    are the same whatever sets came before. All proposals of a generation are scored on one set.

    Args:
        dense: The dense network; its weights must not change meanwhile.
        images: The images that sets are drawn from, on the network's device.
        num_inputs: How many tensors the network's forward takes.
    """

    def __init__(self, dense: nn.Module, images: Images | Inputs, num_inputs: int = 1) -> None:
        self.dense = dense
        self.images = images
        self._num_inputs = num_inputs
        self._known: OrderedDict[bytes, Answers] = OrderedDict()

    def logits(self, positions: IntArray) -> Tensor:
        """Return the logits of a classifier for images, (n, classes).

        Args:
            positions: ``(n,)``, positions of the images.
        """
        return torch.cat([logits for [logits] in self.of(positions)])

    def of(self, positions: IntArray) -> Answers:
        """Return the answers to images, in batches of ``ANSWER_BATCH``.

        Args:
            positions: ``(n,)``, positions of the images.
        """
        key = positions.tobytes()
        if key not in self._known:
            batches = self.images.batches(ANSWER_BATCH, positions)
            self._known[key] = answers(self.dense, batches, self._num_inputs)
            if len(self._known) > _MOST_SETS:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]


@torch.no_grad()
def divergence(
    network: nn.Module, batches: Iterable[Any], targets: Answers, num_inputs: int = 1
) -> float:
    """Mean divergence of a network's outputs from the dense network's, in eval mode.

    Outputs of shape (N, classes) are taken for logits: the Kullback-Leibler divergence of the
    softmax at ``TEMPERATURE``, times its square, in nats. Other outputs: the squared error over
    the variance of the dense output, summed over the output tensors.

    Args:
        network: The pruned network.
        batches: As for ``answers``.
        targets: ``answers`` of the dense network to the same batches.
        num_inputs: How many tensors the network's forward takes.

    Raises:
        ValueError: there is no batch.
        RuntimeError: the divergence is not finite.
    """
    total, num_images = 0.0, 0
    with in_mode(network, training=False):
        for batch, wished in zip(batches, targets, strict=True):
            inputs = inputs_of(batch, num_inputs)
            pairs = zip(flat_tensors(network(*inputs)), wished, strict=True)
            distances = [answer_distance(own, target, TEMPERATURE) for own, target in pairs]
            total += len(inputs[0]) * sum(map(float, distances))
            num_images += len(inputs[0])
    if not num_images:
        raise ValueError("a divergence needs images, got no batches")
    if not math.isfinite(total):
        raise RuntimeError(
            f"the divergence from the dense network on {num_images} images is {total}: weights or "
            "batch-norm statistics are broken; recalibrate, or cut less"
        )
    return total / num_images
