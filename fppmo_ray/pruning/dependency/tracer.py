"""A forward pass in which every operation records how channels depend on one another."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as module_hooks
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from fppmo_ray.distribution.space import IntArray
from fppmo_ray.pruning.dependency.disjoint_sets import DisjointSets
from fppmo_ray.pruning.dependency.operation import Operation, Product, TracedTensor, traced_tensors
from fppmo_ray.pruning.dependency.rules import apply_rule, operation_name
from fppmo_ray.pruning.dependency.sizes import (
    SizeMode,
    layer_numbers,
    module_numbers,
    relate_compared,
    tracked_numbers,
)
from fppmo_ray.pruning.dependency.widths import Length, WidthLog
from fppmo_ray.pruning.extract import Axis, NumberKey
from fppmo_ray.pruning.network_io import FORWARD_ERRORS
from fppmo_ray.training.outputs import flat_tensors

RETURNED = "the network returns it"
"""Why the channels of a network's outputs stay."""
_CAUGHT = "an operation on it fails, and the network's code catches that"


@dataclass(frozen=True, eq=False)
class Allocation:
    """A tensor with memory of its own; views and in-place results are not allocations."""

    module: str
    """Class name of the module that computes it."""
    integer_bytes: int | None
    """Bytes per element of integers; None for floating point, whose precision may change."""
    tensor: TracedTensor
    """Its shape and tracked positions."""


class MemoryTracker:
    """Records which tensors of one forward pass own memory, and which are alive together.

    It holds weak references only, so that tensors are freed when they would be without it.
    ``allocations`` are in the order in which they were made. Each of ``moments`` is the set of
    allocations, by index, that were alive after one operation, including what it read.
    """

    def __init__(self) -> None:
        self.allocations: list[Allocation] = []
        self.moments: set[frozenset[int]] = set()
        self._seen: set[int] = set()
        self._alive: dict[int, StorageWeakRef] = {}
        # The address of a freed storage is not used again while a weak reference to it exists.
        self._freed: list[StorageWeakRef] = []

    def ignore(self, tensors: Sequence[Tensor]) -> None:
        """Do not count the memory of these tensors, which are weights."""
        for tensor in tensors:
            reference = _reference(tensor)
            self._freed.append(reference)
            self._seen.add(reference.cdata)

    def record(self, module: str, tensors: Sequence[tuple[Tensor, TracedTensor]]) -> None:
        """Record the results of an operation, or the network's inputs.

        Args:
            module: Class name of the module that computes them.
            tensors: Every result with its traced counterpart.
        """
        for tensor, traced in tensors:
            reference = _reference(tensor)
            if tensor.numel() and reference.cdata not in self._seen:
                self._seen.add(reference.cdata)
                self._alive[len(self.allocations)] = reference
                size = None if tensor.is_floating_point() else tensor.element_size()
                self.allocations.append(Allocation(module, size, traced))
        for index, reference in list(self._alive.items()):
            if reference.expired():  # type: ignore[no-untyped-call]
                self._freed.append(self._alive.pop(index))
        self.moments.add(frozenset(self._alive))

    def largest_moments(self) -> list[tuple[int, ...]]:
        """Return the moments that are not a subset of another moment, sorted."""
        found: list[frozenset[int]] = []
        for moment in sorted(self.moments, key=lambda moment: (-len(moment), sorted(moment))):
            if not any(moment <= other for other in found):
                found.append(moment)
        return sorted(tuple(sorted(moment)) for moment in found)


