"""The randomised twin of a network, on which extraction is proven, and masks to prove it by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fppmo_ray.distribution.space import BoolArray, IntArray, PruningSpace
from fppmo_ray.pruning.cast_on_use import Zeroed
from fppmo_ray.pruning.conditions import cast, cast_network
from fppmo_ray.pruning.copying import copy_network, with_plain_weights
from fppmo_ray.pruning.extract import Tracing, named_tensors, replaced, selected
from fppmo_ray.pruning.operations import is_real

_SMALL_SCALE = 0.1


def randomised_copy(model: nn.Module) -> nn.Module:
    """Return a float64 copy on the CPU with random batch norms and no weights near zero.

    Args:
        model: The network; not changed.
    """
    twin = cast_copy(with_plain_weights(model), torch.float64).cpu()
    randomise(twin)
    return twin


def cast_copy(
    model: nn.Module, precision: torch.dtype | None, shared: Sequence[nn.Parameter] = ()
) -> nn.Module:
    """Return a copy of a network in a precision.

    Args:
        model: The network; not changed.
        precision: A floating-point type; None: that of the network.
        shared: Weights that the copy has in the same memory and in their own precision.
    """
    if precision is None:
        return copy_network(model)
    spared = {id(weight) for weight in shared}
    memo: dict[int, Tensor] = {}
    as_given: set[int] = set()
    for tensor in named_tensors(model).values():
        own = tensor.detach()
        values = own if id(tensor) in spared else cast(own, precision)
        if values is own and id(tensor) not in spared:
            values = own.clone()
        if isinstance(tensor, nn.Parameter):
            values = nn.Parameter(values, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = values
        as_given |= {id(values)} if id(tensor) in spared else set()
    twin = replaced(model, memo)
    cast_network(twin, precision, as_given)  # what modules cast beside parameters and buffers
    return twin


@torch.no_grad()
def randomise(twin: nn.Module, seed: int = 0) -> None:
    """Draw batch norms, weights near zero and, for seeds > 0, signs of filters, in place.

    Weights that are 0, as those of a new head may be, would hide errors too, and so would the tiny
    scales with which some residual branches start. Large biases of the same sign hide all others.
    Seed 0 leaves matrices without zeros as they are.

    Args:
        twin: The network.
        seed: Random seed; from 3 on, biases and scales are drawn too.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in twin.parameters():
        if not is_real(parameter):
            continue
        is_vector = parameter.numel() == max(parameter.shape, default=1)
        if num_zeros := parameter.numel() - int(parameter.count_nonzero()):
            scale = float(parameter.abs().max()) or 0.5
            drawn = parameter.new_empty(num_zeros).normal_(0.0, scale, generator=generator)
            values = parameter.detach().clone()  # the parameter's memory may be shared
            values[values == 0] = drawn
            parameter.data = values
        if is_vector and (seed > 2 or float(parameter.abs().max()) < _SMALL_SCALE):
            parameter.uniform_(0.5, 1.5, generator=generator)
        if seed > 0 and parameter.dim() > 0:
            signs = torch.randint(0, 2, (len(parameter),), generator=generator) * 2 - 1
            parameter.mul_(signs.reshape(-1, *[1] * (parameter.dim() - 1)))
    for norm in twin.modules():
        if not isinstance(norm, _NormBase):
            continue
        for tensor in (norm.weight, norm.running_var):
            if tensor is not None:
                tensor.uniform_(0.5, 1.5, generator=generator)
        for tensor in (norm.bias, norm.running_mean):
            if tensor is not None:
                tensor.normal_(0.0, 0.5, generator=generator)


@contextmanager
def zeroed_consumers(
    twin: nn.Module,
    tracing: Tracing,
    keep: BoolArray,
    within: BoolArray | None = None,
    *,
    casts: bool = False,
) -> Iterator[Zeroed]:
    """Set the weights that read removed channels to zero within a block.

    Args:
        twin: The dense network, or an extracted one; its weights change within the block.
        tracing: Tracing of the dense network.
        keep: The mask, bool ``(num_filters,)``, True = kept.
        within: The mask of ``twin``, which keeps more filters; None: it is dense.
        casts: Whether weights that do not have float64 are cast on use; these do not change.

    Yields:
        Where the weights that are cast on use must be zero.
    """
    tensors = named_tensors(twin)
    before: list[tuple[Tensor, int, Tensor, Tensor]] = []
    cast_later: dict[int, list[tuple[int, Tensor]]] = {}
    with torch.no_grad():
        for part in tracing.slices:
            if part.side == "input":
                weight = tensors[part.tensor]
                present = slice(None) if within is None else part.kept(within)
                removed = torch.from_numpy(np.flatnonzero(~part.kept(keep)[present]))
                if casts and weight.is_floating_point() and weight.dtype != torch.float64:
                    cast_later.setdefault(id(weight), []).append((part.axis, removed))
                    continue
                values = selected(weight, part.axis, removed)
                before.append((weight, part.axis, removed, values))
                weight.index_fill_(part.axis, removed, 0)
        try:
            yield cast_later
        finally:
            for weight, axis, removed, values in reversed(before):
                weight.index_copy_(axis, removed, values)


def relative_error(output: Tensor, reference: Tensor) -> float:
    """Return the largest difference relative to the largest value; of integers, a share.

    Args:
        output: A tensor of any shape and type.
        reference: What it should be, of the same shape. NaN and infinities must be the same.
    """
    same = (output == reference) | ((output != output) & (reference != reference))  # NaN is NaN
    if bool(same.all()):
        return 0.0
    if not is_real(output):
        return 1 - float(same.double().mean())
    scale = reference[reference.isfinite()].abs().max() if reference.isfinite().any() else 0.0
    return float(torch.where(same, 0, output - reference).abs().max() / max(float(scale), 1e-300))


def random_mask(space: PruningSpace, rng: np.random.Generator) -> BoolArray:
    """Return a mask that keeps half the filters, and in every group keeps and removes one.

    Args:
        space: The space of the mask.
        rng: Source of its randomness.
    """
    keep = rng.random(space.num_filters) < 0.5
    for offset, group in zip(space.offsets, space.groups, strict=True):
        stays, goes = rng.choice(group.num_filters, size=2, replace=False)
        keep[offset + stays], keep[offset + goes] = True, False
    return keep


def mask_of_widths(
    space: PruningSpace,
    widths: IntArray,
    rng: np.random.Generator,
    within: BoolArray | None = None,
) -> BoolArray:
    """Return a mask that keeps so many random filters of each group.

    Args:
        space: The space of the mask.
        widths: Kept filters per group, ``(num_groups,)``.
        rng: Source of its randomness.
        within: A mask of which filters are taken, where it keeps so many.
    """
    keep = np.zeros(space.num_filters, dtype=np.bool_)
    for offset, group, width in zip(space.offsets, space.groups, widths, strict=True):
        filters = np.arange(offset, offset + group.num_filters)
        inner = filters if within is None else filters[within[filters]]
        few = inner if len(inner) >= width else filters
        keep[few[rng.choice(len(few), size=width, replace=False)]] = True
    return keep
