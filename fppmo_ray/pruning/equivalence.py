"""The proof that extraction is exact, carried out on a randomised copy of the network.

The extracted network must compute what the dense one does when the weights that read the removed
channels are zero. A fresh batch norm (mean 0, variance 1, scale 1, shift 0) would hide wrong
indices, so statistics and affine parameters are drawn at random first. Float64 separates a wrong
index from rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fppmo_ray.distribution.space import BoolArray, IntArray, PruningSpace
from fppmo_ray.pruning.copying import copy_network, with_plain_weights
from fppmo_ray.pruning.costs import first_of, run_and_count
from fppmo_ray.pruning.extract import Tracing, extract, named_tensors
from fppmo_ray.pruning.network_io import (
    FORWARD_ERRORS,
    ExampleInputs,
    checked,
    random_inputs,
)
from fppmo_ray.training.outputs import flat_tensors

TOLERANCE = 1e-9
"""Largest allowed error, relative to the largest magnitude of the output."""
_NUM_MASKS = 2
_BATCH = 2


def check_equivalence(
    model: nn.Module,
    tracing: Tracing,
    example_inputs: ExampleInputs,
    *,
    keep: BoolArray | None = None,
) -> None:
    """Check that extraction is exact, on one mask or on two random ones.

    The outputs must agree to 1e-9 in float64 with those of the dense network whose consumers have
    zero weights for the removed channels, and the MACs must be those of the space.

    Args:
        model: The traced network; not changed.
        tracing: What ``trace`` returned for it.
        example_inputs: As for ``trace``.
        keep: The mask to check, bool ``(num_filters,)``; None: two random masks.

    Raises:
        ValueError: extraction is not exact; the message says how the networks differ.
    """
    masks = None if keep is None else [keep]
    with torch.random.fork_rng(devices=[]):
        reason = disagreement(randomised_copy(model), tracing, proof_batch(example_inputs), masks)
    if reason is None:
        return
    if keep is None:
        raise ValueError(f"extraction is not exact for this network: {reason}; trace it again")
    raise ValueError(
        "the smaller network of this mask computes something else than the dense one without the "
        f"removed filters: {reason}; its code seems to decide by widths: exclude the layers of "
        "these widths by `ignore`, or take another mask"
    )


def disagreement(
    twin: nn.Module,
    tracing: Tracing,
    inputs: tuple[Tensor, ...],
    masks: Sequence[BoolArray] | None = None,
) -> str | None:
    """Return how extracted networks differ from the masked dense one; None if they agree.

    Args:
        twin: A ``randomised_copy`` of the network.
        tracing: The tracing to prove.
        inputs: A ``proof_batch``.
        masks: The masks to try; None: two random ones.
    """
    twin.eval()
    rng = np.random.default_rng(0)
    for keep in masks or [random_mask(tracing.space, rng) for _ in range(_NUM_MASKS)]:
        # Our own steps stay outside: their exceptions are bugs, not properties of the network.
        smaller = extract(twin, tracing, keep)
        macs = tracing.space.macs(keep)
        with _zeroed_consumers(twin, tracing, keep):
            try:
                reason = _difference(smaller, twin, macs, inputs)
            except FORWARD_ERRORS as error:
                reason = f"the smaller network raises {type(error).__name__}: {error}"
        if reason is not None:
            return reason.splitlines()[0]
    return None


@torch.no_grad()
def _difference(
    smaller: nn.Module,
    masked: nn.Module,
    macs: int,
    inputs: tuple[Tensor, ...],
) -> str | None:
    """How the extracted network differs from the dense one with zeroed consumers; None if not."""
    # 1. Both compute the same outputs.
    outputs = flat_tensors(smaller(*inputs))
    expected = flat_tensors(masked(*inputs))
    shapes = [tuple(output.shape) for output in outputs]
    if shapes != [tuple(output.shape) for output in expected]:
        return f"its outputs have other shapes: {shapes}"
    for output, reference in zip(outputs, expected, strict=True):
        scale = float(reference.abs().max())
        if scale == 0:
            return "its output is 0 everywhere, which proves nothing"
        error = float((output - reference).abs().max()) / scale
        if not error <= TOLERANCE:  # NaN fails
            return f"its output is off by {error:.1e} of the largest value"
    # 2. The space predicts the multiply-accumulates that torch counts.
    _, counted = run_and_count(smaller, first_of(inputs))
    if macs != counted:
        return f"it has {counted} MACs instead of {macs}"
    # 3. It runs in training mode, so heads that only train fit too.
    smaller.train()(*inputs)
    return None


@contextmanager
def _zeroed_consumers(twin: nn.Module, tracing: Tracing, keep: BoolArray) -> Iterator[None]:
    """Set the weights that read removed channels to zero within a block."""
    tensors = named_tensors(twin)
    before: dict[str, Tensor] = {}
    with torch.no_grad():
        for part in tracing.slices:
            if part.side == "input":
                weight = tensors[part.tensor]
                before.setdefault(part.tensor, weight.clone())
                shape = [-1 if axis == part.axis else 1 for axis in range(weight.dim())]
                weight.mul_(torch.from_numpy(part.kept(keep)).to(weight.dtype).reshape(shape))
        try:
            yield
        finally:
            for name, values in before.items():
                tensors[name].copy_(values)


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


def mask_of_widths(space: PruningSpace, widths: IntArray, rng: np.random.Generator) -> BoolArray:
    """Return a mask that keeps so many random filters of each group.

    Args:
        space: The space of the mask.
        widths: Kept filters per group, ``(num_groups,)``.
        rng: Source of its randomness.
    """
    keep = np.zeros(space.num_filters, dtype=np.bool_)
    for offset, group, width in zip(space.offsets, space.groups, widths, strict=True):
        keep[offset + rng.choice(group.num_filters, size=width, replace=False)] = True
    return keep


@torch.no_grad()
def randomised_copy(model: nn.Module) -> nn.Module:
    """Return a float64 copy on the CPU with random batch norms and no zero weights.

    It seeds and draws from torch's global generator. Weights that are 0, as those of a new head may
    be, would hide errors too.
    """
    twin = copy_network(with_plain_weights(model)).cpu().double()
    torch.default_generator.manual_seed(0)
    for parameter in twin.parameters():
        if not parameter.is_floating_point():
            continue
        parameter.requires_grad_(True)
        if not parameter.any():
            parameter.normal_(0.0, 0.1)
    for norm in twin.modules():
        if not isinstance(norm, _NormBase):
            continue
        for tensor in (norm.weight, norm.running_var):
            if tensor is not None:
                tensor.uniform_(0.5, 1.5)
        for tensor in (norm.bias, norm.running_mean):
            if tensor is not None:
                tensor.normal_(0.0, 0.5)
    return twin


def proof_batch(example_inputs: ExampleInputs) -> tuple[Tensor, ...]:
    """Return a random float64 batch of two in the shapes of the example.

    Raises:
        ValueError: the example inputs are not tensors with a batch axis.
    """
    return random_inputs(checked(example_inputs), _BATCH, torch.float64)
