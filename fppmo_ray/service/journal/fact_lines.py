"""Facts as the lines of a journal: JSON objects, and the usual ones read without a parser of JSON.

Most lines of a long journal are proposals and their feedback, so these are matched by patterns.
"""

from __future__ import annotations

import re
import sys
from dataclasses import fields
from functools import cache, lru_cache
from types import UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from fppmo_ray.distribution import Feedback, Proposal
from fppmo_ray.distribution.proposal import LARGEST_FIGURE, score_of
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


# Numbers as JSON writes them; of floats, those that show that they are none of its whole numbers.
_INT = rb"(?:0|[1-9]\d{0,17}+)"
_FLOAT = rb"-?(?:0|[1-9]\d*+)(?:\.\d++(?:e[-+]?\d++)?|e[-+]?\d++)"
_END = rb',"sum":".{16}"}\n'  # compared before
_match_proposal = re.compile(
    rb'{"fact":"Proposal","proposal_id":(%b),"generation":(%b),"macs":(%b),"parameters":(%b),'
    rb'"score_seed":\[(%b),(%b)\],(?:"macs_cut":(%b),)?"keep":"([\w+/=]*+)"%b'
    % (_INT, _INT, _INT, _INT, _INT, _INT, _FLOAT, _END)
).fullmatch
_match_feedback = re.compile(
    rb'{"fact":"Feedback","proposal_id":(%b),"val_loss":(%b),(?:"val_accuracy":(%b),)?'
    rb'"steps":(%b),"seconds":(%b),"worker":"([ !#-\[\]-~]*+)","at":([1-9]\d{0,10}\.\d++)%b'
    % (_INT, _FLOAT, _FLOAT, _INT, _FLOAT, _END)
).fullmatch


class Asked(NamedTuple):
    """The part of a proposal that the order of scores depends on."""

    proposal_id: int
    """See ``Proposal``."""
    parameters: int
    """See ``Proposal``."""
    macs_cut: float | None
    """See ``Proposal``."""


class Told(NamedTuple):
    """The part of a proposal's feedback that the order of scores depends on."""

    proposal_id: int
    """See ``Feedback``."""
    val_loss: float | None
    """See ``Feedback``."""
    val_accuracy: float | None
    """See ``Feedback``."""
    steps: int
    """See ``Feedback``."""

    @property
    def failed(self) -> bool:
        """Whether the proposal ended with an error instead of a score."""
        return self.val_loss is None

    @property
    def score(self) -> float | None:
        """See ``Feedback``."""
        return score_of(self)


Line = Fact | Asked | Told
"""What a line of a journal holds, or the part of it that was read."""


def ordinary(line: bytes, num_filters: int) -> Proposal | Feedback | None:
    """Return the fact of a line as most of them are written.

    Args:
        line: The line; its checksum has been looked at.
        num_filters: Length of a mask.

    Returns:
        None if the line holds something else, or the same in another spelling: parse it.

    Raises:
        ValueError: a figure is not finite, or the mask is of another length.
    """
    if (found := _match_proposal(line)) is not None:
        proposal_id, generation, macs, parameters, *seed, macs_cut, keep = found.groups()
        return Proposal(
            proposal_id=int(proposal_id),
            generation=int(generation),
            keep=packed_mask(keep, num_filters),
            macs=int(macs),
            parameters=int(parameters),
            score_seed=shared_seed((int(seed[0]), int(seed[1]))),
            macs_cut=_number(macs_cut),
        )
    if (found := _match_feedback(line)) is None:
        return None
    proposal_id, loss, accuracy, steps, seconds, worker, at = found.groups()
    return Feedback(
        proposal_id=int(proposal_id),
        val_loss=float(loss),
        val_accuracy=_number(accuracy),
        steps=int(steps),
        seconds=float(seconds),
        worker=sys.intern(worker.decode()),
        at=float(at),
    )


def skimmed(line: bytes, _num_filters: int) -> Asked | Told | None:
    """Return what orders scores of a line as most of them are written; None: parse it."""
    if (found := _match_proposal(line)) is not None:
        proposal_id, parameters, cut = found.group(1, 4, 7)
        return Asked(int(proposal_id), int(parameters), None if cut is None else float(cut))
    if (found := _match_feedback(line)) is None:
        return None
    proposal_id, loss, text, steps = found.group(1, 2, 3, 4)
    figure, accuracy = float(loss), None if text is None else float(text)
    is_usual = abs(figure) <= LARGEST_FIGURE and abs(accuracy or 0.0) <= LARGEST_FIGURE
    return Told(int(proposal_id), figure, accuracy, int(steps)) if is_usual else None


def reduced(fact: Fact) -> Line:
    """Return what orders scores of a proposal or of its feedback; other facts as they are."""
    if isinstance(fact, Proposal):
        return Asked(fact.proposal_id, fact.parameters, fact.macs_cut)
    if isinstance(fact, Feedback):
        return Told(fact.proposal_id, fact.val_loss, fact.val_accuracy, fact.steps)
    return fact


def _number(text: bytes | None) -> float | None:
    return None if text is None else float(text)
