"""A journal: facts as JSON lines, each with a checksum that shows damage."""

from __future__ import annotations

import gc
import json
from binascii import hexlify
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from io import BytesIO
from typing import Any, Protocol

from fppmo_ray.distribution import Feedback, Proposal
from fppmo_ray.service.journal.fact_lines import (
    Asked,
    Line,
    Told,
    fact_from_json,
    fact_to_json,
    ordinary,
    reduced,
    skimmed,
)
from fppmo_ray.service.journal.facts import FORMAT, Fact, Started

JOURNAL = "journal.jsonl"
_TAIL_BYTES = len(b',"sum":"') + 16 + 2  # 64 bits in hexadecimal, a quotation mark and a brace
_decode = json.JSONDecoder().raw_decode
_ASKING, _TELLING = (Asked, Proposal), (Told, Feedback)


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
    return lines[-19:-3]


def from_lines(lines: bytes, run_dir: str, name: str = JOURNAL) -> list[Fact]:
    """Return the facts of complete lines.

    Args:
        lines: A journal, of which the first line is a ``Started``.
        run_dir: Path or URI of the run directory, for the message.
        name: Name of the journal in it, for the message.

    Raises:
        ValueError: a line is damaged or of another format; names its number.
    """
    return undamaged(read_lines(lines), run_dir, name).facts


