"""A CUDA graph on the CPU: a list of operations that a replay repeats on the same memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_Operation = tuple[Any, tuple[Any, ...], dict[str, Any], Any]


class Recording:
    """The operations of a capture; see ``torch.cuda.CUDAGraph``.

    Args:
        is_alive: Whether a living tensor of the device has a storage.
        on_replay: Called at every replay.
    """

    def __init__(self, is_alive: Callable[[int], bool], on_replay: Callable[[], None]) -> None:
        self._is_alive = is_alive
        self._on_replay = on_replay
        self._operations: list[_Operation] = []
        self._own: dict[int, Tensor] = {}
        """Tensors that were made during the capture, by storage."""
        self._read: set[int] = set()
        """Storages that the graph uses and that were there before."""
        self._before: list[tuple[Tensor, Tensor]] = []
        """Tensors that were changed during the capture, and their numbers before."""

    def record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation and take it down.

        Args:
            func: The operation.
            args: Its positional arguments, tensors on the CPU.
            kwargs: Its named arguments.
        """
        for tensor in _tensors((args, kwargs)):
            self._read.add(_storage(tensor))
        for tensor in written(func, args, kwargs):
            if _storage(tensor) not in self._own:
                self._before.append((tensor, tensor.clone()))
        out = func(*args, **kwargs)
        self._operations.append((func, args, kwargs, out))
        for tensor in _tensors(out):
            if _storage(tensor) not in self._read:
                self._own.setdefault(_storage(tensor), tensor)
        return out

    def undo(self) -> None:
        """Give back what was changed during the capture, which only records on a GPU."""
        for tensor, numbers in reversed(self._before):
            tensor.copy_(numbers)
        self._before = []
        self._read -= set(self._own)

    @torch.no_grad()
    def replay(self) -> None:
        """Repeat the operations on the same memory.

        Raises:
            RuntimeError: memory that the graph uses was freed since.
        """
        self._on_replay()
        if not all(map(self._is_alive, self._read)):
            raise RuntimeError("a graph is replayed that reads memory which was freed")
        for func, args, kwargs, out in self._operations:
            again = func(*args, **kwargs)
            if not _aliases(func):
                for new, old in zip(_tensors(again), _tensors(out), strict=True):
                    old.copy_(new)

    def reset(self) -> None:
        """Free the graph and its memory."""
        self._operations, self._own, self._read = [], {}, set()


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors that an operation changes.

    Args:
        func: The operation.
        args: Its positional arguments.
        kwargs: Its named arguments.
    """
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            yield from _tensors(given)
    if func is torch.ops.aten.native_batch_norm.default and args[5]:
        yield from _tensors(args[3:5])  # running statistics, which its schema does not tell


@cache
def _aliases(func: Any) -> bool:
    """Return whether an operation returns what it was given, whole or as a view."""
    return any(item.alias_info is not None for item in func._schema.returns)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key
