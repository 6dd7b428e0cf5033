"""Example inputs that a network's forward takes, and the tensors that it returns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from numbers import Number
from typing import Any

import torch
from torch import Tensor

ExampleInputs = Tensor | tuple[Tensor, ...]
"""Arguments of a forward, in order, each with a batch axis. Only shapes and types matter, except
that the values of integers, which may be indices, are used."""


def checked(example_inputs: ExampleInputs) -> tuple[Tensor, ...]:
    """Return example inputs as a tuple.

    Raises:
        ValueError: they are not tensors with a batch axis.
    """
    several = isinstance(example_inputs, tuple | list)
    examples = tuple(example_inputs) if several else (example_inputs,)
    for example in examples or (None,):
        if not isinstance(example, Tensor) or example.dim() < 2 or len(example) < 1:
            shape = tuple(example.shape) if isinstance(example, Tensor) else type(example).__name__
            raise ValueError(
                "example inputs must be tensors with a batch axis, such as (1, 3, 32, 32), in the "
                f"order in which forward takes them, got {shape}; wrap a network that takes "
                "anything else in a module whose forward takes tensors"
            )
    return examples


def random_inputs(
    examples: tuple[Tensor, ...], batch: int, dtype: torch.dtype, *, seed: int = 0
) -> tuple[Tensor, ...]:
    """Return a batch on the CPU of normal random numbers; integers repeat the first example.

    Args:
        examples: Example inputs, from ``checked``.
        batch: Length of the batch axis.
        dtype: Type of the floating-point inputs.
        seed: Random seed, >= 0.
    """
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn((batch, *example.shape[1:]), generator=generator, dtype=dtype)
        if example.is_floating_point()
        else example[:1].cpu().expand(batch, *example.shape[1:]).clone()
        for example in examples
    )


_RETURNS = "the network must return tensors, alone or nested in tuples, lists, dicts or dataclasses"


FORWARD_ERRORS = (RuntimeError, ValueError, AssertionError, IndexError, TypeError)
"""What the forward of a network raises when it does not accept its inputs or widths."""


class OutputError(ValueError):
    """A network returned something in which not all tensors can be found."""


def flat_tensors(output: Any) -> list[Tensor]:
    """Return all tensors of a network's output, which may be nested.

    Raises:
        OutputError: there is no tensor, or a part is of a class that may hide tensors.
    """
    tensors = [part for part in _parts(output) if isinstance(part, Tensor)]
    if not tensors:
        raise OutputError(f"{_RETURNS}, got {type(output).__name__} without any")
    return tensors


def _parts(output: Any) -> Iterator[Any]:
    """Yield tensors and plain values, depth first."""
    if isinstance(output, Tensor | str | Number | None):
        yield output
        return
    if isinstance(output, Mapping):
        output = output.values()
    elif is_dataclass(output) and not isinstance(output, type):
        output = vars(output).values()
    if not isinstance(output, Iterable):
        raise OutputError(f"{_RETURNS}, got a part of class {type(output).__name__}")
    for part in output:
        yield from _parts(part)
