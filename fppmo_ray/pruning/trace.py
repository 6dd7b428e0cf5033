"""Tracing of a network: its channel groups, each proven to be exact, and their costs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from fppmo_ray.distribution.space import ChannelGroup, IntArray, PruningSpace
from fppmo_ray.pruning.conditions import Inputs, eager, precision_of
from fppmo_ray.pruning.copying import WorkingCopy, with_plain_weights
from fppmo_ray.pruning.costs import activations, layer_costs, tensor_sizes
from fppmo_ray.pruning.coupling import (
    CandidateGroup,
    Coupling,
    candidate_groups,
    couple,
    ignored_modules,
)
from fppmo_ray.pruning.dependency import RETURNED
from fppmo_ray.pruning.equivalence import Proof
from fppmo_ray.pruning.extract import AxisUnits, NumberKey, NumberUnits, Tracing
from fppmo_ray.pruning.given_network import check_finite, check_traceable
from fppmo_ray.pruning.network_io import ExampleInputs, checked, opened
from fppmo_ray.pruning.width_decisions import (
    WidthDecision,
    changing_widths,
    smallest_floor,
    usual_widths,
    width_decisions,
)

__all__ = ["Tracing", "trace"]


def trace(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    ignore: Sequence[str] = (),
) -> Tracing:
    """Find the channel groups of a network and their costs, and prove that they can be pruned.

    The dependencies are traced in training and in eval mode, so that heads which only train are
    pruned too. Then the extracted networks of two random masks are compared with the dense one (see
    ``check_equivalence``). A group that fails is left whole and named in a warning. The work is
    done on a copy: the network's weights and mode and torch's random state do not change.

    Args:
        model: Any network with convolutions; ``DataParallel`` and compiled ones are opened.
        example_inputs: Arguments of its forward, with a batch axis, e.g. ``(1, 3, 32, 32)``. Only
            shapes and types matter. A network that runs only on batches of this length is followed
            on these, and its costs are those of one such batch.
        ignore: Names of layers, or of modules that hold them, whose filters must all stay; ``*``
            and ``?`` stand for any characters and for one, as in file names.

    Raises:
        ValueError: the network has no convolution, no group that can be pruned or no layer of an
            ignored name, does not run on such inputs, or has a parameter or a batch-norm statistic
            that is not finite.
        fppmo_ray.pruning.dependency.RuleError: a dependency rule failed, which is a bug.
    """
    check_traceable(model)
    with eager():
        return _trace(opened(model), checked(example_inputs), ignore)


def _trace(model: nn.Module, examples: Inputs, ignore: Sequence[str]) -> Tracing:
    """Trace a network that is not wrapped; warnings are for the caller of ``trace``."""
    if (plain := with_plain_weights(model)) is not model:
        warnings.warn(
            "weights that a parametrization computes, such as weight norm or spectral norm, become "
            "plain parameters of the smaller networks",
            stacklevel=3,
        )
        model = plain
    check_finite(model)
    ignored = ignored_modules(model, ignore)
    copy = WorkingCopy(model)
    with torch.random.fork_rng(devices=[]):
        coupling = couple(copy, examples)
    _check_convolutional(model, coupling)
    proof = Proof(copy, coupling.conditions)
    survey = _Survey(copy.original, proof, coupling, coupling.numbers)
    candidates, unsound = candidate_groups(coupling, ignored)
    sound = survey.sound(candidates, unsound)
    sound = survey.within_decisions(sound, unsound)
    failed = [candidate for candidate in candidates if candidate.name in unsound]
    survey, sound = survey.at_extremes(sound, failed, unsound)
    reasons = "; ".join(f"{name} ({reason})" for name, reason in unsound.items())
    if not sound:
        raise ValueError(
            f"the network has no channel group that can be pruned: {_why_none(coupling, unsound)}; "
            "write what is named here differently, or trace the part of the network before it"
        )
    if unsound:
        message = f"channel groups left whole, since they cannot be pruned exactly: {reasons}"
        warnings.warn(message, stacklevel=3)
    floors = [f"{group.name} ({group.floor})" for group in sound if group.floor > 1]
    if floors:
        warnings.warn(
            "the network's code decides by widths and would be another with fewer filters; channel "
            f"groups keep at least so many: {', '.join(floors)}",
            stacklevel=3,
        )
    remarks = coupling.conditions.remark, proof.remark, coupling.remark_on_choices(proof.asks_in)
    for remark in remarks:
        if remark is not None:
            warnings.warn(remark, stacklevel=3)
    return survey.tracing(sound, tuple(unsound))


def _why_none(coupling: Coupling, unsound: Mapping[str, str]) -> str:
    """Why no group can be pruned: the first of these groups, or of layers without a group."""
    found = dict(unsound) or {
        part.layer: coupling.kept[int(part.units[0])]
        for part in coupling.axes
        if part.is_convolution and part.axis[1] == 0 and int(part.units[0]) in coupling.kept
    }
    named = [f"{n} ({r})" for n, r in found.items() if unsound or r != RETURNED]
    more = f", and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
    return "; ".join(named[:_NAMED]) + more or "no layer reads the filters of another"


_NAMED = 4


@dataclass(frozen=True, eq=False)
class _Survey:
    """A network with its coupling, for trying which candidate groups can be pruned."""

    network: nn.Module
    """The network on the CPU; not changed."""
    proof: Proof
    """Compares it with smaller networks."""
    coupling: Coupling
    """The coupled axes of the network."""
    numbers: Mapping[NumberKey, IntArray]
    """Units of the modules' numbers that state widths."""

    def sound(
        self, candidates: list[CandidateGroup], unsound: dict[str, str]
    ) -> list[CandidateGroup]:
        """Return the candidates that can be pruned; add the others to ``unsound`` in place.

        Args:
            candidates: The groups to try.
            unsound: Names of groups that must stay, with the reason.
        """
        # Most networks pass when all are tried together.
        if not any(candidate.doubt for candidate in candidates):
            return self._bisect(candidates, [], unsound)
        if self._reason(candidates) is None:
            return candidates
        # Otherwise accept those without doubt first. Of each doubt, try one group: what a class of
        # modules does in one place it does everywhere.
        doubts: dict[str | None, list[CandidateGroup]] = {None: []}
        for candidate in candidates:
            doubts.setdefault(candidate.doubt, []).append(candidate)
        accepted = self._bisect(doubts.pop(None), [], unsound)
        for alike in doubts.values():
            reason = self._reason([*accepted, alike[0]])
            if reason is None:
                accepted = self._bisect(alike, accepted, unsound)
            else:
                unsound.update({candidate.name: reason for candidate in alike})
        return [candidate for candidate in candidates if candidate in accepted]

    def _bisect(
        self,
        candidates: list[CandidateGroup],
        accepted: list[CandidateGroup],
        unsound: dict[str, str],
    ) -> list[CandidateGroup]:
        """The accepted groups and those candidates that can be pruned along with them."""
        if not candidates:
            return accepted
        reason = self._reason(accepted + candidates)
        if reason is None:
            return accepted + candidates
        if len(candidates) == 1:
            unsound[candidates[0].name] = reason
            return accepted
        half = len(candidates) // 2
        accepted = self._bisect(candidates[:half], accepted, unsound)
        return self._bisect(candidates[half:], accepted, unsound)

    def within_decisions(
        self, chosen: list[CandidateGroup], unsound: dict[str, str]
    ) -> list[CandidateGroup]:
        """Return the groups with floors above which the network's code decides as when dense.

        A decision counts only if a network in which it turns out differently computes something
        else. Groups for which there is no floor are left out.

        Args:
            chosen: The groups to limit.
            unsound: Names of groups that must stay, with the reason; changed in place.
        """
        harmless: set[int] = set()
        while chosen:
            low, high = _widths(chosen)
            decisions = self._decisions(chosen)
            open_ones = [one for one in decisions if id(one.source) not in harmless]
            harmful = self._harmful(chosen, open_ones, harmless)
            if harmful is None:
                return chosen
            floor = smallest_floor(harmful, low, high)
            if floor is not None:
                group, width = floor
                chosen = [*chosen]
                chosen[group] = replace(chosen[group], floor=width)
            else:
                reason = f"the network's code decides by its width in {harmful.place}"
                unsound.update({chosen[group].name: reason for group in harmful.groups})
                chosen = [c for index, c in enumerate(chosen) if index not in harmful.groups]
        return chosen

    def _harmful(
        self, chosen: list[CandidateGroup], decisions: list[WidthDecision], harmless: set[int]
    ) -> WidthDecision | None:
        """The first decision that makes another network; None, with all ``harmless``, if none."""
        low, high = _widths(chosen)
        for widths, changed in changing_widths(decisions, low, high, range(len(chosen))):
            if self._reason(chosen, widths) is None:
                continue
            for decision in changed:
                alone = changing_widths([decision], low, high, decision.groups)
                if any(self._reason(chosen, tried) is not None for tried, _ in alone):
                    return decision
            return changed[0]  # each is harmless alone, but not with the others
        harmless.update(id(decision.source) for decision in decisions)
        return None

    def at_extremes(
        self,
        chosen: list[CandidateGroup],
        failed: list[CandidateGroup],
        unsound: dict[str, str],
    ) -> tuple[_Survey, list[CandidateGroup]]:
        """Prove the groups at their smallest widths and at equal ones.

        Decisions by widths that were not seen, as those of ``squeeze`` and of compiled code, show
        at these. Once one shows, more widths are tried. Groups that fail are given a floor, or left
        out.

        Args:
            chosen: The groups to prove.
            failed: Groups that have been left out by a proof.
            unsound: Names of groups that must stay, with the reason; changed in place.

        Returns:
            A survey that mends modules' numbers that may be widths too, if that proves right, and
            the groups.
        """
        guessing = replace(self, numbers={**self.numbers, **self.coupling.guesses})
        lengths = {len(part.units) for part in self.coupling.axes if part.side == "output"}
        # A width that no proof has tried may equal that of the images, or of a group left out.
        more = {len(candidate.units) for candidate in failed}
        while chosen:
            low, high = _widths(chosen)
            equal = max(2, self.coupling.conditions.inputs[0].shape[1], int(low.max()))
            tried = [low, *(np.clip(width, low, high) for width in (equal, *sorted(more)))]
            if guessing._reason(chosen, *tried) is None:
                return guessing, chosen
            failing = next((widths for widths in tried if self._reason(chosen, widths)), None)
            if failing is None:
                return self, chosen
            chosen = self._without_hidden(chosen, failing, unsound)
            more = {*lengths, *range(1, _MORE_WIDTHS + 1)}
        return self, chosen

    def _without_hidden(
        self, chosen: list[CandidateGroup], failing: IntArray, unsound: dict[str, str]
    ) -> list[CandidateGroup]:
        """The groups, those with larger floors or left out that make another network.

        Args:
            chosen: The groups.
            failing: Widths at which they do, per group.
            unsound: Names of groups that must stay, with the reason; changed in place.
        """
        low, high = _widths(chosen)
        order = np.arange(len(chosen))
        reasons: dict[int, str] = {}
        for index in order[failing < high].tolist():
            reason = self._reason(chosen, np.where(order == index, failing, high))
            reasons |= {} if reason is None else {index: reason}
        if not reasons:  # no group alone, so find the one that makes it fail with those before it
            for index in order[failing < high].tolist():
                reason = self._reason(chosen, np.where(order <= index, failing, high))
                if reason is not None:
                    reasons[index] = reason
                    break
        kept: list[CandidateGroup] = []
        for index, candidate in enumerate(chosen):
            floor = 2 * candidate.floor
            if index not in reasons:
                kept.append(candidate)
            elif failing[index] == low[index] and floor < high[index]:
                kept.append(replace(candidate, floor=floor))
            else:
                unsound[candidate.name] = (
                    f"at a width of {failing[index]} {reasons[index]}: the network's code seems to "
                    "decide by widths where tracing cannot see it, as through int() or torch.jit"
                )
        return kept

    def _reason(self, chosen: list[CandidateGroup], *widths: IntArray) -> str | None:
        """Why these groups cannot be pruned together, at random or given widths; None if so.

        Groups that are tried at given widths have been proven at random ones.
        """
        tracing, rng = self.tracing(chosen), np.random.default_rng(0)
        usual = widths or usual_widths(self._decisions(chosen), tracing.space.dense_widths, rng)
        masks = self.proof.masks(tracing, usual, rng)
        return self.proof.disagreement(tracing, masks, by_operations=bool(widths))

    def _decisions(self, chosen: list[CandidateGroup]) -> list[WidthDecision]:
        """The decisions that masks of these groups may change."""
        decisions, (low, high) = self.coupling.decisions, _widths(chosen)
        return [
            decision
            for decision in width_decisions(decisions, self._filter_of_unit(chosen), high)
            if decision.can_change(low, high)
        ]

    def tracing(self, chosen: list[CandidateGroup], left_whole: tuple[str, ...] = ()) -> Tracing:
        """Return the tracing in which these groups can be pruned and all other units are kept.

        Args:
            chosen: The groups of the space, in order.
            left_whole: Names of the groups that cannot be pruned.
        """
        groups = tuple(
            ChannelGroup(
                name=group.name,
                num_filters=len(group.units),
                min_keep=group.floor,
                floor=group.floor,
            )
            for group in chosen
        )
        filter_of_unit = self._filter_of_unit(chosen)
        slices = tuple(
            AxisUnits(tensor=part.axis[0], axis=part.axis[1], units=units, side=part.side)
            for part in self.coupling.axes
            if ((units := filter_of_unit[part.units]) >= 0).any()
        )
        costs = layer_costs(self.coupling.costs, filter_of_unit, groups)
        shapes = {name: tuple(tensor.shape) for name, tensor in self.network.named_parameters()}
        sizes = tensor_sizes(shapes, slices, groups)
        tensors, moments = self.coupling.tensors, self.coupling.moments
        item_bytes = precision_of(self.network).itemsize
        made = activations(tensors, moments, filter_of_unit, groups, item_bytes)
        space = PruningSpace(groups, costs, self.coupling.constant_macs, *sizes, made)
        numbers = tuple(
            NumberUnits(number=number, units=counted)
            for number, units in self.numbers.items()
            if ((counted := filter_of_unit[units]) >= 0).any()
        )
        return Tracing(space=space, slices=slices, left_whole=left_whole, numbers=numbers)

    def _filter_of_unit(self, chosen: list[CandidateGroup]) -> IntArray:
        """Index into a mask of these groups per unit, -1 = always kept; unit -1 reads the last."""
        order = np.concatenate([np.array(group.units, dtype=np.int64) for group in chosen])
        filter_of_unit = np.full(self.coupling.num_units + 1, -1, dtype=np.int64)
        filter_of_unit[order] = np.arange(len(order))
        return filter_of_unit


def _widths(chosen: list[CandidateGroup]) -> tuple[IntArray, IntArray]:
    """Smallest and dense width per group, each ``(num_groups,)``."""
    low = np.array([group.floor for group in chosen], dtype=np.int64)
    return low, np.array([len(group.units) for group in chosen], dtype=np.int64)


_MORE_WIDTHS = 16


def _check_convolutional(model: nn.Module, coupling: Coupling) -> None:
    convolves = any(part.is_convolution and part.side != "along" for part in coupling.axes)
    modules = list(model.modules())
    if not convolves and any(".quantized" in type(module).__module__ for module in modules):
        raise ValueError(
            "the network's convolutions are quantised, and their weights are packed; prune the "
            "floating-point network and quantise the smaller one"
        )
    if not convolves and not any(isinstance(module, _ConvNd) for module in modules):
        raise ValueError(
            f"expected a network with convolutions, got {type(model).__name__} without any; "
            "only filters of convolutional networks can be pruned"
        )
