"""Which positions of which layers are coupled: they are kept or removed together.

Torch-Pruning's dependency graph says how a position in one layer maps to positions in the next.
Following every position of every layer's output through it, and uniting what it meets, gives the
units of pruning; a layer that is used twice, a concatenation or a flattening needs no rule of its
own. What the graph misjudges (it guesses at slicing and padding) the equivalence check finds.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fppmo_ray.distribution.space import IntArray
from fppmo_ray.pruning.layer_sides import LayerSide, is_depthwise, layer_sides
from fppmo_ray.pruning.slices import Axis, Side

_Port = tuple[Any, Callable[..., Any]]
"""A node of the graph, and the pruning function that stands for its input or its output."""

_Position = tuple[_Port, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerAxis:
    """A side of a layer, and what couples the positions along its tensor axes."""

    layer: str
    side: Side
    axes: tuple[Axis, ...]
    units: IntArray
    """``(length of the axes,)``: an arbitrary number per unit, -1 = no layer's output."""


class _Units:
    """Disjoint sets of positions (union-find with path halving)."""

    def __init__(self) -> None:
        self._numbers: dict[_Position, int] = {}
        self._parents: list[int] = []

    def __contains__(self, position: _Position) -> bool:
        return position in self._numbers

    def add(self, position: _Position) -> None:
        if position not in self._numbers:
            self._numbers[position] = len(self._parents)
            self._parents.append(len(self._parents))

    def find(self, position: _Position) -> int:
        """The unit of a position, -1 if nothing has reached it."""
        number = self._numbers.get(position, -1)
        while number >= 0 and self._parents[number] != number:
            self._parents[number] = self._parents[self._parents[number]]
            number = self._parents[number]
        return number

    def unite(self, first: _Position, second: _Position) -> None:
        self.add(first)
        self.add(second)
        self._parents[self.find(first)] = self.find(second)