def _reference(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


@dataclass(eq=False)
class Dependencies:
    """The coupling of a network's channels that forward passes have shown so far."""

    positions: dict[Axis, IntArray]
    """Positions ``(length,)`` along every axis of a parameter or buffer longer than one."""
    units: DisjointSets
    """The units that these positions form."""
    products: list[Product]
    """The products of the last pass that read a tracked tensor."""
    numbers: dict[NumberKey, Length]
    """Integers that modules keep, each with positions of its own or of the weight that it sizes."""
    made: dict[tuple[str, int], list[IntArray]] = field(default_factory=lambda: defaultdict(list))
    """Positions along the axes of all tensors that a module's own code made, by the module's name
    and the length of the axis."""
    log: WidthLog = field(default_factory=WidthLog)
    """What the network's code did with sizes and numbers in the last pass, and read in any."""
    memory: MemoryTracker = field(default_factory=MemoryTracker)
    """The allocations of the last pass."""


def independent(model: nn.Module) -> Dependencies:
    """Return dependencies in which every position is a unit of its own."""
    units = DisjointSets()
    positions = {
        (name, axis): units.new(length)
        for name, tensor in chain(model.named_parameters(), model.named_buffers())
        for axis, length in enumerate(tensor.shape)
        if length > 1
    }
    return Dependencies(positions, units, [], _numbers(model, positions, units))


def _numbers(
    model: nn.Module, positions: dict[Axis, IntArray], units: DisjointSets
) -> dict[NumberKey, Length]:
    """The integers that modules keep, those of torch's layers as lengths of their weights."""
    values = module_numbers(model)
    fresh = np.split(units.new(sum(values.values())), np.cumsum(list(values.values()))[:-1])
    found = {key: Length(own, is_number=True) for key, own in zip(values, fresh, strict=False)}
    for name, layer in model.named_modules():
        tensor = "running_mean" if getattr(layer, "weight", None) is None else "weight"
        full_name = f"{name}.{tensor}" if name else tensor
        axes = {axis: along for (owner, axis), along in positions.items() if owner == full_name}
        for attribute, along in layer_numbers(layer, axes).items():
            key = (name, attribute, None)
            if key in found and values[key] == len(along):
                found[key] = Length(along)
        if isinstance(layer, _ConvNd):
            found.pop((name, "groups", None), None)  # extraction sets it
    return found


@torch.no_grad()
def record_pass(dependencies: Dependencies, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Run a network in its present mode and add the dependencies of all operations, in place.

    Args:
        dependencies: Of this network, from ``independent`` and earlier passes.
        model: The network on the CPU. Batch-norm statistics change in training mode.
        inputs: Arguments of its forward, with a batch of two or more.

    Raises:
        RuleError: a rule failed, which is a bug in this package.
    """
    dependencies.products.clear()
    dependencies.log.decisions.clear()
    dependencies.memory = MemoryTracker()
    tracer = _Tracer(dependencies)
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        channels = {
            axis: dependencies.positions[name, axis]
            for axis in range(tensor.dim())
            if (name, axis) in dependencies.positions
        }
        tracer.traced[tensor] = TracedTensor(tuple(tensor.shape), channels, is_weight=True)
        dependencies.memory.ignore([tensor])
    images = [(tensor, TracedTensor(tuple(tensor.shape))) for tensor in inputs]
    dependencies.memory.record("image", images)
    sizes = SizeMode(tracer.traced, dependencies.units, dependencies.log)
    numbers = tracked_numbers(model, dependencies.numbers, dependencies.log)
    with _module_stack(model, tracer.modules), numbers, sizes, tracer:
        output = model(*inputs)
    relate_compared(dependencies.log, dependencies.units)
    for tensor in flat_tensors(output):
        for along in tracer.traced.get(tensor, TracedTensor(())).channels.values():
            dependencies.units.keep(along, RETURNED)


class _Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Intercepts all operations below autograd, where composite ones are already decomposed."""

    def __init__(self, dependencies: Dependencies) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dependencies = dependencies
        self.traced: Any = WeakTensorKeyDictionary()
        self.modules: list[tuple[str, str]] = [("", "")]

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        arguments = self._arguments(func, args, kwargs)  # before it runs: it may change shapes
        try:
            result = func(*args, **kwargs)
        except FORWARD_ERRORS:
            # If the network's code catches it, another outcome would make another network.
            for operand in traced_tensors(list(arguments.values())):
                for along in operand.channels.values():
                    self.dependencies.units.keep(along, _CAUGHT)
            raise
        tensors = [tensor for tensor in _results(result) if isinstance(tensor, Tensor)]
        op = Operation(
            name=operation_name(func),
            arguments=arguments,
            outputs=tuple(tuple(tensor.shape) for tensor in tensors),
            units=self.dependencies.units,
            module=self.modules[-1][1],
            products=self.dependencies.products,
        )
        read = op.tensors
        if any(tensor.channels for tensor in read):
            is_weight = all(tensor.is_weight for tensor in read)
            for tensor, channels in zip(tensors, apply_rule(func, op), strict=True):
                self.traced[tensor] = TracedTensor(tuple(tensor.shape), channels, is_weight)
                for along in channels.values():
                    self.dependencies.made[self.modules[-1][0], len(along)].append(along)
        results = [(tensor, self._traced(tensor)) for tensor in tensors]
        self.dependencies.memory.record(self.modules[-1][1], results)
        return result

    def _arguments(
        self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """All arguments by schema name, with defaults filled in and tensors traced."""
        declared = func._schema.arguments
        given = dict(zip((argument.name for argument in declared), args, strict=False)) | kwargs
        return {
            argument.name: self._traced(given[argument.name])
            if argument.name in given
            else argument.default_value
            for argument in declared
            if argument.name in given or argument.has_default_value()
        }

    def _traced(self, value: Any) -> Any:
        """Replace tensors, also those in lists, by their traced counterparts."""
        if isinstance(value, Tensor):
            return self.traced.get(value) or TracedTensor(tuple(value.shape))
        if isinstance(value, list | tuple):
            return [self._traced(part) for part in value]
        return value


def _results(result: Any) -> Iterator[Any]:
    return iter(result) if isinstance(result, list | tuple) else iter([result])


@contextmanager
def _module_stack(model: nn.Module, stack: list[tuple[str, str]]) -> Iterator[None]:
    """Keep names and classes of the running modules on the stack, the innermost last."""
    names = {id(module): name for name, module in model.named_modules()}

    def enter(module: nn.Module, _: Any) -> None:
        stack.append((names.get(id(module), ""), type(module).__name__))

    def leave(*_: Any) -> None:
        stack.pop()

    entering = module_hooks.register_module_forward_pre_hook(enter)
    leaving = module_hooks.register_module_forward_hook(leave)
    try:
        yield
    finally:
        entering.remove()
        leaving.remove()
