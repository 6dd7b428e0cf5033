"""The only writer of a journal: of a locked file in a folder, or of a lease on an object store.

On an object store nothing can be appended to, locked or renamed.
Every driver that opens the run takes a *lease* and writes only below it. The lease's name is its
*fencing token*::

    journal/claims/000002-5f0c...            empty: a driver claims lease 2
    journal/000002-5f0c.../000000.jsonl      all facts before it, after a line with their length
    journal/000002-5f0c.../000001.jsonl      the facts it records, one object each time

Tokens are ordered by their names: a number one above all seen, then a random part.

A driver **opens** by (1) writing its claim, (2) reading the journal, (3) writing it as its lease's
first object, (4) looking for a higher claim; it **records** by (1) writing the next object, (2)
looking. If there is a higher claim, it stops before it uses the facts. The **journal** is the
highest lease with a whole first object: that, and the objects that follow without a gap.

Why nothing is lost: claims are never deleted, and a store shows every write that has returned. A
driver that uses facts saw no higher claim after writing them, so a higher driver claims, and then
reads, after they were written. It reads them in that lease, or in a higher one whose driver, by
the same argument, had read them. A lower driver stops at its next look. Facts that a driver writes
without using them may be read or not, and are true either way. So a driver that dies or hangs at
any moment costs nothing, and of several at once only the highest goes on.

``repair`` writes the lines before the first damaged one anew.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from fppmo_ray.durable_files import (
    explain_write_errors,
    require_file,
    sync_folder,
    write_whole,
)
from fppmo_ray.service.journal.journal import JOURNAL, before_transfer, complete_lines, read_lines
from fppmo_ray.service.journal.storage import Storage, open_storage, stage_run_dir

_LOCK = "lock"
LEASES = "journal"
_CLAIMS = f"{LEASES}/claims"
_TOKEN = re.compile(r"\d{6,}-[0-9a-f]+")


def read_file(folder: Path) -> bytes | None:
    """Return the complete lines of a folder's journal, or None if it has none.

    Raises:
        ValueError: a folder, pipe or device stands there.
    """
    journal = folder / JOURNAL
    require_file(journal)
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
        ValueError: another driver holds it, or the folder or a file in it is something else.
        OSError: the folder cannot be written.
    """
    journal = folder / JOURNAL
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"run directory {folder} must be a folder, or not exist; choose another")
    require_file(journal)
    require_file(folder / _LOCK)
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
            handed_over = [lines]
            del lines  # so that this frame does not keep them while the search runs
            yield FileJournal(file, journal), handed_over.pop()


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


class LeaseJournal:
    """The journal of one lease and its only writer. Made by ``open_lease``.

    Args:
        storage: Where the journal is.
        lease: The fencing token.
    """

    def __init__(self, storage: Storage, lease: str) -> None:
        self._storage = storage
        self._lease = lease
        self._next = 1

    def append(self, lines: bytes) -> None:
        """See ``Journal.append``."""
        self._storage.write(_segment(self._lease, self._next), lines)
        self._next += 1
        self.require_held()

    def require_held(self) -> None:
        """See ``Journal.require_held``."""
        highest = max(_claims(self._storage), default=None)
        if highest is None:
            raise RuntimeError(
                f"the journal in {self._storage.location} was deleted under the search; put it "
                "back and go on with --resume"
            )
        if highest != self._lease:
            raise RuntimeError(
                f"another driver has taken over the search in {self._storage.location} "
                f"(lease {highest}, this one's was {self._lease}); nothing is lost, it goes on "
                "from what was recorded"
            )


def open_lease(storage: Storage, lines: bytes | None = None) -> tuple[LeaseJournal, bytes]:
    """Take a lease, which ends the one before; return it with the lines of the journal so far.

    Args:
        storage: Where the journal is.
        lines: Lines to begin the lease with, of a repaired journal; None: the journal so far.

    Raises:
        RuntimeError: another driver opened at the same time, and has the higher lease.
    """
    lease = _claim(storage)
    lines = (read_leases(storage) or b"") if lines is None else lines
    storage.write(_segment(lease, 0), _sealed(lines))
    journal = LeaseJournal(storage, lease)
    journal.require_held()
    return journal, lines


def read_leases(storage: Storage) -> bytes | None:
    """Return the complete lines of the journal, or None if no lease was ever taken."""
    for lease in sorted(_claims(storage), reverse=True):
        lines = _read_lease(storage, lease)
        if lines is not None:
            return lines
    return None


