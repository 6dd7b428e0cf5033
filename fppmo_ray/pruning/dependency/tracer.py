"""A forward pass in which every operation records how channels depend on one another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as module_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from fppmo_ray.distribution.space import IntArray
from fppmo_ray.pruning.dependency.disjoint_sets import DisjointSets
from fppmo_ray.pruning.dependency.operation import Operation, Product, TracedTensor
from fppmo_ray.pruning.dependency.rules import apply_rule, operation_name
from fppmo_ray.pruning.extract import Axis
from fppmo_ray.pruning.network_io import flat_tensors


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


RETURNED = "the network returns it"
"""Why the channels of a network's outputs stay."""


@dataclass(eq=False)
class Dependencies:
    """What forward passes told of a network."""

    positions: dict[Axis, IntArray]
    """Of every axis longer than one of every parameter and buffer, ``(length,)``."""
    units: DisjointSets
    products: list[Product]
    """All that the last pass spent multiply-accumulates on, as far as it is followed."""
    memory: MemoryTracker = field(default_factory=MemoryTracker)
    """The memory of the last pass."""


def start(model: nn.Module) -> Dependencies:
    """Nothing is known yet: every position is a unit of its own."""
    units = DisjointSets()
    positions = {
        (name, axis): units.new(length)
        for name, tensor in chain(model.named_parameters(), model.named_buffers())
        for axis, length in enumerate(tensor.shape)
        if length > 1
    }
    return Dependencies(positions, units, [])


@torch.no_grad()
def follow(dependencies: Dependencies, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Run a network in the mode it is in, and add what it tells.

    Args:
        dependencies: Of this network; changes in place.
        model: On the CPU. Its batch-norm statistics change if it is in training mode.
        inputs: What its forward takes, with a batch of two or more.
    """
    dependencies.products.clear()
    dependencies.memory = MemoryTracker()
    tracer = _Tracer(dependencies)
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        channels = {
            axis: dependencies.positions[name, axis]
            for axis in range(tensor.dim())
            if (name, axis) in dependencies.positions
        }
        tracer.known[tensor] = TracedTensor(tuple(tensor.shape), channels, is_weight=True)
        dependencies.memory.overlook([tensor])
    images = [(tensor, TracedTensor(tuple(tensor.shape))) for tensor in inputs]
    dependencies.memory.note("image", images)
    with _noting_modules(tracer.modules), tracer:
        output = model(*inputs)
    for tensor in flat_tensors(output):
        for along in tracer.known.get(tensor, TracedTensor(())).channels.values():
            dependencies.units.keep(along, RETURNED)


class _Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation below autograd, where there are few kinds of them."""

    def __init__(self, dependencies: Dependencies) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dependencies = dependencies
        self.known: Any = WeakTensorKeyDictionary()
        self.modules: list[str] = [""]

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        arguments = self._arguments(func, args, kwargs)  # before it runs: it may change shapes
        result = func(*args, **kwargs)
        tensors = [tensor for tensor in _results(result) if isinstance(tensor, Tensor)]
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        op = Operation(
            name=operation_name(func),
            arguments=arguments,
            outputs=shapes,
            units=self.dependencies.units,
            module=self.modules[-1],
            products=self.dependencies.products,
        )
        read = op.tensors
        if any(tensor.channels for tensor in read):
            is_weight = all(tensor.is_weight for tensor in read)
            for tensor, channels in zip(tensors, apply_rule(func, op), strict=True):
                self.known[tensor] = TracedTensor(tuple(tensor.shape), channels, is_weight)
        made = [(tensor, self._followed(tensor)) for tensor in tensors]
        self.dependencies.memory.note(self.modules[-1], made)
        return result

    def _arguments(
        self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        declared = func._schema.arguments
        given = dict(zip((argument.name for argument in declared), args, strict=False)) | kwargs
        return {
            argument.name: self._followed(given[argument.name])
            if argument.name in given
            else argument.default_value
            for argument in declared
            if argument.name in given or argument.has_default_value()
        }

    def _followed(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.known.get(value) or TracedTensor(tuple(value.shape))
        if isinstance(value, list | tuple):
            return [self._followed(part) for part in value]
        return value


def _results(result: Any) -> Iterator[Any]:
    return iter(result) if isinstance(result, list | tuple) else iter([result])


@contextmanager
def _noting_modules(stack: list[str]) -> Iterator[None]:
    """Keep the class of the innermost module that runs at the end of the stack."""

    def enter(module: nn.Module, _: Any) -> None:
        stack.append(type(module).__name__)

    def leave(*_: Any) -> None:
        stack.pop()

    entering = module_hooks.register_module_forward_pre_hook(enter)
    leaving = module_hooks.register_module_forward_hook(leave)
    try:
        yield
    finally:
        entering.remove()
        leaving.remove()
