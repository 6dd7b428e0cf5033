"""What is compared: update rules, their steps, and how a search is laid out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fppmo_ray.distribution import RULES, UpdateRule
from fppmo_ray.distribution.rules import Elite, LayerES, Ridge


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A way to search."""

    name: str
    rule: UpdateRule
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of ``OptimizerSettings``, where they differ from the defaults."""


DEFAULTS = tuple(Candidate(name=name, rule=rule) for name, rule in RULES.items())

_RIDGE: Mapping[str, tuple[float, ...]] = {
    "layer_step": (0.05, 0.2),
    "filter_step": (0.1, 0.4),
    "memory": (0.8, 1.0),
    "width_scale": (1.0, 4.0),
    "penalty": (0.1, 1.0),
    "sigma": (0.0, 0.5),
    "scale": (0.4, 1.0),
}
_LAYOUTS: tuple[Mapping[str, Any], ...] = (
    {"population_size": 8},
    {"population_size": 32},
    {"lag": 0},
)


def variations() -> list[Candidate]:
    """The rules, ridge with one setting changed at a time, others with other steps."""
    ridge = [
        Candidate(name=f"ridge {name} {value}", rule=replace(Ridge(), **{name: value}))
        for name, values in _RIDGE.items()
        for value in values
    ]
    laid_out = [
        Candidate(name=f"ridge {name} {value}", rule=Ridge(), settings={name: value})
        for layout in _LAYOUTS
        for name, value in layout.items()
    ]
    others = [
        Candidate(
            name=f"layer_es {layer} {filters}",
            rule=LayerES(layer_step=layer, filter_step=filters),
        )
        for layer, filters in ((1.0, 1.0), (1.0, 2.0))
    ]
    return [
        *DEFAULTS,
        *ridge,
        *laid_out,
        *others,
        Candidate(name="elite 0.3", rule=Elite(step=0.3)),
    ]
