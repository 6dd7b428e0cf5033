"""A journal: facts as JSON lines, and the file that a local run directory keeps them in."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any, Protocol

from fppmo_ray.distribution import Feedback, Proposal
from fppmo_ray.durable_files import explain_write_errors, sync_folder
from fppmo_ray.service.journal.facts import (
    FORMAT,
    Fact,
    Started,
    fact_from_json,
    fact_to_json,
)

JOURNAL = "journal.jsonl"
_LOCK = "lock"
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


def read_file(folder: Path) -> bytes | None:
    """Return the complete lines of a folder's journal, or None if it has none."""
    journal = folder / JOURNAL
    return complete_lines(journal.read_bytes()) if journal.is_file() else None


class FileJournal:
    """A file that is appended to under a lock. Made by ``open_file``.

    Args:
        file: The journal, open without a buffer at its end.
        path: Its path.
    """

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file = file
        self._path = path

    def append(self, lines: bytes) -> None:
        """See ``Journal.append``.

        Raises:
            OSError: the disk is full or fails; the journal is left as it was.
        """
        end = self._file.tell()
        with explain_write_errors(self._path):
            try:
                left = memoryview(lines)
                while left:
                    left = left[self._file.write(left) :]
                os.fsync(self._file.fileno())
            except OSError:
                with suppress(OSError):
                    self._file.truncate(end)
                raise
        self.require_held()

    def require_held(self) -> None:
        """See ``Journal.require_held``; the lock holds as long as the process and the file."""
        try:
            is_there = os.path.samestat(self._path.stat(), os.fstat(self._file.fileno()))
        except OSError:  # not found, or the network file system has lost it
            is_there = False
        if not is_there:
            raise RuntimeError(
                f"{self._path} is not the file any more that this search writes: the run directory "
                "was deleted, moved, replaced or unmounted; put it back and go on with --resume"
            )


@contextmanager
def open_file(folder: Path) -> Iterator[tuple[FileJournal, bytes]]:
    """Hold a folder's journal, made if absent; yield it with its complete lines.

    Raises:
        ValueError: another driver holds it.
        OSError: the folder cannot be written.
    """
    journal = folder / JOURNAL
    with explain_write_errors(journal):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / _LOCK).open("ab")
    with lock:
        _require_lock(lock, folder)
        lines = read_file(folder) or b""
        with explain_write_errors(journal):
            file = journal.open("ab", buffering=0)
        with file:
            with explain_write_errors(journal):
                file.truncate(len(lines))
                file.seek(0, os.SEEK_END)
                sync_folder(folder)
            yield FileJournal(file, journal), lines


def _require_lock(lock: IO[bytes], folder: Path) -> None:
    # On NFS (EFS) Linux turns flock into a byte-range lock of the server's, so it holds between
    # machines; it needs the file to be open for writing. Buckets mounted as folders have no locks:
    # give their URI instead.
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"{folder} is being written by another driver; wait for it, or stop it"
        ) from error
    except OSError as error:
        raise OSError(
            f"{folder} cannot be locked: {error.strerror or error}; choose a run directory on a "
            "file system with locks, or give a bucket's URI"
        ) from error
