"""Which positions of which layers are coupled, and what the layers cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from fppmo_ray.distribution.space import IntArray
from fppmo_ray.pruning.activations import CoupledTensor
from fppmo_ray.pruning.costs import CoupledCost, first_of, run_and_count
from fppmo_ray.pruning.dependency import (
    FIXED,
    Allocation,
    Dependencies,
    DisjointSets,
    Product,
    follow,
    start,
)
from fppmo_ray.pruning.extract import named_tensors
from fppmo_ray.pruning.slices import Axis, Side


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
