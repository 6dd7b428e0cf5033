"""Importance of filters by their weights, and for one criterion by a few gradients.

It only sets the initial pruning probabilities. Every criterion computes a value per output channel
of every layer, and the values of the layers in a channel group are averaged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fppmo_ray.distribution.space import FloatArray
from fppmo_ray.pruning.extract import AxisUnits, Tracing, check_axes, named_tensors
from fppmo_ray.pruning.network_io import opened
from fppmo_ray.training.compute import in_mode

Criterion = Literal["l1", "l2", "fpgm", "bn_scale", "taylor"]
Ordering = Literal["obs", Criterion]
"""What orders the filters: ``obs`` (see ``calibration.obs_order``), or a criterion of
``importance``."""
Batches = Iterable[tuple[Tensor, Tensor]]
"""Images (N, C, H, W) and labels (N,), on the network's device."""

_FLOOR = 1e-6  # relative to a layer's mean; a logarithm is taken of the importance


def importance(
    model: nn.Module, tracing: Tracing, criterion: Ordering, batches: Batches | None = None
) -> FloatArray:
    """Return the importance of every filter: the mean over its group's layers, scaled to mean 1.

    Args:
        model: The traced network; not changed.
        tracing: What ``trace`` returned for it.
        criterion: ``l1``, ``l2`` (norms of a filter's weights), ``fpgm`` (distance to the layer's
            other filters), ``bn_scale`` or ``taylor``. ``obs`` is refused: it needs a calibration.
        batches: Search-train images for ``taylor``; a few hundred images suffice.

    Returns:
        ``(num_filters,)``, positive.

    Raises:
        ValueError: the criterion is unknown or needs batches, a group has no batch norm for
            ``bn_scale``, or a value is not finite.
    """
    model = opened(model)
    check_axes(model, tracing.axis_lengths)
    if criterion == "taylor":
        if batches is None:
            raise ValueError("taylor needs batches of search-train images and labels, got None")
        return taylor(model, tracing, batches)
    if criterion == "obs":
        raise ValueError(
            "the order obs comes from a calibration: take calibration.calibrate and obs_order, or "
            "another criterion such as l1"
        )
    criteria = {"l1": l1, "l2": l2, "fpgm": fpgm, "bn_scale": bn_scale}
    if criterion not in criteria:
        names = ", ".join([*criteria, "taylor"])
        raise ValueError(f"criterion must be one of {names}, got {criterion!r}")
    return criteria[criterion](model, tracing)


def l1(model: nn.Module, tracing: Tracing) -> FloatArray:
    """Return the sum of the magnitudes of each filter's weights (Li et al. 2017, 1608.08710).

    Args:
        model: The traced network.
        tracing: What ``trace`` returned for it.
    """
    return _combine(tracing, ((part, rows.abs().sum(1)) for part, rows in _filters(model, tracing)))


def l2(model: nn.Module, tracing: Tracing) -> FloatArray:
    """Return the Euclidean norm of each filter's weights (He et al. 2018, 1808.06866).

    Args:
        model: The traced network.
        tracing: What ``trace`` returned for it.
    """
    return _combine(tracing, ((part, rows.norm(dim=1)) for part, rows in _filters(model, tracing)))


def fpgm(model: nn.Module, tracing: Tracing) -> FloatArray:
    """Return each filter's sum of distances to its layer's filters (He et al. 2019, 1811.00250).

    Near the geometric median, where the sum is least, the other filters can replace a filter.

    Args:
        model: The traced network.
        tracing: What ``trace`` returned for it.
    """
    return _combine(
        tracing,
        ((part, torch.cdist(rows, rows).sum(1)) for part, rows in _filters(model, tracing)),
    )


