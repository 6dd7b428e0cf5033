"""Facts as JSON objects, whose entries are checked where they are read."""

from __future__ import annotations

import sys
from dataclasses import fields
from functools import cache, lru_cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from fppmo_ray.distribution import Proposal
from fppmo_ray.service.journal.facts import Fact, pack_mask, packed_mask

_KINDS: dict[str, type[Fact]] = {kind.__name__: kind for kind in get_args(Fact)}


def _types_of(kind: type[Fact]) -> dict[str, Any]:
    hints = get_type_hints(kind)
    types = {field.name: hints[field.name] for field in fields(kind)}
    mask = {"keep": str} if {"keep", "packed"} & types.keys() else {}
    return {name: hint for name, hint in types.items() if name != "packed"} | mask


_TYPES = {name: _types_of(kind) for name, kind in _KINDS.items()}
"""Types of the JSON values of every kind's fields; a mask is text there, named ``keep``."""
_NULLABLE: dict[str, set[str]] = {
    name: {"train_loss", "val_accuracy"} & types.keys()
    for name, types in _TYPES.items()
    if name != "Feedback"
}
"""Fields without a default that are left out where they are None."""
_SCALARS: dict[Any, tuple[type, ...]] = {
    **{kind: (kind,) for kind in (str, int)},
    **dict.fromkeys((float, float | None), (float, int)),
}
_ACCEPTED: dict[str, dict[str, tuple[type, ...]]] = {
    name: {entry: _SCALARS.get(hint, ()) for entry, hint in types.items()}
    for name, types in _TYPES.items()
}
"""Types of simple fields' JSON values, to check most values in one look."""
_LARGEST_INT = 2**63
_YEAR_10000 = 253_402_300_800  # in Unix time


def fact_to_json(fact: Fact) -> dict[str, Any]:
    """Return the fact as a JSON object whose ``fact`` entry names its kind; None is left out."""
    entries = {name: getattr(fact, name) for name in _TYPES[type(fact).__name__]}
    if "keep" in entries:
        entries["keep"] = pack_mask(entries["keep"])
    present = {name: value for name, value in entries.items() if value is not None}
    return {"fact": type(fact).__name__, **present}


def fact_from_json(data: Any, num_filters: int) -> Fact:
    """Return the fact that ``fact_to_json`` described.

    Args:
        data: The JSON object.
        num_filters: Length of a mask, which the journal's first line tells.

    Raises:
        ValueError: it is no object, its kind is unknown, or its entries do not fit.
    """
    if not isinstance(data, dict):
        raise ValueError(f"expected a JSON object, got {type(data).__name__}")
    entries = dict(data)
    entries.pop("sum", None)  # the line's checksum
    name = entries.pop("fact", None)
    kind = _KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(f"expected a fact of {', '.join(_KINDS)}, got {name!r}")
    accepted = _ACCEPTED[name]
    for entry, value in entries.items():
        if type(value) not in accepted.get(entry, ()) and not _fits(
            value, _TYPES[name].get(entry, Any)
        ):
            raise ValueError(f"{entry} of fact {name} is of another type: {value!r:.40}")
        if type(value) is int and not -_LARGEST_INT < value < _LARGEST_INT:
            raise ValueError(f"{entry} of fact {name} is too large: {value!r:.40}")
    if not 0 <= (entries.get("at") or 0) < _YEAR_10000:
        raise ValueError(f"at of fact {name} is no time: {entries['at']!r:.40}")
    if "keep" in entries:
        packed = packed_mask(entries["keep"], num_filters)
        entries["keep"] = packed if kind is Proposal else packed.keep()
    if "score_seed" in entries:
        entries["score_seed"] = shared_seed(tuple(entries["score_seed"]))
    if "worker" in entries:
        entries["worker"] = sys.intern(entries["worker"])
    for absent in _NULLABLE.get(name, ()):
        entries.setdefault(absent, None)
    try:
        return kind(**entries)
    except TypeError as error:
        raise ValueError(f"the entries of fact {name} do not fit: {error}") from error


@lru_cache(maxsize=1024)
def shared_seed(seed: tuple[int, int]) -> tuple[int, int]:
    """Return one object for equal seeds, since a generation's proposals all have the same."""
    return seed


@cache
def _parts(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return the origin and the arguments of a type, such as ``list`` and ``(float,)``."""
    return get_origin(hint), get_args(hint)


def _fits(value: object, hint: Any) -> bool:
    """Return whether a JSON value is of a field's type; tuples are lists in JSON."""
    if hint is Any:
        return True
    if hint is float:
        return type(value) in (float, int)
    outer, inner = _parts(hint)
    if outer in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if outer is dict:
        return isinstance(value, dict) and all(_fits(item, inner[1]) for item in value.values())
    if outer is list:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if outer is tuple:
        return (
            isinstance(value, list) and len(value) == len(inner) and all(map(_fits, value, inner))
        )
    return type(value) is hint
