"""The proof that extraction is exact: contract 3, on a randomised copy of the network.

A fresh batch norm (mean 0, variance 1, scale 1, shift 0) hides wrong indices, so statistics and
affine parameters are drawn at random first. Float64 separates a wrong index from rounding.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase

from fppmo_ray.distribution.space import BoolArray, PruningSpace
from fppmo_ray.pruning.costs import first_of, run_and_count
from fppmo_ray.pruning.extract import Tracing, extract
from fppmo_ray.pruning.network_io import ExampleInputs, checked, flat_tensors, random_inputs

TOLERANCE = 1e-9
"""Largest error relative to the output's largest magnitude."""
_NUM_MASKS = 2
_BATCH = 2
# What a forward raises when widths no longer fit.
FORWARD_ERRORS = (RuntimeError, ValueError, AssertionError, IndexError, TypeError)


def check_equivalence(model: nn.Module, tracing: Tracing, example_inputs: ExampleInputs) -> None:
    """Check that the networks of random masks compute what the dense one does without them.

    The dense network's consumers get zero weights for the removed channels; the outputs must
    agree to 1e-9 in float64, and the MACs must be those of the space. ``model`` is left as it is.

    Args:
        model: The traced network.
        tracing: What ``trace`` said of it.
        example_inputs: As for ``trace``.

    Raises:
        ValueError: they differ, with how.
    """
    with torch.random.fork_rng(devices=[]):
        reason = disagreement(randomised_copy(model), tracing, proof_batch(example_inputs))
    if reason is not None:
        raise ValueError(f"extraction is not exact for this network: {reason}; trace it again")


def disagreement(twin: nn.Module, tracing: Tracing, inputs: tuple[Tensor, ...]) -> str | None:
    """How extracted networks of random masks differ from the dense one; None if they agree.

    Args:
        twin: A ``randomised_copy``.
        tracing: Of the network.
        inputs: A ``proof_batch``.
    """
    twin.eval()
    rng = np.random.default_rng(0)
    for _ in range(_NUM_MASKS):
        keep = _random_mask(tracing.space, rng)
        try:
            reason = _compare(twin, tracing, keep, inputs)
        except FORWARD_ERRORS as error:
            reason = f"the smaller network raises {type(error).__name__}: {error}"
        if reason is not None:
            return reason.splitlines()[0]
    return None


@torch.no_grad()
def _compare(
    twin: nn.Module, tracing: Tracing, keep: BoolArray, inputs: tuple[Tensor, ...]
) -> str | None:
    smaller = extract(twin, tracing, keep)
    outputs, expected = flat_tensors(smaller(*inputs)), _reference(twin, tracing, keep, inputs)
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
    macs = tracing.space.macs(keep)
    _, counted = run_and_count(smaller, first_of(inputs))
    if macs != counted:
        return f"it has {counted} MACs instead of {macs}"
    smaller.train()(*inputs)  # heads that only train must fit too
    return None


@torch.no_grad()
def _reference(
    twin: nn.Module, tracing: Tracing, keep: BoolArray, inputs: tuple[Tensor, ...]
) -> list[Tensor]:
    """The dense outputs with the consumers' weights for the removed channels zeroed."""
    weights = {}
    for part in tracing.slices:
        if part.side == "input":
            weight = twin.get_parameter(part.tensor)
            shape = [-1 if axis == part.axis else 1 for axis in range(weight.dim())]
            kept = torch.from_numpy(part.kept(keep)).to(weight.dtype)
            weights[part.tensor] = weight * kept.reshape(shape)
    return flat_tensors(functional_call(twin, weights, inputs))


def _random_mask(space: PruningSpace, rng: np.random.Generator) -> BoolArray:
    """Half the filters; in every group at least one stays and one goes."""
    keep = rng.random(space.num_filters) < 0.5
    for offset, group in zip(space.offsets, space.groups, strict=True):
        stays, goes = rng.choice(group.num_filters, size=2, replace=False)
        keep[offset + stays], keep[offset + goes] = True, False
    return keep


@torch.no_grad()
def randomised_copy(model: nn.Module) -> nn.Module:
    """A float64 copy on the CPU with random normalisation; draws from the global generator.

    Weights that are 0, as a new head's may be, would hide errors too.
    """
    twin = copy.deepcopy(model).cpu().double().requires_grad_(True)
    torch.default_generator.manual_seed(0)
    for parameter in twin.parameters():
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
    """A random float64 batch of two in the shapes of the example.

    Raises:
        ValueError: the example is none.
    """
    return random_inputs(checked(example_inputs), _BATCH, torch.float64)