def _claims(storage: Storage) -> list[str]:
    """Return the tokens of all claims, without files that something else has put beside them."""
    return [name for name in storage.names(_CLAIMS) if _TOKEN.fullmatch(name)]


def _claim(storage: Storage) -> str:
    highest = max(_claims(storage), default="0")
    number = int(highest.partition("-")[0]) + 1
    lease = f"{number:06d}-{secrets.token_hex(6)}"
    storage.write(f"{_CLAIMS}/{lease}", b"")
    return lease


def _segment(lease: str, number: int) -> str:
    return f"{LEASES}/{lease}/{number:06d}.jsonl"


def _read_lease(storage: Storage, lease: str) -> bytes | None:
    there = {f"{LEASES}/{lease}/{name}" for name in storage.names(f"{LEASES}/{lease}")}
    names = map(_segment, itertools.repeat(lease), itertools.count())
    unbroken = list(itertools.takewhile(there.__contains__, names))
    if not unbroken:
        return None
    first, *others = storage.read_all(unbroken)
    lines = _unsealed(first)
    return None if lines is None else lines + b"".join(map(complete_lines, others))


def _sealed(lines: bytes) -> bytes:
    """Return the lines after a line with their length, which shows torn objects (on HDFS)."""
    return b'{"bytes": %d}\n%b' % (len(lines), lines)


def _unsealed(content: bytes) -> bytes | None:
    lines = content.partition(b"\n")[2]
    return lines if content == _sealed(lines) else None


def repair(run_dir: str | Path) -> list[str]:
    """Cut the journals of a search and of its stages before their first damaged lines.

    The damaged journal is kept under another name, or in an earlier lease of an object store. What
    a journal lacks is done again when the search is resumed, with the same result.

    Args:
        run_dir: Folder or URI of the search, whose driver has ended.

    Returns:
        A sentence about each journal.

    Raises:
        ValueError: there is no journal, it is of another format, or a driver is writing it.
    """
    sentences = []
    stages = (stage_run_dir(run_dir, number) for number in itertools.count(1))
    for place in itertools.chain([run_dir], stages):
        storage = open_storage(place)
        lines = read_leases(storage) if storage.local is None else read_file(storage.local)
        if lines is None:
            break
        sentences.append(_repair_folder(storage.local) if storage.local else _repair_leases(place))
    if not sentences:
        raise ValueError(f"{storage.location} holds no journal; expected a search's run directory")
    return sentences


def _repair_folder(folder: Path) -> str:
    journal = folder / JOURNAL
    with open_file(folder) as (_, lines):
        kept = _undamaged(before_transfer(lines), str(journal))
        if kept == lines:
            return _no_damage(journal, lines)
        names = (f"journal-damaged-{number}.jsonl" for number in itertools.count(1))
        backup = next(folder / name for name in names if not (folder / name).exists())
        write_whole(backup, lines)
        write_whole(journal, kept)
    return f"{_cut(journal, lines, kept)}; the damaged journal is kept as {backup.name}"


def _repair_leases(run_dir: str | Path) -> str:
    storage = open_storage(run_dir)
    place = f"{storage.location}/{LEASES}"
    lines = read_leases(storage) or b""
    kept = _undamaged(lines, place)
    if kept == lines:
        return _no_damage(place, lines)
    open_lease(storage, kept)
    return f"{_cut(place, lines, kept)}; the damaged journal is kept in the lease before"


def _undamaged(lines: bytes, place: str) -> bytes:
    """Return the lines before the first damaged one."""
    damage = read_lines(lines).damage
    if damage is None:
        return lines
    if not damage.can_be_repaired:
        raise ValueError(f"{place} cannot be repaired: {damage.reason}")
    return lines[: damage.start]


def _no_damage(place: str | Path, lines: bytes) -> str:
    return f"{place} is undamaged, all {len(lines.splitlines())} lines"


def _cut(place: str | Path, lines: bytes, kept: bytes) -> str:
    num_kept, num_lines = (content.count(b"\n") for content in (kept, lines))
    if num_kept == num_lines:
        return f"{place} is as before its transfer as text, all {num_lines} lines"
    return (
        f"{place} now ends after line {num_kept}, the last one before the damage "
        f"({num_lines - num_kept} lines were removed); resume the search with --resume"
    )
