"""Searches on landscapes: the rules and steps compared, and how close they get to the best mask."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
from landscapes import SPACES, Landscape, landscape

from fppmo_ray.distribution import (
    RULES,
    BoolArray,
    Feedback,
    FloatArray,
    MaskOptimizer,
    OptimizerSettings,
    UpdateRule,
)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A way to search."""

    name: str
    rule: UpdateRule
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of ``OptimizerSettings``, where they differ from the defaults."""


_DEFAULT = "layer_es"  # of searches
DEFAULTS = tuple(
    Candidate(name=name, rule=RULES[name])
    for name in sorted(RULES, key=lambda name: name != _DEFAULT)
)
"""All rules as they come, the default one first."""

_STEPS: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    _DEFAULT: {
        "layer_step": (0.35, 1.4),
        "filter_step": (0.25, 1.0, 2.0),
        "sigma": ((0.6, 0.15), (0.35, 0.35)),
        "temperatures": ((0.5, 0.3), (1.0, 1.0)),
    },
    "elite": {"step": (0.3,)},
}
_LAYOUTS: tuple[Mapping[str, Any], ...] = (
    {"population_size": 8},
    {"population_size": 32},
    {"lag": 0},
)


def variations() -> list[Candidate]:
    """The rules, the default one first, then each with one of its settings changed at a time."""
    stepped = [
        Candidate(name=f"{rule} {name} {value}", rule=_with(RULES[rule], name, value))
        for rule, settings in _STEPS.items()
        for name, values in settings.items()
        for value in values
    ]
    laid_out = [
        Candidate(name=f"{_DEFAULT} {name} {value}", rule=RULES[_DEFAULT], settings={name: value})
        for layout in _LAYOUTS
        for name, value in layout.items()
    ]
    return [*DEFAULTS, *laid_out, *stepped]


def _with(rule: Any, name: str, value: object) -> UpdateRule:
    """The rule, a dataclass, with another value of one of its settings."""
    changed: UpdateRule = replace(rule, **{name: value})
    return changed


_RESCORES = 3  # of every finalist: their noise is averaged
MEASURES = ("mode", "averaged mode", "chosen", "chosen without average", "best sample")


@dataclass(frozen=True, kw_only=True)
class Row:
    """How a candidate fares on the landscapes of a space."""

    candidate: str
    space: str
    proposals: int
    landscapes: int
    gains: dict[str, float]
    """Mean of each measure: 0 is the importance-only mask, 1 the best one known."""
    standard_error: float
    """Of the mode's mean gain."""
    over_first: float
    """Mean difference of the mode's gain to that of the first candidate, same landscapes."""
    over_first_error: float
    """Its standard error."""


def rows(
    candidates: Iterable[Candidate], landscapes: dict[str, list[int]], proposals: int
) -> Iterator[Row]:
    """Search with every candidate on the same landscapes.

    Args:
        candidates: The first is what the others are compared with.
        landscapes: Their seeds, for every space.
        proposals: Of every search.
    """
    first: dict[str, FloatArray] = {}
    for candidate in candidates:
        for space, seeds in landscapes.items():
            gains = np.array([_gains(candidate, _known(space, s), proposals, s) for s in seeds])
            over = gains[:, 0] - first.setdefault(space, gains[:, 0])
            yield Row(
                candidate=candidate.name,
                space=space,
                proposals=proposals,
                landscapes=len(seeds),
                gains=dict(zip(MEASURES, gains.mean(axis=0).round(4).tolist(), strict=True)),
                standard_error=_standard_error(gains[:, 0]),
                over_first=round(float(over.mean()), 4),
                over_first_error=_standard_error(over),
            )


@cache
def _known(space: str, seed: int) -> Landscape:
    return landscape(SPACES[space], seed)


def _standard_error(values: FloatArray) -> float:
    return round(float(values.std(ddof=1) / np.sqrt(len(values))), 4)


def _gains(candidate: Candidate, problem: Landscape, num_proposals: int, seed: int) -> list[float]:
    """The measures of one search."""
    rng = np.random.default_rng([seed, 1])
    finalists = _finalists(candidate, problem, num_proposals, seed, rng)
    masks = np.array(list(finalists.values()))
    noise = problem.noise / np.sqrt(_RESCORES)
    rescored = problem.loss(masks) + noise * rng.standard_normal(len(masks))
    gain_of = dict(zip(finalists, problem.gain(masks).tolist(), strict=True))
    loss_of = dict(zip(finalists, rescored.tolist(), strict=True))
    without = [name for name in finalists if name != "averaged mode"]
    mode = gain_of.get("mode", 0.0)  # else it is the importance-only mask
    return [
        mode,
        gain_of.get("averaged mode", mode),
        gain_of[min(finalists, key=loss_of.__getitem__)],
        gain_of[min(without, key=loss_of.__getitem__)],
        max((gain for name, gain in gain_of.items() if name.startswith("sample")), default=mode),
    ]


def _finalists(
    candidate: Candidate,
    problem: Landscape,
    num_proposals: int,
    seed: int,
    rng: np.random.Generator,
) -> dict[str, BoolArray]:
    """The finalists' masks by name, after a search with noisy scores."""
    settings = {"macs_cut": 0.57, "num_proposals": num_proposals, "seed": seed}
    optimizer = MaskOptimizer(
        problem.space,
        problem.importance,
        OptimizerSettings(rule=candidate.rule, **settings | dict(candidate.settings)),
    )
    while not optimizer.finished:
        proposals = optimizer.ask()
        losses = problem.loss(np.array([proposal.keep for proposal in proposals]))
        losses += problem.noise * rng.standard_normal(len(losses))
        for proposal, loss in zip(proposals, losses.tolist(), strict=True):
            told = Feedback(proposal_id=proposal.proposal_id, val_loss=loss, val_accuracy=0.5)
            optimizer.tell(told)
    return {finalist.name: finalist.keep for finalist in optimizer.finalists()}
