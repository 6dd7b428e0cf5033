"""Masks from what a network's weights say of its filters, without a single score.

Every one is a priority per filter, filled up to the budget as all masks are: so rivals meet the
MACs to the same legal step, and differ in their ranking alone.
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
    """Every layer loses the same share, its least important filters first.

    With L1 (1608.08710) this is the importance-only mask, with FPGM (1811.00250) its own choice.
    """
    return budget.fill(uniform_priority(budget.space, importance))


def ranked_globally(budget: Budget, importance: FloatArray) -> BoolArray:
    """One threshold for all layers.

    ``fppmo_ray.pruning.importance`` scales every layer to mean 1, as Torch-Pruning does by default
    for global rankings (DepGraph, 2301.12900): raw L1 norms grow with a filter's weights.
    """
    return budget.fill(importance)


def batchnorm_scales(dense: nn.Module, tracing: Tracing) -> FloatArray:
    """Largest batch-norm scale of every filter, as it is.

    Network slimming (1708.06519) ranks all layers by it with one threshold; its sparsity training
    is left out, since no other rival trains before it is pruned.
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
    """Squared first-order change of the loss if a filter went, mean over batches.

    Molchanov et al. 2019 (1906.10771), equation 8, on convolution weights: ``(sum_w g w)^2``,
    compared between layers as it is. Cut in one shot, where they alternate with training.
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
    """Layers of random widths, in each the most important filters (2205.05676).

    The share that a layer keeps is uniform in [0, 1] up to the one shift that meets the budget.
    """
    shares = rng.random(len(budget.space.groups))
    return budget.fill(uniform_priority(budget.space, importance) + shares[budget.space.group_of])


def with_widths(space: PruningSpace, widths: IntArray, importance: FloatArray) -> BoolArray:
    """The most important filters of every layer, at given widths ``(num_groups,)``."""
    return np.asarray(rank_in_layer(space, importance) < widths[space.group_of])
