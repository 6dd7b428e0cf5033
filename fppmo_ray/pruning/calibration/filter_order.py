"""The order in which filters can go, and the error that each removal costs.

Optimal Brain Surgeon (Hassibi & Stork 1993) for whole filters: the layers that read a filter lose
all columns of it at once, and their other weights are updated so that their outputs change least
(as OBC, 2208.11580, and ZipLM, 2302.04089, do).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fppmo_ray.distribution.space import FloatArray, IntArray
from fppmo_ray.pruning.calibration.consumers import weight_matrix
from fppmo_ray.pruning.calibration.grams import Calibration, InputGram
from fppmo_ray.pruning.extract import AxisUnits, Tracing, named_tensors
from fppmo_ray.training.device import copy_to

_PENDING_COLUMNS = 256
"""Removed columns after which the rest of an inverse is brought up to date, in one product."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FilterOrder:
    """The order of the filters in every group, and what their removal costs."""

    importance: FloatArray
    """``(num_filters,)``: the filter's place in the order of removal, over the group's size, in
    (0, 1]. The most important filter, which would go last, has 1."""
    error_curves: tuple[FloatArray, ...]
    """One per group, ``(num_filters of the group + 1,)``: entry n is the error with n filters
    kept, relative to the variance of the outputs, summed over the layers that read the group."""


@torch.no_grad()
def obs_order(
    model: nn.Module,
    tracing: Tracing,
    calibration: Calibration,
    *,
    importance: FloatArray | None = None,
) -> FilterOrder:
    """Order every group's filters by the error that removing them one after the other costs.

    Args:
        model: The traced network.
        tracing: Its tracing.
        calibration: What ``calibrate`` found for this network.
        importance: ``(num_filters,)``: remove the filters in this order, least first, and only
            measure the errors. None: remove the filter of least error at each step.

    Raises:
        ValueError: the importance has another shape.
    """
    space = tracing.space
    if importance is not None and importance.shape != (space.num_filters,):
        raise ValueError(
            f"importance must have shape ({space.num_filters},), one number per filter of the "
            f"space, got {importance.shape}"
        )
    places = np.empty(space.num_filters)
    curves = []
    for group, offset in zip(space.groups, space.offsets.tolist(), strict=True):
        filters = np.arange(offset, offset + group.num_filters)
        wished = None if importance is None else np.argsort(importance[filters], kind="stable")
        readers = _readers(model, calibration, filters)
        fixed = _unseen_errors(model, calibration.unseen, filters)
        removal, errors = _eliminate(readers, fixed, wished)
        places[filters[removal]] = np.arange(1, len(filters) + 1) / len(filters)
        # The errors of removing 0, 1, ... filters, to those of keeping 0, 1, ...
        curves.append(np.concatenate([[0.0], np.cumsum(errors)])[::-1].copy())
    return FilterOrder(importance=places, error_curves=tuple(curves))


