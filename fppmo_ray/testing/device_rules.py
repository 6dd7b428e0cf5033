"""The rules of CUDA that the pretended GPU keeps: what it refuses, and what it counts."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

_COPIES = {"aten.copy_.default", "aten._to_copy.default"}
_INDEXING = {"aten.index.Tensor", "aten.index_put_.default", "aten._index_put_impl_.default"}
_READS = {
    *("aten._local_scalar_dense.default", "aten.nonzero.default", "aten.masked_select.default"),
    *("aten.equal.default", "aten._unique2.default", "aten.repeat_interleave.Tensor"),
    *("aten._linalg_check_errors.default",),
}
"""Operations whose result or its shape depends on values, so that the host waits for them."""


class HostTraffic:
    """The launches, waits and copies of the host, counted.

    Args:
        name: The device's type.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.is_capturing = False
        """Whether a graph is captured, so that waits and copies of pageable memory raise."""
        self.waits: Counter[str] = Counter()
        """How often the host waited to read the device's memory, by place in the project."""
        self.pageable_copies: Counter[str] = Counter()
        """How often memory that is not pinned was copied to the device, by place."""
        self.launches: Counter[str] = Counter()
        """How often each operation was launched; views are not counted."""
        self.pinned: weakref.WeakSet[Tensor] = weakref.WeakSet()
        """Tensors of the host in pinned memory."""

    def wait(self, reason: str) -> None:
        """Count a wait.

        Raises:
            RuntimeError: a graph is being captured.
        """
        if self.is_capturing:
            raise RuntimeError(f"operation not permitted when stream is capturing: {reason}")
        self.waits[f"{_place()} {reason}"] += 1

    def is_pinned(self, tensor: Tensor) -> bool:
        """Return whether a tensor of the host is in pinned memory."""
        own = tensor.untyped_storage().data_ptr()
        return any(known.untyped_storage().data_ptr() == own for known in self.pinned)

    def check(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        on_device: Sequence[Tensor],
        on_host: Sequence[Tensor],
        to_device: bool,
    ) -> None:
        """Count an operation, or refuse it.

        Args:
            func: The operation.
            args: Its positional arguments.
            kwargs: Its named arguments.
            on_device: The tensors of the device among them.
            on_host: The other tensors.
            to_device: Whether the result is on the device.

        Raises:
            RuntimeError: it mixes devices, or waits during a capture.
        """
        name = str(func)
        if not _is_view(func):
            self.launches[name] += 1
        if name in _COPIES:
            is_asynchronous = bool(kwargs.get("non_blocking", len(args) > 2 and args[2]))
            source, target_on_device = args[0], to_device
            if name == "aten.copy_.default":
                source, target_on_device = args[1], self._is_here(args[0])
            from_device = self._is_here(source)
            if from_device and not target_on_device:
                self.wait("copy to the CPU")
            elif target_on_device and not from_device:
                self._copy_up(source, is_asynchronous)
            return
        if name in _READS and on_device:
            self.wait(name)
        mixed = [tensor for tensor in on_host if tensor.dim()] if on_device else []
        if mixed and name in _INDEXING:
            self._copy_up(mixed[0], is_asynchronous=False)
        elif mixed:
            shapes = [tuple(tensor.shape) for tensor in (*on_device, *mixed)]
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{self._name}:0 and cpu! ({name}, shapes {shapes})"
            )
        if name in _INDEXING and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        ):
            self.wait("index by a mask")

    def _is_here(self, tensor: Tensor) -> bool:
        return tensor.device.type == self._name

    def _copy_up(self, source: Tensor, is_asynchronous: bool) -> None:
        if is_asynchronous and self.is_pinned(source):
            return
        if self.is_capturing:
            raise RuntimeError("operation not permitted when stream is capturing: pageable copy")
        self.pageable_copies[_place()] += 1


class DeviceMemory:
    """The memory of a process's tensors on the device.

    Args:
        limit: Bytes that the process may allocate.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.allocated = self.peak = 0
        self.too_much: str | None = None
        """The error of an allocation that there was no room for, not raised yet."""
        self._storages: dict[int, list[int]] = {}
        """Bytes and number of living tensors of each storage."""

    def is_alive(self, storage: int) -> bool:
        """Return whether a living tensor has a storage."""
        return storage in self._storages

    def hold(self, storage: torch.UntypedStorage) -> Held:
        """Count a storage until the object that this returns is gone.

        Args:
            storage: The storage of a new tensor.

        Raises:
            torch.OutOfMemoryError: the process has no room for it. In a backward pass, the next
                operation after it raises instead.
        """
        key, size = storage._cdata, storage.nbytes()
        known = self._storages.get(key)
        if known is None:
            if self.allocated + size > self.limit:
                self.too_much = (
                    f"CUDA out of memory. Tried to allocate {size} bytes, {self.allocated} of "
                    f"{self.limit} are in use"
                )
                self.raise_if_too_much()
            known = self._storages[key] = [size, 0]
            self.allocated += size
            self.peak = max(self.peak, self.allocated)
        known[1] += 1
        return Held(partial(self._free, key))

    def raise_if_too_much(self) -> None:
        """Raise for memory that there was no room for; within a backward pass, at its end.

        Torch's backward pass ends the process if an operation of a device in Python raises.
        """
        if self.too_much is not None and torch._C._current_graph_task_id() == -1:
            message, self.too_much = self.too_much, None
            raise torch.OutOfMemoryError(message)

    def _free(self, key: int) -> None:
        known = self._storages[key]
        known[1] -= 1
        if not known[1]:
            del self._storages[key]
            self.allocated -= known[0]


class Held:
    """The memory of a tensor; torch cannot exchange the data of tensors with weak references."""

    def __init__(self, free: Callable[[], None]) -> None:
        self._free = free

    def __deepcopy__(self, memo: object) -> Held:
        """Return what holds nothing: of a copied tensor torch copies the numbers by itself."""
        return Held(lambda: None)

    def __del__(self) -> None:
        self._free()


def _place() -> str:
    """Return file, line and function of this package that the present operation comes from."""
    frame = sys._getframe(2)
    while frame.f_back is not None:
        code = frame.f_code
        if "fppmo_ray" in code.co_filename and "/testing/" not in code.co_filename:
            file = code.co_filename.rpartition("fppmo_ray/")[2]
            return f"{file}:{frame.f_lineno} {code.co_name}"
        frame = frame.f_back
    return "elsewhere"


@cache
def _is_view(func: Any) -> bool:
    return any(
        item.alias_info is not None and not item.alias_info.is_write
        for item in func._schema.returns
    )
