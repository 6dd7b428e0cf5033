"""How a network can be run: on which batch, in which modes, precision and image size."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from fppmo_ray.pruning.network_io import FORWARD_ERRORS, first_of, random_inputs
from fppmo_ray.pruning.operations import is_real
from fppmo_ray.training.outputs import OutputError

Inputs = tuple[Tensor, ...]

_BATCH = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Conditions:
    """Inputs on which a network runs, in its own precision."""

    inputs: Inputs
    """A batch of two, or of the length of the examples for a network that does not run on two."""
    image: Inputs
    """The inputs whose costs are counted: the first of the batch, or the whole of it for a network
    that does not run on two images."""
    batch: int | None
    """Length of the batch axis; None: that of the examples."""
    training_error: str | None
    """What the network raises in training mode; None if it runs."""

    @property
    def remark(self) -> str | None:
        """A sentence about a network that raises in training mode; None if it runs there too."""
        if self.training_error is None:
            return None
        return (
            "the network was followed in eval mode only, since in training mode it raises "
            f"{self.training_error}; layers that run only in training do not lose channels"
        )


def find_conditions(
    network: nn.Module, examples: Inputs, run: Callable[[Inputs], object]
) -> Conditions:
    """Find inputs on which a network runs, in training mode if it does so at all.

    Args:
        network: The network on the CPU; it is left in the mode in which it ran.
        examples: Example inputs, from ``checked``.
        run: Runs the network on a batch.

    Raises:
        ValueError: the network runs neither on two images nor on a batch as long as the examples.
    """
    precision = precision_of(network)
    training_error: str | None = None
    error: Exception = RuntimeError()
    for batch in (_BATCH, None):
        inputs = random_inputs(examples, batch, precision)
        for training in (True, False):
            network.train(training)
            try:
                run(inputs)
            except FORWARD_ERRORS as raised:
                if isinstance(raised, OutputError) and not training:
                    raise
                error = raised
            else:
                failed = None if training else training_error
                return conditions_on(examples, precision, batch, failed)
            if training:
                training_error = _sentence(error)
    with must_run(inputs), torch.no_grad():
        network(*inputs)
    raise RuntimeError(
        "the network runs, but its operations could not be followed: it then raised "
        f"{_sentence(error)}; put the code that raises it into a module that `ignore` names, or "
        "report it"
    ) from error


def conditions_on(
    examples: Inputs, precision: torch.dtype, batch: int | None, training_error: str | None
) -> Conditions:
    """Return conditions with random inputs.

    Args:
        examples: Example inputs, from ``checked``.
        precision: Of the network.
        batch: Length of the batch axis; None: that of the examples.
        training_error: What the network raises in training mode; None if it runs.
    """
    inputs = random_inputs(examples, batch, precision)
    image = first_of(inputs, 1) if batch else inputs
    return Conditions(inputs=inputs, image=image, batch=batch, training_error=training_error)


@contextmanager
def eager() -> Iterator[None]:
    """Run compiled modules and functions uncompiled within a block, for their code decides too."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def must_run(inputs: Inputs) -> Iterator[None]:
    """Report a network that does not run dense as such, and not as one that cannot be pruned.

    Args:
        inputs: What it is run on, in eval mode.
    """
    try:
        yield
    except OutputError:
        raise
    except FORWARD_ERRORS as error:
        raise ValueError(
            "the network must run in eval mode on inputs of shapes "
            f"{[tuple(tensor.shape) for tensor in inputs]}, it raised {_sentence(error)}; give "
            "example inputs in the order in which forward takes them, or wrap the network in a "
            "module that takes these"
        ) from error


def shortened(inputs: Inputs, pixels: int) -> Inputs:
    """Return a crop of images (N, C, H, W, ...).

    Args:
        inputs: Inputs of a network; those of other ranks are returned whole.
        pixels: Largest length of every axis of an image.
    """
    return tuple(
        tensor[(slice(None), slice(None), *[slice(pixels)] * (tensor.dim() - 2))].clone()
        if tensor.dim() >= 4
        else tensor
        for tensor in inputs
    )


def cast_network(network: nn.Module, precision: torch.dtype, spared: Collection[int] = ()) -> None:
    """Cast all tensors of a network, in place; complex ones stay complex, unlike by ``to``.

    Args:
        network: The network.
        precision: A floating-point type.
        spared: The ``id`` of every tensor that keeps its precision.
    """

    def applied(tensor: Tensor) -> Tensor:
        return tensor if id(tensor) in spared else cast(tensor, precision)

    network._apply(applied)  # type: ignore[no-untyped-call]


class Choices(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the numbers of which operations make integers or booleans, as ``argmax`` does."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operands: list[Tensor] = []

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, list | tuple) else [result]
        if any(isinstance(part, Tensor) and not is_real(part) for part in made):
            found = [part for part in args if isinstance(part, Tensor) and is_real(part)]
            self.operands += [part.clone() for part in found]
        return result


def precision_of(network: nn.Module) -> torch.dtype:
    """Return the type of a network's first floating-point parameter, or else buffer."""
    tensors = chain(network.parameters(), network.buffers())
    kinds = (tensor.dtype for tensor in tensors if is_real(tensor))
    return next(kinds, torch.float32).to_real()


def cast(tensor: Tensor, precision: torch.dtype) -> Tensor:
    """Return a tensor in a precision; complex numbers stay complex, and integers integers.

    Args:
        tensor: Any tensor.
        precision: A floating-point type.
    """
    if tensor.is_complex():
        return tensor.to(precision.to_complex())
    return tensor.to(precision) if tensor.is_floating_point() else tensor


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
