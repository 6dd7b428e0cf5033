"""Masks from the weights alone, without a single score.

Each method is a priority per filter, filled up to the budget as all masks are. So rivals meet the
MACs to the same legal step and differ in their ranking alone.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fppmo_ray.distribution import BoolArray, Budget, FloatArray, IntArray, PruningSpace
from fppmo_ray.distribution.logits import rank_in_layer, uniform_priority
from fppmo_ray.pruning import Tracing


def uniform(budget: Budget, importance: FloatArray) -> BoolArray:
    """Return a mask in which every layer loses the same share, its least important filters first.

    With L1 (1608.08710) this is the importance-only mask, with FPGM (1811.00250) its own choice.

    Args:
        budget: The budget that the mask meets.
        importance: ``(num_filters,)``.
    """
    return budget.fill(uniform_priority(budget.space, importance))


def ranked_globally(budget: Budget, importance: FloatArray) -> BoolArray:
    """Return a mask with one threshold on importance for all layers.

    ``fppmo_ray.pruning.importance`` scales every layer to mean 1, as Torch-Pruning does by default
    for global rankings (DepGraph, 2301.12900): raw L1 norms grow with the number of a filter's
    weights.

    Args:
        budget: The budget that the mask meets.
        importance: ``(num_filters,)``, comparable between layers.
    """
    return budget.fill(importance)


def batchnorm_scales(dense: nn.Module, tracing: Tracing) -> FloatArray:
    """Return the largest absolute batch-norm scale of every filter, ``(num_filters,)``.

    Network slimming (1708.06519) ranks all layers by it with one threshold. Its sparsity training
    is left out, since no other rival trains before it is pruned.

    Args:
        dense: The trained network.
        tracing: Tracing of this network.
    """
    scales = np.zeros(tracing.space.num_filters)
    for part in tracing.slices:
        if part.tensor.endswith(".weight") and isinstance(
            dense.get_submodule(part.layer), _BatchNorm
        ):
            values = dense.get_parameter(part.tensor).detach().abs().double().numpy()
            is_filter = part.units >= 0
            np.maximum.at(scales, part.units[is_filter], values[is_filter])
    return scales


def taylor_scores(
    dense: nn.Module, tracing: Tracing, batches: Iterable[tuple[Tensor, Tensor]]
) -> FloatArray:
    """Return the squared first-order change of the loss if a filter is removed, ``(num_filters,)``.

    Molchanov et al. 2019 (1906.10771), equation 8, on convolution weights: ``(sum_w g w)^2``,
    averaged over batches and compared between layers as it is. Cut in one shot here; the paper
    alternates cutting with training.

    Args:
        dense: The trained network.
        tracing: Tracing of this network.
        batches: Training images with labels.
    """
    parts = [
        part for part in tracing.slices if part.side == "output" and part.tensor.endswith(".weight")
    ]
    weights = {
        part.tensor: dense.get_parameter(part.tensor).detach().requires_grad_() for part in parts
    }
    scores, num_batches = np.zeros(tracing.space.num_filters), 0
    for images, labels in batches:
        loss = F.cross_entropy(functional_call(dense, weights, (images,)), labels)
        gradients = torch.autograd.grad(loss, list(weights.values()))
        change = np.zeros_like(scores)
        for part, weight, gradient in zip(parts, weights.values(), gradients, strict=True):
            products = (weight.detach() * gradient).movedim(part.axis, 0).flatten(1)
            values = products.sum(1).cpu().double().numpy()
            is_filter = part.units >= 0
            np.add.at(change, part.units[is_filter], values[is_filter])
        scores += change**2
        num_batches += 1
    scores /= num_batches
    return scores


def with_random_widths(
    budget: Budget, importance: FloatArray, rng: np.random.Generator
) -> BoolArray:
    """Return a mask of random widths whose layers keep their most important filters (2205.05676).

    The share that a layer keeps is uniform in [0, 1], up to the one shift that meets the budget.

    Args:
        budget: The budget that the mask meets.
        importance: ``(num_filters,)``; the order within layers counts.
        rng: Source of the widths.
    """
    shares = rng.random(len(budget.space.groups))
    return budget.fill(uniform_priority(budget.space, importance) + shares[budget.space.group_of])


def with_widths(space: PruningSpace, widths: IntArray, importance: FloatArray) -> BoolArray:
    """Return a mask with given widths, whose layers keep their most important filters.

    Args:
        space: The space of the mask.
        widths: ``(num_groups,)``, filters to keep.
        importance: ``(num_filters,)``; the order within layers counts.
    """
    return np.asarray(rank_in_layer(space, importance) < widths[space.group_of])
