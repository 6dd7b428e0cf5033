"""A journal: facts as JSON lines, and the file that a local run directory keeps them in."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

from fppmo_ray.durable_files import sync_folder
from fppmo_ray.service.journal.facts import (
    FORMAT,
    Fact,
    Started,
    fact_from_json,
    fact_to_json,
)

JOURNAL = "journal.jsonl"
_LOCK = "lock"


class Journal(Protocol):
    """The journal that the only writer of a run directory appends to."""

    def append(self, lines: bytes) -> None:
        """Make lines durable.

        Raises:
            RuntimeError: another driver has taken the search over.
        """

    def require_held(self) -> None:
        """Check that this driver is still the only writer.

        Raises:
            RuntimeError: another driver has taken the search over.
        """


def to_lines(facts: Iterable[Fact]) -> bytes:
    """Return one JSON line per fact."""
    lines = [json.dumps(fact_to_json(fact), separators=(",", ":")) + "\n" for fact in facts]
    return "".join(lines).encode()


def from_lines(lines: bytes, location: str) -> list[Fact]:
    """Return the facts of complete lines.

    Args:
        lines: A journal, of which the first line is a ``Started``.
        location: Name of the journal, for the message.

    Raises:
        ValueError: a line is damaged or of another format; names its number.
    """
    facts: list[Fact] = []
    num_filters = 0
    for number, line in enumerate(lines.splitlines(), start=1):
        try:
            data = json.loads(line)
            if number == 1:
                _require_format(data)
            fact = fact_from_json(data, num_filters)
        except (ValueError, TypeError, AttributeError) as error:  # AttributeError: not an object
            raise ValueError(f"{location}, line {number} is damaged: {error}") from error
        if isinstance(fact, Started):
            num_filters = fact.num_filters
        facts.append(fact)
    return facts


def _require_format(data: dict[str, Any]) -> None:
    if data.get("format") != FORMAT:
        raise ValueError(
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
    """A file that is appended to under a lock. Made by ``open_file``."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def append(self, lines: bytes) -> None:
        """See ``Journal.append``."""
        self._file.write(lines)
        self._file.flush()
        os.fsync(self._file.fileno())

    def require_held(self) -> None:
        """See ``Journal.require_held``: the lock holds as long as the process."""


@contextmanager
def open_file(folder: Path) -> Iterator[tuple[FileJournal, bytes]]:
    """Hold a folder's journal, made if absent; yield it with its complete lines.

    Raises:
        ValueError: another driver holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("ab") as lock:
        _require_lock(lock, folder)
        lines = read_file(folder) or b""
        with (folder / JOURNAL).open("ab") as file:
            file.truncate(len(lines))
            sync_folder(folder)
            yield FileJournal(file), lines


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
