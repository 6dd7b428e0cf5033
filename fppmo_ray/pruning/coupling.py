"""Coupled axes of a network, and the channel groups that they form."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
from torch import nn

from fppmo_ray.distribution.space import IntArray
from fppmo_ray.pruning.conditions import (
    Conditions,
    Inputs,
    conditions_on,
    find_conditions,
    must_run,
    precision_of,
)
from fppmo_ray.pruning.copying import WorkingCopy
from fppmo_ray.pruning.costs import CoupledCost, CoupledTensor, run_and_count, unfused
from fppmo_ray.pruning.dependency import (
    FIXED,
    RETURNED,
    Allocation,
    Dependencies,
    DisjointSets,
    Product,
    RuleError,
    independent,
    record_pass,
)
from fppmo_ray.pruning.dependency.widths import Decision, with_units
from fppmo_ray.pruning.extract import Axis, NumberKey, Side, layer_of, named_tensors
from fppmo_ray.pruning.shape_only import ShapeOnly, worthwhile


@dataclass(frozen=True, kw_only=True, eq=False)
class CoupledAxis:
    """An axis of a parameter or buffer, with the unit of every position along it."""

    axis: Axis
    """Name of the tensor, and its axis."""
    side: Side
    """Role of the axis in its layer."""
    units: IntArray
    """The unit of every position, ``(length of the axis,)``."""
    is_convolution: bool
    """Whether the tensor has spatial axes."""

    @property
    def layer(self) -> str:
        """Name of the layer that holds the tensor, or of a tensor of the network itself."""
        return layer_of(self.axis[0]) or self.axis[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class Coupling:
    """The coupled axes of a network, with its costs and activations."""

    axes: list[CoupledAxis]
    """All axes in the order of the model's parameters and buffers."""
    kept: dict[int, str]
    """Units that must stay, with the reason."""
    doubted: dict[int, str]
    """Units that can be removed only if the network's code adapts to smaller widths, with the
    reason. Units with the same reason usually all can or all cannot."""
    costs: list[CoupledCost]
    """Costs in eval mode, in the order of execution."""
    constant_macs: int
    """Multiply-accumulates for one image that no width changes."""
    tensors: list[CoupledTensor]
    """Tensors that the inference of one image allocates."""
    moments: list[tuple[int, ...]]
    """Sets of these tensors, by index, that are alive together."""
    num_units: int
    """All units are smaller than this."""
    decisions: list[Decision]
    """Comparisons of widths by the network's code in eval mode; their lengths hold units."""
    numbers: dict[NumberKey, IntArray]
    """Units of every number of a module that its code uses as a width."""
    guesses: dict[NumberKey, IntArray]
    """The same of numbers that no code has read, but of whose length all axes are one."""
    conditions: Conditions
    """The inputs and modes in which the network was followed."""

    def remark_on_choices(self, place: str | None) -> str | None:
        """Return what a user must know of layers that may run for other images; None if nothing.

        Args:
            place: Where the network's code asks for a value, by which it may choose; None: nowhere.
        """
        sides: defaultdict[str, set[Side]] = defaultdict(set)
        for part in self.axes:
            sides[part.layer].add(part.side)
        matrices = {part.layer: None for part in self.axes if part.axis[1] == 1}
        idle = [layer for layer in matrices if sides[layer] == {"along"}]
        if place is None or not idle:
            return None
        return (
            f"the network's code asks for values of tensors ({place}), and "
            f"{', '.join(idle[:_NAMED])} did not run; name what may run for other images, and the "
            "layers before it, in `ignore`"
        )


_NAMED = 4
_BOTH_WAYS = "a tied weight has its filters as outputs in one place and reads them in another"


def couple(copy: WorkingCopy, examples: Inputs) -> Coupling:
    """Trace the dependencies of a network's channels in training and in eval mode.

    A large network is followed without numbers if it runs so.

    Args:
        copy: Of the network. It is left in eval mode, its batch-norm statistics change.
        examples: Arguments of its forward, with a batch axis.

    Raises:
        ValueError: the network does not run on such inputs.
    """
    model = copy.original
    if worthwhile(model, examples):
        shapes = ShapeOnly(model)
        with suppress(RuleError):
            found = shapes.attempt(lambda *given: _couple(shapes.network, given), examples)
            # What does not run without numbers may run with them.
            ran = found is not None and found.conditions.training_error is None
            if found is not None and ran and (batch := found.conditions.batch) is not None:
                conditions = conditions_on(examples, precision_of(model), batch, None)
                return replace(found, conditions=conditions)
    return _couple(copy.network, examples)


