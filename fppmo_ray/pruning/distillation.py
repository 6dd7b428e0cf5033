"""Distillation of a pruned network on the few images that it was pruned with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from fppmo_ray.distribution.space import BoolArray
from fppmo_ray.pruning.calibration.divergence import answers
from fppmo_ray.pruning.calibration.features import last_feature_match
from fppmo_ray.pruning.extract import Tracing
from fppmo_ray.training.distill import FEW_IMAGES, are_logits, distill, endless_batches
from fppmo_ray.training.images import Images, Seed, derive_seed
from fppmo_ray.training.inputs import Inputs

_NO_LOGITS_CLIP_NORM = 1.0
_DROPOUT_STREAM = 1  # separates the seed of dropout from the seed of the images


def distill_pruned(
    network: nn.Module,
    dense: nn.Module,
    tracing: Tracing,
    keep: BoolArray,
    images: Images | Inputs,
    *,
    steps: int,
    seed: Seed,
    num_inputs: int = 1,
    augment: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Train a pruned network, in place, to answer and to make features as the dense one does.

    The steps follow ``FEW_IMAGES``, and the features are those of the last map; see ``distill``.
    The gradients of outputs that are no logits are clipped to a norm of 1 instead of the recipe's.
    The network should be refitted and recalibrated before, and not recalibrated afterwards.

    Args:
        network: What the mask leaves of the dense network; its mode is restored at the end.
        dense: The dense network, on the same device; left as it is.
        tracing: Its tracing.
        keep: The mask, ``(num_filters,)``, True = kept.
        images: The few images, on the networks' device. Those with labels are augmented as their
            data set says; labels are not used.
        steps: Number of steps, >= 0.
        seed: Random seed of order, augmentation and dropout.
        num_inputs: How many tensors the networks' forward takes.
        augment: Changes the first input of every batch at random, such as by flips.

    Raises:
        RuntimeError: training diverged.
    """
    one = next(iter(images.batches(1)))[:num_inputs]
    [answer] = answers(dense, [one], num_inputs)
    recipe = FEW_IMAGES
    if not all(map(are_logits, answer)):
        # The squared error over a small variance can have steep gradients.
        recipe = replace(recipe, clip_norm=_NO_LOGITS_CLIP_NORM)
    matches = last_feature_match(network, dense, tracing, keep, *one)
    batches = endless_batches(images, FEW_IMAGES.batch_size, seed=seed)
    if augment is not None:
        batches = ((augment(first), *others) for first, *others in batches)
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, _DROPOUT_STREAM))
        distill(
            *(network, dense, batches),
            steps=steps,
            matches=matches,
            recipe=recipe,
            num_inputs=num_inputs,
        )
