"""A journal: facts as JSON lines, each with a checksum that shows damage."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Protocol

from fppmo_ray.distribution import Feedback, Proposal
from fppmo_ray.service.journal.facts import (
    FORMAT,
    Fact,
    Started,
    fact_from_json,
    fact_to_json,
)

JOURNAL = "journal.jsonl"
_SUM = b',"sum":"'
_TAIL_BYTES = len(_SUM) + 16 + 2  # 64 bits in hexadecimal, a quotation mark and a brace


class Journal(Protocol):
    """The journal that the only writer of a run directory appends to."""

    def append(self, lines: bytes) -> None:
        """Make lines durable.

        Raises:
            RuntimeError: another driver has taken the search over, or the journal is gone.
        """

    def require_held(self) -> None:
        """Check that this driver is still the only writer of a journal that is there.

        Raises:
            RuntimeError: another driver has taken the search over, or the journal is gone.
        """


def to_lines(facts: Iterable[Fact], previous: bytes = b"") -> bytes:
    """Return one JSON line per fact, whose last entry is a checksum.

    The checksum covers the line's other bytes and the checksum of the line before, so that changed,
    removed, added and moved lines show.

    Args:
        facts: The facts.
        previous: Checksum of the line before the first of them; empty at the journal's start.
    """
    lines = []
    for fact in facts:
        body = json.dumps(fact_to_json(fact), separators=(",", ":")).encode().removesuffix(b"}")
        previous = _checksum(body, previous)
        lines.append(body + _tail(previous) + b"\n")
    return b"".join(lines)


def last_checksum(lines: bytes) -> bytes:
    """Return the checksum of the last of complete lines; empty if there are none."""
    return lines[-_TAIL_BYTES - 1 :][len(_SUM) : -3]


def from_lines(lines: bytes, run_dir: str, name: str = JOURNAL) -> list[Fact]:
    """Return the facts of complete lines.

    Args:
        lines: A journal, of which the first line is a ``Started``.
        run_dir: Path or URI of the run directory, for the message.
        name: Name of the journal in it, for the message.

    Raises:
        ValueError: a line is damaged or of another format; names its number.
    """
    facts, damage = read_lines(lines)
    if damage is None:
        return facts
    place = f"{run_dir}/{name}, line {len(facts) + 1}"
    if not damage.can_be_repaired:
        raise ValueError(f"{place}: {damage.reason}")
    raise ValueError(
        f"{place} is damaged: {damage.reason}; `fppmo-ray repair {run_dir}` keeps the "
        f"{len(facts)} lines before it, and the search then does the rest again with --resume"
    )


@dataclass(frozen=True, kw_only=True)
class Damage:
    """The first line of a journal that cannot be read."""

    reason: str
    """What is wrong with it."""
    start: int
    """Number of bytes before it."""
    can_be_repaired: bool
    """Whether the lines before it can be kept: False for a journal of another format."""


def read_lines(lines: bytes) -> tuple[list[Fact], Damage | None]:
    """Return the facts of complete lines up to the first damaged one, and its damage.

    Args:
        lines: A journal, of which the first line is a ``Started``.
    """
    facts: list[Fact] = []
    asked: set[int] = set()
    num_filters, start, previous = 0, 0, b""
    for line in lines.split(b"\n")[:-1]:
        try:
            body, previous = _checked(line, previous)
            fact = fact_from_json(_parsed(body + b"}"), num_filters)
            _require_order(fact, is_first=not facts, asked=asked)
        except ValueError as error:
            other = None if facts else _other_format(line)
            return facts, Damage(
                reason=other or str(error), start=start, can_be_repaired=other is None
            )
        if isinstance(fact, Started):
            num_filters = fact.num_filters
        facts.append(fact)
        start += len(line) + 1
    return facts, None


def _checksum(body: bytes, previous: bytes) -> bytes:
    return blake2b(previous + body, digest_size=8).hexdigest().encode()


def _tail(checksum: bytes) -> bytes:
    return _SUM + checksum + b'"}'


def _checked(line: bytes, previous: bytes) -> tuple[bytes, bytes]:
    """Return what the line's checksum covers, and the checksum."""
    body, tail = line[:-_TAIL_BYTES], line[-_TAIL_BYTES:]
    checksum = _checksum(body, previous)
    if tail != _tail(checksum):
        raise ValueError(
            "its checksum does not fit, so it was changed, or a line before it was removed, added "
            "or moved"
        )
    return body, checksum


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode())  # of bytes, json would guess the encoding
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _require_order(fact: Fact, *, is_first: bool, asked: set[int]) -> None:
    """Refuse facts that no search writes in this order, and note the proposals asked for."""
    if isinstance(fact, Started) != is_first:
        raise ValueError(f"expected Started in the first line alone, got {type(fact).__name__}")
    if isinstance(fact, Started) and fact.format != FORMAT:
        raise ValueError(f"expected a journal of format {FORMAT}, got {fact.format}")
    if isinstance(fact, Proposal):
        asked.add(fact.proposal_id)
    elif isinstance(fact, Feedback) and fact.proposal_id not in asked:
        raise ValueError(f"it is feedback for proposal {fact.proposal_id}, which no line asks for")


def _other_format(line: bytes) -> str | None:
    """Return why a first line is of another version's journal; None if it is a damaged one."""
    try:
        data = _parsed(line)
    except ValueError:
        return None
    if not isinstance(data, dict) or data.get("format") == FORMAT:
        return None
    body, tail = line[:-_TAIL_BYTES], line[-_TAIL_BYTES:]
    if "sum" in data and ("format" not in data or tail != _tail(_checksum(body, b""))):
        return None
    return (
        f"expected a journal of format {FORMAT}, got {data.get('format')}; read it with the "
        "version of fppmo_ray that wrote it"
    )


def complete_lines(content: bytes) -> bytes:
    """Return the content without a torn last line, which counts as never written."""
    return content[: content.rfind(b"\n") + 1]
