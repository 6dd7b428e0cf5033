"""A journal: facts as JSON lines, and the file that a local run directory keeps them in."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

from fppmo_ray.durable_files import sync_folder
from fppmo_ray.service.record.facts import Fact, fact_from_json, fact_to_json

JOURNAL = "journal.jsonl"
_LOCK = "lock"


class Journal(Protocol):
    """Where the one writer of a run directory appends."""

    def append(self, lines: bytes) -> None:
        """Make lines durable.

        Raises:
            RuntimeError: another driver has taken the search over.
        """

    def require_held(self) -> None:
        """Nothing if this driver is still the one writer.

        Raises:
            RuntimeError: another driver has taken the search over.
        """


def to_lines(facts: Iterable[Fact]) -> bytes:
    """One JSON line per fact."""
    lines = [json.dumps(fact_to_json(fact), separators=(",", ":")) + "\n" for fact in facts]
    return "".join(lines).encode()


def from_lines(lines: bytes, location: str) -> list[Fact]:
    """The facts of complete lines.

    Raises:
        ValueError: a line is damaged; says which one of ``location``.
    """
    facts = []
    for number, line in enumerate(lines.splitlines(), start=1):
        try:
            facts.append(fact_from_json(json.loads(line)))
        except (ValueError, TypeError) as error:  # TypeError: JSON, but no object
            raise ValueError(f"{location}, line {number} is damaged: {error}") from error
    return facts


def complete_lines(content: bytes) -> bytes:
    """The content without a torn last line, which counts as never written."""
    return content[: content.rfind(b"\n") + 1]


def read_file(folder: Path) -> bytes | None:
    """The complete lines of a folder's journal, or None where it has none."""
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
    """Hold a folder's journal, made if absent; with it the complete lines that it has.

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