def bn_scale(model: nn.Module, tracing: Tracing) -> FloatArray:
    """Return the magnitude of each filter's batch-norm scales (Liu et al. 2017, 1708.06519).

    Args:
        model: The traced network.
        tracing: What ``trace`` returned for it.

    Raises:
        ValueError: a group passes no batch norm with a scale.
    """
    scales = [
        (part, model.get_parameter(part.tensor).detach().double().abs())
        for part in tracing.slices
        if part.tensor.endswith(".weight")
        and isinstance(model.get_submodule(part.layer), _BatchNorm)
    ]
    space = tracing.space
    reached = {int(unit) for part, _ in scales for unit in part.units}
    bare = [
        group.name
        for group, offset in zip(space.groups, space.offsets.tolist(), strict=True)
        if offset not in reached
    ]
    if bare:
        raise ValueError(
            f"bn_scale needs a batch norm with a scale on every group, got none on "
            f"{', '.join(bare)}; use another criterion such as l1"
        )
    return _combine(tracing, scales)


def taylor(model: nn.Module, tracing: Tracing, batches: Batches) -> FloatArray:
    """Return the first-order change of the loss without a filter (Molchanov 2019, 1906.10771).

    It is the sum of |weight * gradient| over a filter's weights, of the cross-entropy in eval mode.

    Args:
        model: The traced network; gradients and batch-norm statistics do not change.
        tracing: What ``trace`` returned for it.
        batches: Images and labels; at least one batch.

    Raises:
        ValueError: there is no batch, or a value is not finite.
    """
    parts = [part for part, _ in _outputs(model, tracing)]
    tensors = named_tensors(model)
    weights = {part.tensor: tensors[part.tensor].detach().requires_grad_() for part in parts}
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    num_batches = 0
    with in_mode(model, training=False), torch.enable_grad():
        for images, labels in batches:
            logits = functional_call(model, weights, (images,))
            gradients = torch.autograd.grad(F.cross_entropy(logits, labels), list(weights.values()))
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
                sums[name] += (weight.detach() * gradient).abs()
            num_batches += 1
    if num_batches == 0:
        raise ValueError("taylor needs at least one batch of images and labels, got none")
    return _combine(tracing, ((part, _rows(part, sums[part.tensor]).sum(1)) for part in parts))


def _outputs(model: nn.Module, tracing: Tracing) -> Iterator[tuple[AxisUnits, Tensor]]:
    """Yield the output axes of all weights, with the weight."""
    tensors = named_tensors(model)
    for part in tracing.slices:
        if part.side == "output" and tensors[part.tensor].dim() > 1:
            yield part, tensors[part.tensor].detach()


def _filters(model: nn.Module, tracing: Tracing) -> Iterator[tuple[AxisUnits, Tensor]]:
    for part, weight in _outputs(model, tracing):
        yield part, _rows(part, weight)


def _rows(part: AxisUnits, weight: Tensor) -> Tensor:
    """One float64 row per output channel, (O, weights of a filter)."""
    return weight.double().movedim(part.axis, 0).flatten(1)


def _combine(tracing: Tracing, layers: Iterable[tuple[AxisUnits, Any]]) -> FloatArray:
    """Mean over layers of the values per channel, each layer scaled to mean 1 within a group."""
    space = tracing.space
    total, num_layers = np.zeros(space.num_filters), np.zeros(space.num_filters)
    for part, tensor in layers:
        values = tensor.cpu().numpy()
        if not np.isfinite(values).all():
            raise ValueError(f"importance of {part.tensor} is not finite; check its weights")
        # 1. Average the values of the positions that belong to the same filter.
        part_of = part.units >= 0
        units = part.units[part_of]
        positions = np.bincount(units, minlength=space.num_filters)
        sums = np.bincount(units, values[part_of], minlength=space.num_filters)
        per_filter = sums / np.maximum(positions, 1)
        # 2. Scale the layer to mean 1 within each group.
        present = positions > 0
        group_sums = np.bincount(space.group_of, per_filter * present)
        group_means = group_sums / np.maximum(np.bincount(space.group_of, present), 1)
        # The filters of a group whose values are all zero stay equal, at the floor.
        scale = np.where(group_means > 0, group_means, 1.0)[space.group_of]
        # 3. Add it to the layers of the group.
        total += per_filter / scale * present
        num_layers += present
    return np.maximum(total / np.maximum(num_layers, 1), _FLOOR)
