"""Coupled axes of a network, and the channel groups that they form."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from torch import Tensor, nn

from fppmo_ray.distribution.space import IntArray
from fppmo_ray.pruning.costs import CoupledCost, CoupledTensor, first_of, run_and_count
from fppmo_ray.pruning.dependency import (
    FIXED,
    RETURNED,
    Allocation,
    Dependencies,
    DisjointSets,
    Product,
    follow,
    start,
)
from fppmo_ray.pruning.extract import Axis, Side, named_tensors


@dataclass(frozen=True, kw_only=True, eq=False)
class CoupledAxis:
    """An axis of a parameter or buffer, and what couples the positions along it."""

    axis: Axis
    side: Side
    units: IntArray
    """``(length of the axis,)``: an arbitrary number per unit."""
    is_convolution: bool
    """Whether the tensor has pixels too."""

    @property
    def layer(self) -> str:
        """Name of the layer that holds the tensor."""
        return self.axis[0].rpartition(".")[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class Coupling:
    """All axes of a network in the model's order, and what is known of their units."""

    axes: list[CoupledAxis]
    kept: dict[int, str]
    """Units that must stay, with the reason."""
    doubted: dict[int, str]
    """Units that can go only if the network's code follows widths, with what makes it doubtful.

    What has the same reason turns out alike, as a rule.
    """
    costs: list[CoupledCost]
    """Of the network in eval mode, in the order in which they arise."""
    constant_macs: int
    """What no width changes, for one image."""
    tensors: list[CoupledTensor]
    """That an image's inference makes."""
    moments: list[tuple[int, ...]]
    """Which of them are there together, by index."""


def couple(model: nn.Module, inputs: tuple[Tensor, ...]) -> Coupling:
    """Follow a network's channels in training and in eval mode.

    Args:
        model: The network on the CPU. It is left in eval mode, its batch-norm statistics change.
        inputs: What its forward takes, with a batch of two or more.
    """
    dependencies = start(model)
    follow(dependencies, model.train(), inputs)  # heads that only train are cut too
    model.eval()
    _, macs = run_and_count(lambda *image: follow(dependencies, model, image), first_of(inputs))
    costs = _costs(dependencies)
    tensors = named_tensors(model)
    return Coupling(
        axes=[
            CoupledAxis(
                axis=axis,
                side=_side(dependencies.units, along),
                units=dependencies.units.roots(along),
                is_convolution=tensors[axis[0]].dim() > 2,
            )
            for axis, along in dependencies.positions.items()
        ],
        kept=dependencies.units.kept(),
        doubted=dependencies.units.doubted(),
        costs=costs,
        constant_macs=macs - sum(cost.macs for cost in costs),
        tensors=[_tensor(dependencies.units, made) for made in dependencies.memory.allocations],
        moments=dependencies.memory.largest_moments(),
    )


def _tensor(units: DisjointSets, made: Allocation) -> CoupledTensor:
    along = made.tensor.channels.items()
    return CoupledTensor(
        module=made.module,
        integer_bytes=made.integer_bytes,
        shape=made.tensor.shape,
        units={axis: units.roots(positions) for axis, positions in along},
    )


def _side(units: DisjointSets, along: IntArray) -> Side:
    if units.is_made(along):
        return "output"
    return "input" if units.is_read(along) else "along"


def _costs(dependencies: Dependencies) -> list[CoupledCost]:
    """What every layer costs; a layer that is used twice has the cost of both uses."""
    layer_of = {
        position: tensor.rpartition(".")[0]
        for (tensor, _), along in dependencies.positions.items()
        for position in along.tolist()
    }
    found: dict[tuple[str, bytes, bytes], CoupledCost] = {}
    for product in dependencies.products:
        layer = _layer(product, layer_of)
        key = (layer, product.out.tobytes(), product.read.tobytes())
        before = found[key].macs if key in found else 0
        found[key] = CoupledCost(
            layer=layer,
            macs=before + product.macs,
            out_units=dependencies.units.roots(product.out),
            in_units=dependencies.units.roots(product.read),
        )
    return list(found.values())


def _layer(product: Product, layer_of: Mapping[int, str]) -> str:
    """The layer that owns the weight, or the class of the module that multiplies activations."""
    if not product.by_weight:
        return product.module
    followed = np.concatenate([product.out, product.read])
    return layer_of[int(followed[followed != FIXED][0])]


@dataclass(frozen=True, eq=False)
class Candidate:
    """Units with the same number of positions on the same axes: a channel group, if it is sound."""

    layer: str
    namesakes: int
    """How many groups before it begin with the same layer."""
    units: list[int]
    doubt: str | None
    """What must turn out well for it to be sound; what has the same turns out alike."""

    @property
    def name(self) -> str:
        """Of the group: its first layer, and a number from the second such group on."""
        return f"{self.layer} ({self.namesakes + 1})" if self.namesakes else self.layer


def candidate_groups(
    coupling: Coupling, ignored: Collection[str]
) -> tuple[list[Candidate], dict[str, str]]:
    """Groups of two or more filters that some layer reads, and the groups that must stay."""
    places: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    for index, part in enumerate(coupling.axes):
        units, counts = np.unique(part.units, return_counts=True)
        for unit, count in zip(units.tolist(), counts.tolist(), strict=True):
            places[unit].append((index, count))
    groups: defaultdict[tuple[tuple[int, int], ...], dict[int, None]] = defaultdict(dict)
    for part in coupling.axes:
        if part.side == "output":
            for unit in part.units.tolist():
                groups[tuple(places[unit])][unit] = None
    candidates: list[Candidate] = []
    unsound: dict[str, str] = {}
    for signature, members in groups.items():
        parts = [coupling.axes[index] for index, _ in signature]
        makers = [part.layer for part in parts if part.side == "output"]
        is_read = any(part.side == "input" for part in parts)
        of_filters = any(part.side == "output" and part.is_convolution for part in parts)
        if len(members) < 2 or any(_is_within(maker, ignored) for maker in makers):
            continue
        for kept, alike in _by_fate(members, coupling.kept).items():
            if kept is not None and (is_read or (of_filters and kept != RETURNED)):
                unsound[makers[0]] = kept
            elif kept is None and is_read and len(alike) > 1:
                namesakes = sum(makers[0] == candidate.layer for candidate in candidates)
                doubt = coupling.doubted.get(alike[0])
                candidates.append(Candidate(makers[0], namesakes, alike, doubt))
    return candidates, unsound


def _by_fate(members: Iterable[int], kept: Mapping[int, str]) -> dict[str | None, list[int]]:
    """Units by the reason for which they must stay; None where there is none."""
    fates: dict[str | None, list[int]] = {}
    for unit in members:
        fates.setdefault(kept.get(unit), []).append(unit)
    return fates


def _is_within(layer: str, modules: Collection[str]) -> bool:
    parts = layer.split(".")
    return any(".".join(parts[:depth]) in modules for depth in range(1, len(parts) + 1))


def ignored_modules(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    """The modules whose names match.

    Raises:
        ValueError: a pattern matches none.
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
