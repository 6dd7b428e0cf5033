"""The tensors that a network returns, alone or nested."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from numbers import Number
from typing import Any

from torch import Tensor

_RETURNS = "the network must return tensors, alone or nested in tuples, lists, dicts or dataclasses"
_WRAP = "wrap it in a module that takes the tensors out"


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
        raise OutputError(f"{_RETURNS}, got a part of class {type(output).__name__}; {_WRAP}")
    for part in output:
        yield from _parts(part)
