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
    # Beside images there may be a number per image, or one number for all, such as a time.
    least = 0 if any(isinstance(e, Tensor) and e.dim() > 1 for e in examples) else 2
    for example in examples or (None,):
        is_tensor = isinstance(example, Tensor) and example.dim() >= least and example.numel()
        if not is_tensor:
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

    A tensor without axes stays as it is.

    Args:
        examples: Example inputs, from ``checked``.
        batch: Length of the batch axis; None: that of each example.
        dtype: Type of the floating-point inputs; complex ones have parts of this type.
        seed: Random seed, >= 0.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(example: Tensor) -> Tensor:
        if batch is not None and example.dim():
            example = example[:1].expand(batch, *example.shape[1:])
        if not example.dim() or not (example.is_floating_point() or example.is_complex()):
            return example.to("cpu", dtype if example.is_floating_point() else None).clone()
        kind = dtype.to_complex() if example.is_complex() else dtype
        return torch.randn(tuple(example.shape), generator=generator, dtype=kind)

    return tuple(drawn(example) for example in examples)


def first_of(inputs: tuple[Tensor, ...], count: int) -> tuple[Tensor, ...]:
    """Return so many of a batch of inputs.

    Args:
        inputs: Arguments of a forward; those without axes are returned whole.
        count: Length of the new batch axis.
    """
    return tuple(tensor[:count] if tensor.dim() else tensor for tensor in inputs)


def opened(network: nn.Module) -> nn.Module:
    """Return the network inside of wrappers such as DataParallel and ``torch.compile``.

    Args:
        network: Any network; one that is not wrapped is returned itself.
    """
    for wrapper in ("module", "_orig_mod"):
        inner = getattr(network, wrapper, None) if _is_wrapper(network) else None
        if isinstance(inner, nn.Module):
            return opened(inner)
    return network


def _is_wrapper(network: nn.Module) -> bool:
    names = {"DataParallel", "DistributedDataParallel", "OptimizedModule", "AveragedModel"}
    return bool(names & {kind.__name__ for kind in type(network).__mro__})


FORWARD_ERRORS = (
    *(RuntimeError, ValueError, AssertionError, LookupError, TypeError),
    *(AttributeError, ArithmeticError),
)
"""What the forward of a network raises when it does not accept its inputs or widths."""
