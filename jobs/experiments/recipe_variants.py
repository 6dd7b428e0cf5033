"""Variants of a recipe, written as the settings in which they differ from the default one."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from fppmo_ray.training import Recipe

DEFAULT = "default"
VARIANTS = (
    DEFAULT,
    "learning-rate=0.02",
    "learning-rate=0.1",
    "distillation-weight=0",
    "distillation-weight=0.9",
    "distillation-temperature=2",
    "distillation-weight=0.9,distillation-temperature=2",
    "ema-decay=0.999",
    "schedule=one_cycle",
    "label-smoothing=0.1",
)
_EMA_DECAY = 0.99


def recipe_of(variant: str, default: Recipe) -> Recipe:
    """The recipe of a variant: ``learning-rate=0.1,ema-decay=0.999``, or ``default``.

    Averaging does not change a training, so every variant averages, and its last weights tell how
    it does without.

    Raises:
        ValueError: it names no setting of recipes, or a value that the setting cannot have.
    """
    changes: dict[str, Any] = {}
    if variant != DEFAULT:
        changes |= (_change(part, default) for part in _parts(variant))
    recipe = replace(default, **changes)
    return replace(recipe, ema_decay=recipe.ema_decay or _EMA_DECAY)


def without_averaging(variant: str) -> str:
    """The variant's other changes: variants that share them share their last weights."""
    parts = [part for part in _parts(variant) if _name(part) != "ema_decay"]
    return ",".join(parts) or DEFAULT


def _parts(variant: str) -> list[str]:
    return variant.split(",")


def _name(part: str) -> str:
    return part.partition("=")[0].replace("-", "_")


def _change(part: str, default: Recipe) -> tuple[str, Any]:
    name, value = _name(part), part.partition("=")[2]
    known = [field.name for field in fields(Recipe)]
    if name not in known or not value:
        names = ", ".join(known).replace("_", "-")
        raise ValueError(f"expected {DEFAULT} or SETTING=VALUE of {names}, got {part!r}")
    before = getattr(default, name)
    if isinstance(before, str):
        return name, value
    try:
        return name, int(value) if isinstance(before, int) else float(value)
    except ValueError as error:
        raise ValueError(f"expected a number for {name}, got {value!r}") from error
