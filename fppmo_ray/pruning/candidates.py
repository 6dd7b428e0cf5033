"""Channel groups that might be pruned, as the coupling of a network's axes has them."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from torch import nn

from fppmo_ray.pruning.coupling import Coupling
from fppmo_ray.pruning.dependency import RETURNED


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