class _Reader:
    """What one consumer, or a block of its columns, loses with each filter of a group.

    Only columns of the group's filters are held, since removing some of them changes the inverse
    and the weights at the others by nothing else. In shapes, G = groups of a convolution, O =
    outputs per group, C = filters, K = columns per filter, P = pending rows.

    Removals change the inverse H and the weights M by products of a few rows. They are only
    collected, and applied in one product when there are many; what every step needs of H and M,
    the K x K blocks of every filter, is kept up to date.
    """

    def __init__(self, members: IntArray, inverse: Tensor, weights: Tensor) -> None:
        """Start with all filters.

        Args:
            members: ``(C,)``, which of the group's filters the columns belong to.
            inverse: Inverse Gram matrix (G, C K, C K), the columns filter by filter.
            weights: (G, O, C K), over the square root of the consumer's output variance.
        """
        self._members = members
        self._width = inverse.shape[1] // len(members)
        self._begin(inverse, weights)

    def add_costs(self, costs: FloatArray) -> None:
        """Add, in place, the error that removing each filter next would make.

        Args:
            costs: One number per filter of the group; those removed already are not touched.
        """
        if not self._is_left.any():
            return
        # tr(M_K (H_KK)^-1 M_K^T) = tr((H_KK)^-1 M_K^T M_K)
        factor = torch.linalg.cholesky(self._diagonal)
        solved = torch.cholesky_solve(self._squares, factor)
        own = solved.diagonal(dim1=2, dim2=3).sum((0, 2)).clamp_min(0).cpu().numpy()
        costs[self._members[self._is_left]] += own[self._is_left]

    def remove(self, filter_index: int) -> None:
        """Remove one of the group's filters and update what is known of the others, in place."""
        found = np.flatnonzero(self._members == filter_index)
        if not len(found):
            return  # its columns are in another block
        place, width = int(found[0]), self._width
        own = slice(place * width, (place + 1) * width)
        rows, made = self._rows[:, : self._num_pending], self._made[:, : self._num_pending]
        factor = torch.linalg.cholesky(self._diagonal[:, place])
        # H_K: and M_K as they are now, then Y = L^-1 H_K: and A = L^-1 M_K^T, where H_KK = L L^T
        current = torch.baddbmm(self._inverse[:, own], rows[:, :, own].mT, rows, alpha=-1)
        read = torch.baddbmm(self._weights[:, :, own].mT, rows[:, :, own].mT, made, alpha=-1)
        new_rows = torch.linalg.solve_triangular(factor, current, upper=False)
        new_made = torch.linalg.solve_triangular(factor, read, upper=False)
        # H -= H_:K (H_KK)^-1 H_K:, which is Y^T Y, and M -= M_K (H_KK)^-1 H_K:, which is A^T Y
        blocks = self._by_filter(new_rows)
        self._diagonal -= blocks.mT @ blocks
        # M_c^T M_c -= Z + Z^T - Y_c^T (A A^T) Y_c, where Z = Y_c^T A M_c
        product = new_made @ self._weights - (new_made @ made.mT) @ rows
        mixed = blocks.mT @ self._by_filter(product)
        square = (new_made @ new_made.mT)[:, None]
        self._squares += blocks.mT @ square @ blocks - mixed - mixed.mT
        self._rows[:, self._num_pending : self._num_pending + width] = new_rows
        self._made[:, self._num_pending : self._num_pending + width] = new_made
        self._num_pending += width
        num_gone = len(self._is_left) - np.count_nonzero(self._is_left)
        self._is_left[place] = False
        self._gone[num_gone] = place
        # The blocks of removed filters are zero but for rounding, which has no Cholesky factor.
        self._diagonal[:, self._gone[: num_gone + 1]] = self._one
        if self._num_pending + width > self._rows.shape[1]:
            self._bring_up_to_date()

    def _begin(self, inverse: Tensor, weights: Tensor) -> None:
        """Hold matrices that lack nothing, and what follows from them."""
        num_filters, width = len(self._members), self._width
        self._inverse, self._weights = inverse, weights
        self._is_left = np.ones(num_filters, dtype=np.bool_)
        self._gone = torch.empty(num_filters, dtype=torch.int64, device=inverse.device)
        """Places of removed filters, on the device of the matrices; others are not filled in."""
        self._one = torch.eye(width, dtype=inverse.dtype, device=inverse.device)
        most = max(width, _PENDING_COLUMNS // width * width)
        self._rows = inverse.new_empty(len(inverse), most, inverse.shape[2])  # Y, (G, P, C K)
        self._made = inverse.new_empty(len(inverse), most, weights.shape[1])  # A, (G, P, O)
        self._num_pending = 0
        shape = len(inverse), num_filters, width, num_filters, width
        diagonal = inverse.reshape(shape).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
        self._diagonal = diagonal.contiguous()  # H_cc, (G, C, K, K)
        columns = self._by_filter(weights)
        self._squares = columns.mT @ columns  # M_c^T M_c, (G, C, K, K)

    def _by_filter(self, rows: Tensor) -> Tensor:
        """The columns (G, n, C K) of every filter, (G, C, n, K)."""
        return torch.unflatten(rows, 2, (len(self._members), self._width)).transpose(1, 2)

    def _bring_up_to_date(self) -> None:
        """Apply what is pending to the whole matrices, and forget the filters removed so far."""
        left = np.flatnonzero(self._is_left)
        of_filters = (left[:, None] * self._width + np.arange(self._width)).flatten()
        columns = copy_to(self._inverse.device, torch.from_numpy(of_filters))
        rows = self._rows[:, : self._num_pending, columns]
        made = self._made[:, : self._num_pending]
        inverse = self._inverse[:, columns][:, :, columns].baddbmm_(rows.mT, rows, alpha=-1)
        weights = self._weights[:, :, columns].baddbmm_(made.mT, rows, alpha=-1)
        self._members = self._members[left]
        self._begin(inverse, weights)


def _readers(model: nn.Module, calibration: Calibration, filters: IntArray) -> list[_Reader]:
    """The consumers of a group, block by block.

    Args:
        model: The traced network.
        calibration: Its Gram matrices.
        filters: ``(size of the group,)``, consecutive indices into a mask.
    """
    readers = []
    for gram in calibration.grams:
        if not np.isin(gram.consumer.units, filters).any():
            continue
        matrix = weight_matrix(model.get_submodule(gram.consumer.modules[0]))
        variance = output_variance(gram, matrix)
        matrix = matrix / variance**0.5 if variance > 0 else matrix
        # The columns' filters: a tap after the other, the same for every group of a convolution.
        units = np.tile(gram.consumer.units[0], gram.consumer.num_taps)
        for columns, block in gram.blocks:
            of_block = units[columns]
            mine = np.flatnonzero(np.isin(of_block, filters))
            if not len(mine):
                continue
            mine = mine[np.argsort(of_block[mine], kind="stable")]
            index = copy_to(block.device, torch.from_numpy(mine))
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(block))
            weights = matrix[:, :, copy_to(block.device, torch.from_numpy(columns[mine]))]
            if weights.shape[1] > weights.shape[2]:
                # Only M^T M counts, which a triangular factor has too, in fewer rows.
                weights = torch.linalg.qr(weights, mode="r").R
            members = np.unique(of_block[mine]) - filters[0]
            readers.append(_Reader(members, inverse[:, index][:, :, index], weights))
    return readers


