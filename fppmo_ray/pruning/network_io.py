"""Example inputs that a network's forward takes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

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
    examples: tuple[Tensor, ...], batch: int | None, dtype: torch.dtype, *, seed: int = 0
) -> tuple[Tensor, ...]:
    """Return a batch on the CPU of normal random numbers; integers repeat the examples.

    Args:
        examples: Example inputs, from ``checked``.
        batch: Length of the batch axis; None: that of each example.
        dtype: Type of the floating-point inputs.
        seed: Random seed, >= 0.
    """
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn((batch or len(example), *example.shape[1:]), generator=generator, dtype=dtype)
        if example.is_floating_point()
        else (example if batch is None else example[:1].expand(batch, *example.shape[1:]))
        .cpu()
        .clone()
        for example in examples
    )


def opened(network: nn.Module) -> nn.Module:
    """Return the network inside of wrappers such as DataParallel and ``torch.compile``.

    Args:
        network: Any network; one that is not wrapped is returned itself.
    """
    for wrapper in ("module", "_orig_mod"):
        inner = network._modules.get(wrapper)
        if inner is not None and len(network._modules) == 1 and _is_wrapper(network):
            return opened(inner)
    return network


def _is_wrapper(network: nn.Module) -> bool:
    names = {"DataParallel", "DistributedDataParallel", "OptimizedModule", "AveragedModel"}
    return bool(names & {kind.__name__ for kind in type(network).__mro__})


FORWARD_ERRORS = (RuntimeError, ValueError, AssertionError, IndexError, TypeError)
"""What the forward of a network raises when it does not accept its inputs or widths."""
