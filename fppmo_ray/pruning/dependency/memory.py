"""Which tensors of a forward pass hold memory of their own, and which are there at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fppmo_ray.pruning.dependency.operation import TracedTensor


@dataclass(frozen=True, eq=False)
class Allocation:
    """A tensor that was given memory; views of it, and what is written into it, are not."""

    module: str
    """Class of the module that computes it."""
    integer_bytes: int | None
    """Of an element; None of floating-point numbers, whose precision is the network's."""
    tensor: TracedTensor


class MemoryTracker:
    """The memory of one pass. Tensors are watched, never held, so that they end when they would.

    ``allocations`` are in the order in which they were made; ``moments`` are the sets of them, by
    index, that were there after an operation, while what it read was there too.
    """

    def __init__(self) -> None:
        self.allocations: list[Allocation] = []
        self.moments: set[frozenset[int]] = set()
        # A storage's address is not used again while a weak reference to it is there.
        self._seen: set[int] = set()
        self._living: dict[int, StorageWeakRef] = {}
        self._ended: list[StorageWeakRef] = []

    def overlook(self, tensors: Sequence[Tensor]) -> None:
        """Do not count these: weights."""
        for tensor in tensors:
            reference = _reference(tensor)
            self._ended.append(reference)
            self._seen.add(reference.cdata)

    def note(self, module: str, tensors: Sequence[tuple[Tensor, TracedTensor]]) -> None:
        """Take in the results of an operation, or the network's inputs."""
        for tensor, followed in tensors:
            reference = _reference(tensor)
            if tensor.numel() and reference.cdata not in self._seen:
                self._seen.add(reference.cdata)
                self._living[len(self.allocations)] = reference
                size = None if tensor.is_floating_point() else tensor.element_size()
                self.allocations.append(Allocation(module, size, followed))
        for index, reference in list(self._living.items()):
            if reference.expired():  # type: ignore[no-untyped-call]
                self._ended.append(self._living.pop(index))
        self.moments.add(frozenset(self._living))

    def largest_moments(self) -> list[tuple[int, ...]]:
        """Those that are part of no other, in order."""
        found: list[frozenset[int]] = []
        for moment in sorted(self.moments, key=lambda moment: (-len(moment), sorted(moment))):
            if not any(moment <= other for other in found):
                found.append(moment)
        return sorted(tuple(sorted(moment)) for moment in found)


def _reference(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
