"""Variants of a search, written as the settings in which they differ from the default one."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from fppmo_ray import SearchSettings
from fppmo_ray.distribution import RULES, UpdateRule

DEFAULT = "default"
VARIANTS = (
    DEFAULT,
    "proposals=320",
    "proposals=1280",
    "score-images=2000,score-recalibrate-images=1000,proposals=320",
    "population=8",
    "population=32",
    "lag=0",
    "importance=l1",
    "layer-step=0.35",
    "layer-step=1.4",
    "filter-step=0.25",
    "filter-step=1",
    "sigma=0.6:0.15",
    "temperatures=0.5:0.3",
    "rule=ridge",
    "rule=elite",
)


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to search."""

    settings: SearchSettings
    rule: UpdateRule
    """That of the settings, perhaps with other steps."""


def way_of(variant: str, default: SearchSettings) -> Way:
    """The search of a variant: ``population=8,filter-step=1``, or ``default``.

    Settings are those of a search and the steps of its rule; the ends of a range are written with a
    colon between them.

    Raises:
        ValueError: it names no such setting, or a value that the setting cannot have.
    """
    changes = dict(map(_split, variant.split(","))) if variant != DEFAULT else {}
    of_search = {field.name for field in fields(SearchSettings)}
    settings = replace(default, **_values(changes.keys() & of_search, changes, default))
    rule: Any = RULES[settings.rule]
    of_rule = {field.name for field in fields(rule)}
    unknown = changes.keys() - of_search - of_rule
    if unknown:
        names = ", ".join(sorted(unknown)).replace("_", "-")
        steps = ", ".join(sorted(of_rule)).replace("_", "-")
        raise ValueError(
            f"expected settings of a search or steps of rule {settings.rule} ({steps}), got {names}"
        )
    return Way(
        settings=settings, rule=replace(rule, **_values(changes.keys() & of_rule, changes, rule))
    )


def _split(part: str) -> tuple[str, str]:
    name, _, value = part.partition("=")
    if not value:
        raise ValueError(f"expected {DEFAULT} or SETTING=VALUE, got {part!r}")
    return name.replace("-", "_"), value


def _values(names: set[str], changes: dict[str, str], default: object) -> dict[str, Any]:
    return {name: _value(name, changes[name], getattr(default, name)) for name in sorted(names)}


def _value(name: str, text: str, before: object) -> Any:
    """The text as a value of the setting's kind."""
    if isinstance(before, str):
        return text
    try:
        if isinstance(before, tuple):
            return tuple(map(float, text.split(":")))
        return int(text) if isinstance(before, int) else float(text)
    except ValueError as error:
        raise ValueError(f"expected a number for {name}, got {text!r}") from error