def _couple(model: nn.Module, examples: Inputs) -> Coupling:
    dependencies = independent(model)

    def follow(inputs: Inputs) -> None:
        nonlocal dependencies
        dependencies = independent(model)  # without the part of a pass that failed
        record_pass(dependencies, model, inputs)

    # The training pass covers heads that only train. Costs and memory are those of the eval pass,
    # which comes last, for one image.
    with unfused(model):
        conditions = find_conditions(model, examples, follow)
    model.eval()
    with must_run(conditions.image):
        _, macs = run_and_count(
            model, conditions.image, lambda *image: record_pass(dependencies, model, image)
        )
    for along in dependencies.positions.values():
        if dependencies.units.is_output(along) and dependencies.units.is_input(along):
            dependencies.units.keep(along, _BOTH_WAYS)
    costs = _costs(dependencies)
    tensors = named_tensors(model)
    units, memory = dependencies.units, dependencies.memory
    used, guessed = _numbers(dependencies)
    return Coupling(
        axes=[
            CoupledAxis(
                axis=axis,
                side=_side(units, along),
                units=units.roots(along),
                is_convolution=tensors[axis[0]].dim() > 2,
            )
            for axis, along in dependencies.positions.items()
        ],
        kept=units.kept(),
        doubted=units.doubted(),
        costs=costs,
        constant_macs=macs - sum(cost.macs for cost in costs),
        tensors=[_coupled_tensor(units, allocation) for allocation in memory.allocations],
        moments=memory.largest_moments(),
        num_units=len(units),
        decisions=[
            replace(
                decision,
                left=with_units(decision.left, units.roots),
                right=with_units(decision.right, units.roots),
            )
            for decision in dependencies.log.decisions
        ],
        numbers=used,
        guesses=guessed,
        conditions=conditions,
    )


def _numbers(
    dependencies: Dependencies,
) -> tuple[dict[NumberKey, IntArray], dict[NumberKey, IntArray]]:
    """The units of numbers that the code used as widths, and of those that may be widths."""
    units, read = dependencies.units, dependencies.log.read
    used: dict[NumberKey, IntArray] = {}
    guessed: dict[NumberKey, IntArray] = {}
    for key, length in dependencies.numbers.items():
        if not length.is_number:
            continue
        if int(length.positions[0]) in read:
            used[key] = units.roots(length.positions)
            continue
        axes = [units.roots(along) for along in dependencies.made[key[0], len(length.positions)]]
        if axes and all(np.array_equal(axes[0], axis) for axis in axes):
            guessed[key] = axes[0]
    return used, guessed


def _coupled_tensor(units: DisjointSets, allocation: Allocation) -> CoupledTensor:
    tracked = allocation.tensor.channels.items()
    return CoupledTensor(
        module=allocation.module,
        integer_bytes=allocation.integer_bytes,
        shape=allocation.tensor.shape,
        units={axis: units.roots(positions) for axis, positions in tracked},
    )


def _side(units: DisjointSets, positions: IntArray) -> Side:
    if units.is_output(positions):
        return "output"
    return "input" if units.is_input(positions) else "along"


def _costs(dependencies: Dependencies) -> list[CoupledCost]:
    """Costs of all layers; a layer that is used twice has the sum of both uses."""
    layers: dict[int, str] = {}
    for (tensor, _), along in dependencies.positions.items():
        layers |= dict.fromkeys(along.tolist(), layer_of(tensor) or tensor)
    found: dict[tuple[str, bytes, bytes], CoupledCost] = {}
    for product in dependencies.products:
        layer = _layer(product, layers)
        if layer is None:
            continue
        key = (layer, product.output.tobytes(), product.input.tobytes())
        before = found[key].macs if key in found else 0
        found[key] = CoupledCost(
            layer=layer,
            macs=before + product.macs,
            out_units=dependencies.units.roots(product.output),
            in_units=dependencies.units.roots(product.input),
        )
    return list(found.values())


def _layer(product: Product, layers: Mapping[int, str]) -> str | None:
    """The layer that owns the weight, or the class of the module that multiplies activations.

    None for a weight with one output and one input channel, whose cost is constant.
    """
    if not product.by_weight:
        return product.module
    both = np.concatenate([product.output, product.input])
    tracked = both[both != FIXED]
    return layers[int(tracked[0])] if len(tracked) else None


