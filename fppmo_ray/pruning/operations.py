"""The operations that a network performs, and whether another one performs the same."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from fppmo_ray.pruning.costs import run_and_count
from fppmo_ray.pruning.extract import named_tensors
from fppmo_ray.pruning.noise import even_noise
from fppmo_ray.training.outputs import flat_tensors

_FEW = 64  # values of a constant that are compared
_NAMESPACES = ("aten", "prim", "prims", "torchvision")
_ASKING = ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero")
_OURS = ("torch.", "fppmo_ray.")
_VIEWS = ("view", "reshape", "_unsafe_view")
_SIZES = {**dict.fromkeys((*_VIEWS, "expand"), 1), "convolution": 8}
"""The argument of an operation that states lengths, or the number of groups."""


def is_real(tensor: Tensor) -> bool:
    """Return whether a tensor is no boolean and no integer; it may be complex."""
    return tensor.is_floating_point() or tensor.is_complex()


@dataclass(frozen=True, eq=False)
class _Source:
    """A tensor among the arguments of an operation."""

    origin: tuple[Any, ...]
    """Where it comes from: a weight, an input, the result of an operation, or its values."""
    shape: tuple[int, ...]
    """Its lengths."""


@dataclass(frozen=True, eq=False)
class _Call:
    """One operation."""

    name: str
    """Its name, with namespace and overload."""
    arguments: list[Any]
    """Its arguments; tensors are ``_Source``."""
    ranks: tuple[int, ...]
    """Number of axes of every result."""
    sources: list[_Source]
    """All tensors among the arguments."""


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the operations of a network, where their arguments come from, and precisions.

    Args:
        network: The network that runs within the block.
        inputs: What it runs on.
    """

    def __init__(self, network: nn.Module, inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[_Call] = []
        self.precisions: set[torch.dtype] = set()
        self.asks_in: str | None = None
        """Where the network's code first asks for a number of a tensor; None if it does not."""
        self._origins: Any = WeakTensorKeyDictionary()
        for place, tensor in enumerate(inputs):
            self._origins[tensor] = ("input", place)
        for name, tensor in named_tensors(network).items():
            self._origins[tensor] = ("weight", name)

    @property
    def names(self) -> list[str]:
        """Names of all operations, in order."""
        return [call.name for call in self.calls]

    def read_otherwise(self, usual: Collection[str]) -> set[str]:
        """Return the names of weights that other operations than usual ones read or change.

        Args:
            usual: Names of operations, with namespace and overload.
        """
        others = (call for call in self.calls if call.name not in usual)
        origins = (source.origin for call in others for source in call.sources)
        return {origin[1] for origin in origins if origin[0] == "weight"}

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self.asks_in is None and str(func).partition(".default")[0] in _ASKING:
            self.asks_in = _place()
        sources: list[_Source] = []
        arguments = [self._described(v, sources) for v in (*args, *sorted(kwargs.items()))]
        result = func(*args, **kwargs)
        made = result if isinstance(result, list | tuple) else [result]
        tensors = [tensor for tensor in made if isinstance(tensor, Tensor)]
        for place, tensor in enumerate(tensors):
            self._origins[tensor] = ("result", len(self.calls), place)
            if is_real(tensor):
                self.precisions.add(tensor.dtype.to_real())
        ranks = tuple(tensor.dim() for tensor in tensors)
        self.calls.append(_Call(str(func), arguments, ranks, sources))
        return result

    def _described(self, value: Any, sources: list[_Source]) -> Any:
        """An argument in which tensors are replaced by their sources, which are appended."""
        if isinstance(value, list | tuple):
            return [self._described(part, sources) for part in value]
        if not isinstance(value, Tensor):
            return value
        origin = self._origins.get(value)
        if origin is None:
            origin = ("constant", *_values(value))
        sources.append(_Source(origin, tuple(value.shape)))
        return sources[-1]


def _place() -> str:
    """Class, file and line of the nearest caller outside torch and this package."""
    frame = sys._getframe(2)
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(_OURS):
        frame = frame.f_back
    owner = frame.f_locals.get("self")
    module = f"{type(owner).__name__}, " if isinstance(owner, nn.Module) else ""
    return f"{module}{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def _values(tensor: Tensor) -> list[Any]:
    """The first values of a tensor that no operation has made, such as a number in the code."""
    if isinstance(tensor, FakeTensor):
        return [None]
    with _disable_current_modes():
        found: list[Any] = tensor.detach().flatten()[:_FEW].tolist()
    return [tuple(tensor.shape), *found]


@torch.no_grad()
def perform(network: nn.Module, inputs: Sequence[Tensor]) -> tuple[Operations, int]:
    """Run a network; return its operations and torch's count of their multiply-accumulates.

    Args:
        network: The network.
        inputs: Arguments of its forward.
    """

    def run(*given: Tensor) -> Operations:
        with even_noise(), Operations(network, given) as operations:
            flat_tensors(network(*given))  # which refuses outputs that are no tensors
        found: Operations = operations
        return found

    return run_and_count(network, tuple(inputs), run)


def are_alike(one: Operations, other: Operations | None) -> bool:
    """Return whether two networks perform the same operations but for the widths of tensors.

    Each operation has the same name, reads the same weights and earlier results, and is given the
    same numbers; sizes may differ where they are the length of the same axis. An operation that
    torch does not know may decide by widths within, so nothing with one is alike.

    Args:
        one: The operations of a network.
        other: Those of the same network with other widths; None: they are unknown.
    """
    if other is None or len(one.calls) != len(other.calls):
        return False
    return all(map(_same, one.calls, other.calls))


def _same(one: _Call, other: _Call) -> bool:
    if (one.name, one.ranks) != (other.name, other.ranks):
        return False
    if not one.name.startswith(_NAMESPACES) or len(one.arguments) != len(other.arguments):
        return False
    name = one.name.split(".")[1]
    lengths = {
        pair
        for p, q in zip(one.sources, other.sources, strict=False)
        for pair in zip(p.shape, q.shape, strict=False)
    }
    unlike = sum(
        _unlike(p, q, lengths if place == _SIZES.get(name) else set())
        for place, (p, q) in enumerate(zip(one.arguments, other.arguments, strict=True))
    )
    # The number of elements gives the last length, if it is not left open already.
    return unlike == 0 or (name in _VIEWS and unlike == 1 and -1 not in one.arguments[1])


def _unlike(one: Any, other: Any, lengths: set[tuple[int, int]]) -> float:
    """How many sizes differ and are not lengths of the same axes; infinite for all else."""
    if isinstance(one, list) and isinstance(other, list):
        if len(one) != len(other):
            return inf
        return sum(_unlike(p, q, lengths) for p, q in zip(one, other, strict=True))
    if isinstance(one, _Source) and isinstance(other, _Source):
        same = one.origin == other.origin and len(one.shape) == len(other.shape)
        return 0 if same else inf
    if type(one) is not type(other):
        return inf
    if one == other:
        return 0
    if type(one) is int and lengths:
        return 0 if (one, other) in lengths else 1
    return inf
