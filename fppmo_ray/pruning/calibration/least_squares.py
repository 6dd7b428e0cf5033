"""The refit: weights of the layers behind removed filters, by least squares in closed form.

A layer that lost inputs gets the weights that reproduce the dense layer's output best from the
inputs it has left (He et al. 2017, 1707.06168), by the Gram matrices of the calibration alone:
``W_S = M G[:, S] (G_SS)^-1``. No image is looked at, and no gradient is computed.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from fppmo_ray.distribution.space import BoolArray
from fppmo_ray.pruning.calibration.consumers import made_axis, weight_matrix, write_matrix
from fppmo_ray.pruning.calibration.grams import Calibration, InputGram
from fppmo_ray.pruning.extract import Tracing, check_axes
from fppmo_ray.training.device import copy_to

CACHE_BYTES = 256 * 1024**2
"""Default memory for solved weights, which masks that keep the same inputs of a layer share."""


@torch.no_grad()
def refit(
    pruned: nn.Module, dense: nn.Module, tracing: Tracing, keep: BoolArray, calibration: Calibration
) -> None:
    """Refit, in place, every layer of a pruned network that lost inputs; see ``Refit``.

    Args:
        pruned: ``extract(dense, tracing, keep)``.
        dense: The traced network, calibrated.
        tracing: Its tracing.
        keep: The mask, ``(num_filters,)``, True = kept.
        calibration: What ``calibrate`` found for the dense network.

    Raises:
        ValueError: the pruned network is not the mask's.
    """
    Refit(dense, tracing, calibration, cache_bytes=0)(pruned, keep)


class Refit:
    """Refits pruned networks of one dense network, and keeps what it solved.

    Args:
        dense: The traced network, calibrated; its weights must not change meanwhile.
        tracing: Its tracing.
        calibration: What ``calibrate`` found for it.
        cache_bytes: Memory for solved weights; those that were not used for longest are dropped.
    """

    def __init__(
        self,
        dense: nn.Module,
        tracing: Tracing,
        calibration: Calibration,
        *,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._dense = dense
        self._tracing = tracing
        self._calibration = calibration
        self._cache_bytes = cache_bytes
        self._solved: OrderedDict[tuple[str, bytes], tuple[Tensor, Tensor]] = OrderedDict()

    @torch.no_grad()
    def __call__(self, pruned: nn.Module, keep: BoolArray) -> None:
        """Refit, in place, every layer of a pruned network that lost inputs.

        All other layers keep their weights to the bit. Batch norms must be recalibrated
        afterwards.

        Args:
            pruned: ``extract(dense, tracing, keep)``.
            keep: The mask, ``(num_filters,)``, True = kept.

        Raises:
            ValueError: the network is not the mask's.
        """
        kept = self._tracing.kept_indices(keep)
        lengths = self._tracing.axis_lengths
        check_axes(pruned, {axis: len(kept.get(axis, range(n))) for axis, n in lengths.items()})
        for gram in self._calibration.grams:
            consumer = gram.consumer
            kept_channels = np.append(keep, True)[consumer.units[0]]  # unit -1 reads the True
            if kept_channels.all():
                continue
            weights, shift = self._solve(gram, kept_channels)
            layer: Any = self._dense.get_submodule(consumer.modules[0])
            rows = _kept_rows(layer, kept.get((consumer.tensor, made_axis(layer))), weights)
            write_matrix(
                pruned.get_submodule(consumer.modules[0]), weights.take_along_dim(rows, dim=1)
            )
            for name in consumer.modules:
                dense_layer: Any = self._dense.get_submodule(name)
                if gram.is_centred and dense_layer.bias is not None:
                    bias = dense_layer.bias.detach().double().reshape(shift.shape) + shift
                    kept_bias = bias.take_along_dim(rows[:, :, 0], dim=1)
                    pruned_layer: Any = pruned.get_submodule(name)
                    pruned_layer.bias.copy_(kept_bias.flatten())

    def _solve(self, gram: InputGram, kept_channels: BoolArray) -> tuple[Tensor, Tensor]:
        """New weights (groups, outputs, kept columns) and what to add to biases (groups, outputs).

        Args:
            gram: The layer's Gram matrix.
            kept_channels: ``(channels per group,)``.
        """
        key = gram.consumer.tensor, np.packbits(kept_channels).tobytes()
        if key in self._solved:
            self._solved.move_to_end(key)
            return self._solved[key]
        matrix = weight_matrix(self._dense.get_submodule(gram.consumer.modules[0]))
        solved = solve_weights(gram, matrix, kept_channels)
        self._solved[key] = solved
        used = sum(8 * (w.numel() + s.numel()) for w, s in self._solved.values())
        while self._solved and used > self._cache_bytes:
            _, (weights, shift) = self._solved.popitem(last=False)
            used -= 8 * (weights.numel() + shift.numel())
        return solved


def solve_weights(
    gram: InputGram, matrix: Tensor, kept_channels: BoolArray
) -> tuple[Tensor, Tensor]:
    """The least-squares weights of a layer on the inputs it has left, for all its outputs.

    Args:
        gram: The layer's Gram matrix.
        matrix: Its dense weights, (groups, outputs per group, columns).
        kept_channels: ``(channels per group,)``, True = kept.

    Returns:
        Weights (groups, outputs per group, kept columns), and what a constant added to every
        output makes up for the means of the removed inputs, (groups, outputs per group).
    """
    is_kept = np.tile(kept_channels, gram.consumer.num_taps)
    fitted = matrix.clone()
    for columns, block in gram.blocks:
        stays = copy_to(block.device, torch.from_numpy(np.flatnonzero(is_kept[columns])))
        goes = copy_to(block.device, torch.from_numpy(np.flatnonzero(~is_kept[columns])))
        if not len(goes) or not len(stays):
            continue
        index = copy_to(block.device, torch.from_numpy(columns))
        factor = torch.linalg.cholesky(block[:, stays][:, :, stays])
        # W_S = M_S + M_R G_RS (G_SS)^-1: only what is lost, R, has to be made up for.
        lost = matrix[:, :, index[goes]] @ block[:, goes][:, :, stays]
        fitted[:, :, index[stays]] += torch.cholesky_solve(lost.mT, factor).mT
    kept = copy_to(matrix.device, torch.from_numpy(np.flatnonzero(is_kept)))
    fitted = fitted[:, :, kept]
    shift = (matrix @ gram.mean[:, :, None]) - fitted @ gram.mean[:, kept, None]
    return fitted, shift[:, :, 0]


def _kept_rows(layer: nn.Module, kept: Any, weights: Tensor) -> Tensor:
    """The kept outputs of every group, (groups, kept outputs per group, 1).

    Args:
        layer: The dense layer.
        kept: Kept positions along the weight's output axis; None: all.
        weights: (groups, outputs per group, columns).
    """
    groups, num_outputs = weights.shape[:2]
    if kept is None:
        rows = torch.arange(num_outputs).repeat(groups, 1)
    elif isinstance(layer, _ConvTransposeNd):  # an axis for all groups
        rows = torch.from_numpy(kept).repeat(groups, 1)
    else:
        rows = torch.from_numpy(kept).reshape(groups, -1) % num_outputs
    return copy_to(weights.device, rows[:, :, None])