@dataclass(frozen=True, eq=False)
class CandidateGroup:
    """Units with equally many positions on the same axes: a channel group if it proves exact."""

    layer: str
    """The first layer that computes these channels."""
    num_earlier: int
    """Number of candidates before it with the same first layer."""
    units: list[int]
    """Its units; each becomes one filter of the group."""
    doubt: str | None
    """The reason why its removal is doubtful, None if it is not."""
    floor: int = 1
    """Fewest filters with which the network's code decides as in the dense network."""

    @property
    def name(self) -> str:
        """Name of the group: its first layer, numbered from the layer's second group on."""
        return f"{self.layer} ({self.num_earlier + 1})" if self.num_earlier else self.layer


def candidate_groups(
    coupling: Coupling, ignored: Collection[str]
) -> tuple[list[CandidateGroup], dict[str, str]]:
    """Find the groups of two or more filters that some layer reads.

    Args:
        coupling: The coupled axes of the network.
        ignored: Names of modules whose filters must all stay.

    Returns:
        The candidates, and the groups that must stay: first layer to reason.
    """
    groups = _alike_outputs(coupling)
    places = _places(coupling, [members[0] for members in groups])
    candidates: list[CandidateGroup] = []
    unsound: dict[str, str] = {}
    for members in groups:
        parts = [coupling.axes[index] for index in places[members[0]]]
        makers = [part.layer for part in parts if part.side == "output"]
        is_read = any(part.side == "input" for part in parts)
        of_filters = any(part.side == "output" and part.is_convolution for part in parts)
        if len(members) < 2 or any(_is_within(maker, ignored) for maker in makers):
            continue
        for kept, alike in _by_reason(members, coupling.kept).items():
            if kept is not None and (is_read or (of_filters and kept != RETURNED)):
                unsound[makers[0]] = kept
            elif kept is None and is_read and len(alike) > 1:
                num_earlier = sum(makers[0] == candidate.layer for candidate in candidates)
                doubt = coupling.doubted.get(alike[0])
                candidates.append(CandidateGroup(makers[0], num_earlier, alike, doubt))
    return candidates, unsound


def _alike_outputs(coupling: Coupling) -> list[list[int]]:
    """Output channels that have equally many positions on the same axes: they form a group."""
    kinds = np.zeros(coupling.num_units, dtype=np.int64)  # equal for units alike on all axes so far
    num_kinds = 1
    for part in coupling.axes:
        units, counts = np.unique(part.units, return_counts=True)
        _, kind = np.unique(kinds[units] * (counts.max() + 1) + counts, return_inverse=True)
        kinds[units] = num_kinds + kind
        num_kinds += int(kind.max()) + 1
    outputs = [part.units for part in coupling.axes if part.side == "output"]
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for unit in dict.fromkeys(np.concatenate([np.zeros(0, dtype=np.int64), *outputs]).tolist()):
        groups[int(kinds[unit])].append(unit)
    return list(groups.values())


def _places(coupling: Coupling, units: Sequence[int]) -> defaultdict[int, list[int]]:
    """For each of some units, the axes on which it has positions."""
    is_wanted = np.zeros(coupling.num_units, dtype=np.bool_)
    is_wanted[list(units)] = True
    places: defaultdict[int, list[int]] = defaultdict(list)
    for index, part in enumerate(coupling.axes):
        for unit in np.unique(part.units[is_wanted[part.units]]).tolist():
            places[unit].append(index)
    return places


def _by_reason(members: Iterable[int], kept: Mapping[int, str]) -> dict[str | None, list[int]]:
    """Units by the reason for which they must stay; None where there is none."""
    by_reason: dict[str | None, list[int]] = {}
    for unit in members:
        by_reason.setdefault(kept.get(unit), []).append(unit)
    return by_reason


def _is_within(layer: str, modules: Collection[str]) -> bool:
    parts = layer.split(".")
    return any(".".join(parts[:depth]) in modules for depth in range(1, len(parts) + 1))


def ignored_modules(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    """Return the names of modules that match a pattern.

    Args:
        model: The network.
        patterns: Module names, in which ``*`` and ``?`` stand for any characters and for one.

    Raises:
        ValueError: a pattern matches no module.
    """
    names = [name for name, _ in model.named_modules() if name]
    matching = {pattern: fnmatch.filter(names, pattern) for pattern in patterns}
    unknown = [pattern for pattern, matches in matching.items() if not matches]
    if unknown:
        raise ValueError(
            f"ignore names layers that the network does not have: {unknown}; its layers are "
            f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
        )
    return set(chain.from_iterable(matching.values()))
