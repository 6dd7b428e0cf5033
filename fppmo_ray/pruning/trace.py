"""From a network to its space of masks, once; only groups that are proven exact are in it."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fppmo_ray.distribution.space import ChannelGroup, PruningSpace
from fppmo_ray.pruning.costs import layer_costs, layer_macs
from fppmo_ray.pruning.coupling import LayerAxis, couple
from fppmo_ray.pruning.equivalence import (
    FORWARD_ERRORS,
    disagreement,
    example_batch,
    randomised_copy,
)
from fppmo_ray.pruning.slices import AxisUnits, Tracing

__all__ = ["Tracing", "trace"]


def trace(
    model: nn.Module,
    example_inputs: Tensor | tuple[Tensor, ...],
    *,
    ignore: Sequence[str] = (),
) -> Tracing:
    """Find the channel groups of a network, what they cost, and prove that they can be pruned.

    The groups are found by a training-mode trace, so that heads which only train are cut too.
    Then the extracted networks of two random masks are compared with the dense one (see
    ``check_equivalence``). A group that fails is left whole and named in a warning. The work is
    done on a copy: the network's weights, mode and the random state stay as they are.

    Args:
        model: Any network with convolutions.
        example_inputs: What its forward takes, with a batch axis, e.g. ``(1, 3, 32, 32)``. Only
            the shapes matter.
        ignore: Names of layers, or of modules that hold them, whose filters must all stay.

    Raises:
        ValueError: the network has no convolution, no group that can be pruned or no layer of an
            ignored name, or does not run on a batch of two of the example inputs.
    """
    _check_names(model, ignore)
    inputs = example_batch(example_inputs)
    with torch.random.fork_rng(devices=[]):
        twin = randomised_copy(model)
        _check_runs(twin, inputs)
        layer_axes, broken = couple(twin.train(), inputs)
        survey = _Survey(twin.eval(), inputs, layer_axes, *layer_macs(twin, inputs))
        candidates, unsound = _candidates(layer_axes, broken, ignore)
        sound = survey.sound(candidates, [], unsound)
    if unsound:
        reasons = "; ".join(f"{name} ({reason})" for name, reason in unsound.items())
        message = f"channel groups left whole, since they cannot be pruned exactly: {reasons}"
        warnings.warn(message, stacklevel=2)
    if not sound:
        raise ValueError(
            "the network has no channel group that can be pruned: no layer reads the filters of "
            "another, or extraction is not exact for any"
        )
    return survey.tracing(sound, tuple(unsound))


@dataclass(frozen=True, eq=False)
class _Candidate:
    """Units with the same number of positions on the same axes: a channel group, if it is sound."""

    layer: str
    namesakes: int
    """How many groups before it begin with the same layer."""
    units: list[int]

    @property
    def name(self) -> str:
        return f"{self.layer} ({self.namesakes + 1})" if self.namesakes else self.layer


@dataclass(frozen=True, eq=False)
class _Survey:
    """All that is known of a network before its groups are chosen."""

    twin: nn.Module
    inputs: tuple[Tensor, ...]
    layer_axes: list[LayerAxis]
    macs: dict[str, int]
    total_macs: int

    def sound(
        self, candidates: list[_Candidate], accepted: list[_Candidate], unsound: dict[str, str]
    ) -> list[_Candidate]:
        """The accepted groups and those candidates that can be pruned with them, by bisection.

        All are tried together first. Groups that fail are added to ``unsound`` with the reason.
        """
        if not candidates:
            return accepted
        reason = disagreement(self.twin, self.tracing(accepted + candidates), self.inputs)
        if reason is None:
            return accepted + candidates
        if len(candidates) == 1:
            unsound[candidates[0].name] = reason
            return accepted
        half = len(candidates) // 2
        accepted = self.sound(candidates[:half], accepted, unsound)
        return self.sound(candidates[half:], accepted, unsound)

    def tracing(self, chosen: list[_Candidate], left_whole: tuple[str, ...] = ()) -> Tracing:
        """The tracing in which these groups can be pruned and all else is always kept."""
        groups = tuple(
            ChannelGroup(name=group.name, num_filters=len(group.units)) for group in chosen
        )
        order = np.concatenate([np.array(group.units, dtype=np.int64) for group in chosen])
        highest = max(int(part.units.max(initial=-1)) for part in self.layer_axes)
        filter_of_unit = np.full(highest + 2, -1, dtype=np.int64)  # unit -1 reads the last entry
        filter_of_unit[order] = np.arange(len(order))
        slices = tuple(
            AxisUnits(tensor=tensor, axis=axis, units=units, side=part.side)
            for part in self.layer_axes
            if ((units := filter_of_unit[part.units]) >= 0).any()
            for tensor, axis in part.axes
        )
        costs = layer_costs(self.twin, self.macs, slices, groups)
        constant_macs = self.total_macs - sum(self.macs.values())
        space = PruningSpace(groups, costs, constant_macs)
        return Tracing(space=space, slices=slices, left_whole=left_whole)


def _candidates(
    layer_axes: list[LayerAxis], broken: set[int], ignore: Sequence[str]
) -> tuple[list[_Candidate], dict[str, str]]:
    """Groups of two or more filters that some layer reads, and the names of broken groups."""
    places: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    for index, part in enumerate(layer_axes):
        units, counts = np.unique(part.units[part.units >= 0], return_counts=True)
        for unit, count in zip(units.tolist(), counts.tolist(), strict=True):
            places[unit].append((index, count))
    groups: defaultdict[tuple[tuple[int, int], ...], dict[int, None]] = defaultdict(dict)
    for part in layer_axes:
        if part.side == "output":
            for unit in part.units.tolist():
                groups[tuple(places[unit])][unit] = None
    candidates: list[_Candidate] = []
    unsound: dict[str, str] = {}
    for signature, members in groups.items():
        parts = [layer_axes[index] for index, _ in signature]
        makers = [part.layer for part in parts if part.side == "output"]
        if len(members) < 2 or any(_is_within(maker, ignore) for maker in makers):
            continue
        if not broken.isdisjoint(members):
            unsound[makers[0]] = "its channels do not line up with those of the layers around"
        elif any(part.side == "input" for part in parts):
            namesakes = sum(makers[0] == candidate.layer for candidate in candidates)
            candidates.append(_Candidate(makers[0], namesakes, list(members)))
    return candidates, unsound


def _is_within(layer: str, names: Sequence[str]) -> bool:
    return any(layer == name or layer.startswith(f"{name}.") for name in names)


def _check_names(model: nn.Module, ignore: Sequence[str]) -> None:
    names = {name for name, _ in model.named_modules()}
    if not any(isinstance(module, _ConvNd) for module in model.modules()):
        raise ValueError(
            f"expected a network with convolutions, got {type(model).__name__} without any; "
            "only filters of convolutional networks can be pruned"
        )
    unknown = [name for name in ignore if name not in names]
    if unknown:
        raise ValueError(f"ignore names layers that the network does not have: {unknown}")


def _check_runs(twin: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Refuse a network that does not run dense, before anything is blamed on pruning."""
    for training in (False, True):
        try:
            with torch.no_grad():
                twin.train(training)(*inputs)
        except FORWARD_ERRORS as error:
            mode = "training" if training else "eval"
            shapes = [tuple(tensor.shape) for tensor in inputs]
            raise ValueError(
                f"the network must run in {mode} mode on inputs of shapes {shapes}, it raised "
                f"{type(error).__name__}: {error}"
            ) from error
