"""A journal: facts as JSON lines, each with a checksum that shows damage."""

from __future__ import annotations

import gc
import json
import re
from binascii import hexlify
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from io import BytesIO
from sys import intern
from typing import Any, NamedTuple, Protocol

from fppmo_ray.distribution import Feedback, Proposal
from fppmo_ray.distribution.proposal import fault_of, score_of
from fppmo_ray.service.journal.facts import (
    FORMAT,
    Fact,
    Started,
    fact_from_json,
    fact_to_json,
    packed_mask,
    shared_seed,
)

JOURNAL = "journal.jsonl"
_TAIL_BYTES = len(b',"sum":"') + 16 + 2  # 64 bits in hexadecimal, a quotation mark and a brace
_decode = json.JSONDecoder().raw_decode
# Numbers as JSON writes them; of floats, those that show that they are none of its whole numbers.
_INT = rb"(?:0|[1-9]\d{0,17}+)"
_FLOAT = rb"-?(?:0|[1-9]\d*+)(?:\.\d++(?:e[-+]?\d++)?|e[-+]?\d++)"
_END = rb',"sum":"[0-9a-f]{16}"}\n'
_PROPOSAL_LINE = re.compile(
    rb'{"fact":"Proposal","proposal_id":(%b),"generation":(%b),"macs":(%b),"parameters":(%b),'
    rb'"score_seed":\[(%b),(%b)\],(?:"macs_cut":(%b),)?"keep":"([\w+/=]*+)"%b'
    % (_INT, _INT, _INT, _INT, _INT, _INT, _FLOAT, _END)
)
_FEEDBACK_LINE = re.compile(
    rb'{"fact":"Feedback","proposal_id":(%b),"val_loss":(%b),(?:"val_accuracy":(%b),)?'
    rb'"steps":(%b),"seconds":(%b),"worker":"([ !#-\[\]-~]*+)","at":([1-9]\d{0,10}\.\d++)%b'
    % (_INT, _FLOAT, _FLOAT, _INT, _FLOAT, _END)
)


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


_Line = Fact | Asked | Told
_ASKING, _TELLING = (Asked, Proposal), (Told, Feedback)


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
    asked: set[int] = set()
    ordinary: Callable[[bytes, int], _Line | None] = _skimmed if skim else _ordinary
    num_filters, start, previous = 0, 0, b""
    with _without_garbage_collection():
        for line in BytesIO(lines):  # a list of all lines would take as much memory again
            try:
                previous = _checked(line, previous)
                fact: _Line | None = ordinary(line, num_filters) if read.facts else None
                if fact is None:
                    fact = fact_from_json(_parsed(line), num_filters)
                    _require_order(fact, not read.facts)
                    if isinstance(fact, Started):
                        num_filters = fact.num_filters
                    fact = _reduced(fact) if skim else fact
                if isinstance(fact, _ASKING):
                    asked.add(fact.proposal_id)
                elif isinstance(fact, _TELLING) and fact.proposal_id not in asked:
                    raise ValueError(
                        f"it is feedback for proposal {fact.proposal_id}, which no line asks for"
                    )
            except ValueError as error:
                damage = _damage_of_first(line) if not read.facts else None
                damage = damage or Damage(reason=str(error), start=start, can_be_repaired=True)
                return replace(read, damage=damage)
            if isinstance(fact, Asked):
                read.asked.append(fact)
            elif isinstance(fact, Told):
                read.told.append(fact)
            else:
                read.facts.append(fact)
            start += len(line)
    return read


def _ordinary(line: bytes, num_filters: int) -> Proposal | Feedback | None:
    """Return the fact of a line as ``to_lines`` writes most of them, without a parser of JSON.

    Args:
        line: The line; its checksum has been looked at.
        num_filters: Length of a mask.

    Returns:
        None if the line holds something else, or the same in another spelling: parse it.

    Raises:
        ValueError: a figure is not finite, or the mask is of another length.
    """
    if (found := _PROPOSAL_LINE.fullmatch(line)) is not None:
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
    if (found := _FEEDBACK_LINE.fullmatch(line)) is None:
        return None
    proposal_id, loss, accuracy, steps, seconds, worker, at = found.groups()
    return Feedback(
        proposal_id=int(proposal_id),
        val_loss=float(loss),
        val_accuracy=_number(accuracy),
        steps=int(steps),
        seconds=float(seconds),
        worker=intern(worker.decode()),
        at=float(at),
    )


def _skimmed(line: bytes, num_filters: int) -> Asked | Told | None:
    """Return what orders scores of a line as ``to_lines`` writes most of them; None: parse it."""
    if (found := _PROPOSAL_LINE.fullmatch(line)) is not None:
        proposal_id, _, _, parameters, _, _, macs_cut, _ = found.groups()
        return Asked(int(proposal_id), int(parameters), _number(macs_cut))
    if (found := _FEEDBACK_LINE.fullmatch(line)) is None:
        return None
    proposal_id, loss, accuracy, steps, *_ = found.groups()
    loss, accuracy = float(loss), _number(accuracy)
    if fault_of(loss) is not None or (accuracy is not None and fault_of(accuracy) is not None):
        return None  # to be refused
    return Told(int(proposal_id), loss, accuracy, int(steps))


def _reduced(fact: Fact) -> _Line:
    """Return what orders scores of a proposal or of its feedback; other facts as they are."""
    if isinstance(fact, Proposal):
        return Asked(fact.proposal_id, fact.parameters, fact.macs_cut)
    if isinstance(fact, Feedback):
        return Told(fact.proposal_id, fact.val_loss, fact.val_accuracy, fact.steps)
    return fact


def _number(text: bytes | None) -> float | None:
    return None if text is None else float(text)


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


def _checked(line: bytes, previous: bytes) -> bytes:
    """Return the checksum of a line, compared with the one that it holds."""
    checksum = _checksum(line[: -_TAIL_BYTES - 1], previous)
    if not line.endswith(_tail(checksum) + b"\n"):
        raise ValueError(
            "its checksum does not fit, so it was changed, or a line before it was removed, added "
            "or moved"
        )
    return checksum


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
