"""What is compared: update rules, their steps, and how a search is laid out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fppmo_ray.distribution import RULES, UpdateRule


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