def couple(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[list[LayerAxis], set[int]]:
    """Trace a network and say which positions of its layers go together.

    Args:
        model: The network in the mode to trace, every parameter requiring a gradient. Its
            batch-norm statistics change.
        inputs: What its forward takes.

    Returns:
        The sides of all layers in the model's order, and the units that cannot be pruned since
        they reach beyond a layer's width or into a layer that cannot be sliced.
    """
    graph = _dependency_graph(model, inputs)
    ports = dict(_ports(graph, model))
    units = _Units()
    broken = _propagate(ports, units)
    for partners in chain.from_iterable(_conv_partners(ports)):
        broken += _unite_all(partners, units)
    layer_axes = [_layer_axis(port, side, units) for port, side in ports.items() if side.axes]
    return layer_axes, _spread(layer_axes, {units.find(position) for position in broken})


def _dependency_graph(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    from torch_pruning import DependencyGraph

    training = model.training

    def forward(network: nn.Module, _: object) -> list[Tensor]:
        network.train(training)  # build_dependency has called eval()
        return [out for out in flat_tensors(network(*inputs)) if out.grad_fn is not None]

    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its guesses are checked, so its doubts are no news
        try:
            return DependencyGraph().build_dependency(
                model, inputs, forward_fn=forward, verbose=False
            )
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f"torch-pruning cannot follow the channels of {type(model).__name__}: "
                f"{type(error).__name__}: {error}; channel shuffles and other reshapes of five "
                "axes are beyond it"
            ) from error


def flat_tensors(output: Any) -> list[Tensor]:
    """All tensors of a network's output, however nested."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = output.values()
    if isinstance(output, Iterable) and not isinstance(output, str):
        return [tensor for part in output for tensor in flat_tensors(part)]
    return []


def _ports(graph: Any, model: nn.Module) -> Iterator[tuple[_Port, LayerSide]]:
    """The sides of every layer in the graph, in the model's order."""
    tensors = dict(chain(model.named_parameters(), model.named_buffers()))
    for name, module in chain(model.named_modules(), model.named_parameters()):
        node = graph.module2node.get(module)
        if node is None:
            continue
        pruner = graph.get_pruner_of_module(module)
        for side in layer_sides(module, name, tensors):
            reads = side.side == "input"
            yield (node, pruner.prune_in_channels if reads else pruner.prune_out_channels), side


def _propagate(ports: dict[_Port, LayerSide], units: _Units) -> list[_Position]:
    """Follow all outputs through the graph, uniting what they meet; returns what is broken."""
    limits = {port: side.length if side.sliceable else 0 for port, side in ports.items()}
    longest = max(limits.values())  # what lies between layers is never wider than they are
    broken: list[_Position] = []
    waiting: deque[tuple[_Port, list[int]]] = deque()
    for port, side in ports.items():
        if side.side == "output":
            waiting.append((port, list(range(side.length))))
            for position in range(side.length):
                units.add((port, position))
                if not side.sliceable:
                    broken.append((port, position))
    while waiting:
        port, positions = waiting.popleft()
        for target, pairs in _edges(port, positions):
            fresh = []
            for source_position, position in pairs:
                if not 0 <= position < limits.get(target, longest):
                    broken.append((port, source_position))
                    continue
                if (target, position) not in units:
                    fresh.append(position)
                units.unite((target, position), (port, source_position))
            if fresh:
                waiting.append((target, fresh))
    return broken


def _edges(port: _Port, positions: list[int]) -> Iterator[tuple[_Port, list[tuple[int, int]]]]:
    """Where positions lead to: per neighbour, pairs of a position here and the one there."""
    from torch_pruning._helpers import _HybridIndex

    node, prune = port
    for dependency in node.dependencies:
        if dependency.is_triggered_by(prune):
            indices = [_HybridIndex(idx=position, root_idx=position) for position in positions]
            for mapping in dependency.index_mapping:
                indices = indices if mapping is None else mapping(indices)
            pairs = [(index.root_idx, index.idx) for index in indices]
            yield (dependency.target, dependency.handler), pairs


def _conv_partners(ports: dict[_Port, LayerSide]) -> Iterator[list[list[_Position]]]:
    """Positions that a grouped convolution couples.

    A depthwise convolution loses a channel together with its filters. Any other keeps its number
    of groups, so each of them must lose the same: a unit holds the same offset in every one.
    """
    outputs = {id(side.module): port for port, side in ports.items() if side.side == "output"}
    for port, side in ports.items():
        conv = side.module
        if not isinstance(conv, _ConvNd) or conv.groups == 1 or not side.sliceable:
            continue
        if not is_depthwise(conv):
            period = side.length // conv.groups
            yield [
                [(port, offset + group * period) for group in range(conv.groups)]
                for offset in range(period)
            ]
        elif side.side == "input":
            output, filters = outputs[id(conv)], conv.out_channels // conv.in_channels
            yield [
                [(port, channel), *((output, channel * filters + i) for i in range(filters))]
                for channel in range(conv.in_channels)
            ]


def _unite_all(partners: list[_Position], units: _Units) -> list[_Position]:
    """Unite partners; where only some are a layer's output, those are broken and returned."""
    reached = [position for position in partners if position in units]
    for position in reached[1:]:
        units.unite(reached[0], position)
    return reached[:1] if len(reached) < len(partners) else []


def _layer_axis(port: _Port, side: LayerSide, units: _Units) -> LayerAxis:
    grouped_input = isinstance(side.module, _ConvNd) and side.side == "input"
    length = side.length // (side.module.groups if grouped_input else 1)
    numbers = np.array([units.find((port, position)) for position in range(length)], dtype=np.int64)
    return LayerAxis(layer=side.layer, side=side.side, axes=side.axes, units=numbers)


def _spread(layer_axes: list[LayerAxis], broken: set[int]) -> set[int]:
    """Units broken with these: where one filter of a layer is misjudged, its others are too."""
    while True:
        reached = set(broken)
        for part in layer_axes:
            if part.side == "output" and not reached.isdisjoint(part.units.tolist()):
                reached.update(part.units.tolist())
        if reached == broken:
            return broken
        broken = reached