def undamaged(read: LinesRead, run_dir: str, name: str = JOURNAL) -> LinesRead:
    """Return what was read of a journal.

    Args:
        read: What was read.
        run_dir: Path or URI of the run directory, for the message.
        name: Name of the journal in it, for the message.

    Raises:
        ValueError: a line is damaged or of another format; names its number.
    """
    if read.damage is None:
        return read
    before = len(read.facts) + len(read.asked) + len(read.told)
    place = f"{run_dir}/{name}, line {before + 1}"
    if not read.damage.can_be_repaired:
        raise ValueError(f"{place}: {read.damage.reason}")
    if read.damage.is_of_transfer:
        raise ValueError(
            f"{place} is damaged: {read.damage.reason}; `fppmo-ray repair {run_dir}` undoes that"
        )
    raise ValueError(
        f"{place} is damaged: {read.damage.reason}; `fppmo-ray repair {run_dir}` keeps the "
        f"{before} lines before it, and the search then does the rest again with --resume"
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
    is_of_transfer: bool = False
    """Whether ``before_transfer`` mends it."""


@dataclass(frozen=True, kw_only=True)
class LinesRead:
    """A journal's facts up to the first damaged line."""

    facts: list[Fact]
    """The facts, in order; without proposals and feedback if they were skimmed."""
    asked: list[Asked]
    """The proposals, in order, if they were skimmed."""
    told: list[Told]
    """The feedback, in order, if it was skimmed."""
    damage: Damage | None
    """The first damaged line, if there is one."""


def read_lines(lines: bytes, *, skim: bool = False) -> LinesRead:
    """Return the facts of complete lines up to the first damaged one, and its damage.

    Args:
        lines: A journal, of which the first line is a ``Started``.
        skim: Whether only what orders scores is read of proposals and their feedback: no masks,
            times and workers. That is twice as fast. All checksums are looked at.
    """
    read = LinesRead(facts=[], asked=[], told=[], damage=None)
    lists: dict[type, list[Any]] = {Asked: read.asked, Told: read.told}
    asked: set[int] = set()
    without_parser = skimmed if skim else ordinary
    num_filters, start = 0, 0
    try:
        with _without_garbage_collection():
            for line in _unchanged(lines):
                fact: Line | None = without_parser(line, num_filters) if read.facts else None
                if fact is None:
                    fact = fact_from_json(_parsed(line), num_filters)
                    _require_order(fact, not read.facts)
                    if isinstance(fact, Started):
                        num_filters = fact.num_filters
                    fact = reduced(fact) if skim else fact
                if isinstance(fact, _ASKING):
                    asked.add(fact.proposal_id)
                elif isinstance(fact, _TELLING) and fact.proposal_id not in asked:
                    raise ValueError(
                        f"it is feedback for proposal {fact.proposal_id}, which no line asks for"
                    )
                lists.get(type(fact), read.facts).append(fact)
                start += len(line)
    except ValueError as error:
        damage = _damage_of_first(next(BytesIO(lines))) if not read.facts else None
        damage = damage or Damage(reason=str(error), start=start, can_be_repaired=True)
        return replace(read, damage=damage)
    return read


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Pause the search for cycles, which facts have none of: it takes a fifth of a long journal."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _checksum(body: bytes, previous: bytes) -> bytes:
    return hexlify(blake2b(previous + body, digest_size=8).digest())


def _tail(checksum: bytes) -> bytes:
    return b',"sum":"%b"}' % checksum


def _unchanged(lines: bytes) -> Iterator[bytes]:
    """Give one line after the other, whose checksums fit.

    Raises:
        ValueError: the next line's does not.
    """
    previous = b""
    for line in BytesIO(lines):  # a list of all lines would take as much memory again
        # As _checksum and _tail do; their calls took 0.05 of the 0.49 s of 200,000 lines.
        previous = hexlify(blake2b(previous + line[: -_TAIL_BYTES - 1], digest_size=8).digest())
        if not line.endswith(b',"sum":"%b"}\n' % previous):
            raise ValueError(
                "its checksum does not fit, so it was changed, or a line before it was removed, "
                "added or moved"
            )
        yield line


def _parsed(line: bytes) -> Any:
    """Return the JSON value of a line; ``json.loads`` looks for white space first, and is slower.

    Raises:
        ValueError: it is not one value of JSON, or nested too deeply.
    """
    text = line.decode()
    try:
        value, end = _decode(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if end != len(text) - 1:
        raise ValueError("something follows its JSON object")
    return value


def _require_order(fact: Fact, is_first: bool) -> None:
    """Refuse a first line that is none, and others that are one.

    Args:
        fact: The fact.
        is_first: Whether it stands in the first line.
    """
    if isinstance(fact, Started) != is_first:
        raise ValueError(f"expected Started in the first line alone, got {type(fact).__name__}")
    if isinstance(fact, Started) and fact.format != FORMAT:
        raise ValueError(f"expected a journal of format {FORMAT}, got {fact.format}")


def before_transfer(content: bytes) -> bytes:
    """Return a journal without the marks that a transfer as text adds, which no journal has.

    Args:
        content: The journal, with or without a byte-order mark and carriage returns.
    """
    return content.removeprefix(BOM_UTF8).replace(b"\r\n", b"\n")


def _damage_of_first(line: bytes) -> Damage | None:
    """Return what is known of a first line that cannot be read."""
    if (other := _other_format(line)) is not None:
        return Damage(reason=other, start=0, can_be_repaired=False)
    if before_transfer(line) == line:
        return None
    reason = "a transfer as text has added carriage returns or a byte-order mark"
    return Damage(reason=reason, start=0, can_be_repaired=True, is_of_transfer=True)


def _other_format(line: bytes) -> str | None:
    """Return why a first line is of another version's journal; None if it is a damaged one."""
    try:
        data = _parsed(line)
    except ValueError:
        return None
    if not isinstance(data, dict) or data.get("format") == FORMAT:
        return None
    is_whole = line.endswith(_tail(_checksum(line[: -_TAIL_BYTES - 1], b"")) + b"\n")
    if "sum" in data and ("format" not in data or not is_whole):
        return None
    return (
        f"expected a journal of format {FORMAT}, got {data.get('format')}; read it with the "
        "version of fppmo_ray that wrote it"
    )


def complete_lines(content: bytes) -> bytes:
    """Return the content without a torn last line, which counts as never written."""
    return content[: content.rfind(b"\n") + 1]