def output_variance(gram: InputGram, matrix: Tensor) -> float:
    """The variance of a consumer's outputs, summed over them: ``tr(M G M^T)``.

    Args:
        gram: The consumer's Gram matrix.
        matrix: Its weights, (groups, outputs per group, columns).
    """
    total = 0.0
    for columns, block in gram.blocks:
        part = matrix[:, :, copy_to(matrix.device, torch.from_numpy(columns))]
        total += float(((part @ block) * part).sum())
    return total


def _unseen_errors(model: nn.Module, unseen: Sequence[AxisUnits], filters: IntArray) -> FloatArray:
    """The share of the squared weights that each filter is read with where inputs are unknown."""
    errors = np.zeros(len(filters))
    tensors = named_tensors(model)
    for part in unseen:
        weight = tensors[part.tensor].detach().double().movedim(part.axis, 0)
        squares = weight.flatten(1).square().sum(1).cpu().numpy()
        mine = np.isin(part.units, filters)
        total = squares.sum()
        if mine.any() and total > 0:
            per_filter = np.bincount(
                part.units[mine] - filters[0], squares[mine], minlength=len(filters)
            )
            errors += per_filter / total
    return errors


def _eliminate(
    readers: Sequence[_Reader], fixed: FloatArray, wished: IntArray | None
) -> tuple[IntArray, FloatArray]:
    """Remove a group's filters one after the other.

    Args:
        readers: Its consumers; used up.
        fixed: ``(size,)``: what each filter costs besides, whenever it goes.
        wished: ``(size,)``: the order of removal; None: the filter of least error goes next.

    Returns:
        The filters in the order of removal, and the error of each step, both ``(size,)``.
    """
    size = len(fixed)
    removal, errors = np.empty(size, dtype=np.int64), np.empty(size)
    is_left = np.ones(size, dtype=np.bool_)
    for step in range(size):
        costs = fixed.copy()
        for reader in readers:
            reader.add_costs(costs)
        chosen = int(
            np.argmin(np.where(is_left, costs, np.inf)) if wished is None else wished[step]
        )
        removal[step], errors[step] = chosen, costs[chosen]
        is_left[chosen] = False
        for reader in readers:
            reader.remove(chosen)
    return removal, errors
