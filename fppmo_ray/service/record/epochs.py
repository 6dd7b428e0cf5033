"""The journal on an object store, where nothing can be appended to, locked or renamed.

Every driver that opens the run begins an *epoch* of its own and writes only there::

    journal/claims/000002-5f0c...            empty: a driver wants to write epoch 2
    journal/000002-5f0c.../000000.jsonl      all facts before it, after a line that says how long
    journal/000002-5f0c.../000001.jsonl      what it records, an object each time

Epochs are ordered by their names: a number one above all seen, and something random.

A driver **opens** by (1) writing its claim, (2) reading the journal, (3) writing it as its epoch's
first object, (4) looking for a higher claim; it **records** by (1) writing the next object, (2)
looking. If there is a higher claim, it stops before it uses the facts. The **journal** is the
highest epoch with a whole first object: that, and the objects that follow without a gap.

Why nothing is lost: claims are never deleted, and a store shows every write that has returned. A
driver that uses facts saw no higher claim after writing them, so a higher driver claims, and then
reads, after they were written. It reads them in that epoch, or in a higher one whose driver, by
the same argument, had read them. A lower driver never gets past its next look. What a driver writes
without using it may be read or not, and is true either way. So a driver that dies or hangs at any
moment costs nothing, and of several at once the highest goes on: at most one.
"""

from __future__ import annotations

import itertools
import json
import secrets

from fppmo_ray.service.record.journal import complete_lines
from fppmo_ray.service.record.storage import Storage

EPOCHS = "journal"
_CLAIMS = f"{EPOCHS}/claims"


class EpochJournal:
    """An epoch and its one writer. Made by ``open_epoch``."""

    def __init__(self, storage: Storage, epoch: str) -> None:
        self._storage = storage
        self._epoch = epoch
        self._next = 1

    def append(self, lines: bytes) -> None:
        """See ``Journal.append``."""
        self._storage.write(_segment(self._epoch, self._next), lines)
        self._next += 1
        self.require_held()

    def require_held(self) -> None:
        """See ``Journal.require_held``."""
        highest = max(self._storage.names(_CLAIMS))
        if highest != self._epoch:
            raise RuntimeError(
                f"another driver has taken over the search in {self._storage.location} "
                f"(epoch {highest}, this one's was {self._epoch}); nothing is lost, it goes on "
                "from what was recorded"
            )


def open_epoch(storage: Storage) -> tuple[EpochJournal, bytes]:
    """Begin an epoch, which ends the one before; with it the lines of the journal so far.

    Raises:
        RuntimeError: another driver opened at the same time, and has the higher epoch.
    """
    epoch = _claim(storage)
    lines = read_epochs(storage) or b""
    storage.write(_segment(epoch, 0), _sealed(lines))
    journal = EpochJournal(storage, epoch)
    journal.require_held()
    return journal, lines


def read_epochs(storage: Storage) -> bytes | None:
    """The complete lines of the journal, or None where no epoch has begun."""
    for epoch in sorted(storage.names(_CLAIMS), reverse=True):
        lines = _read_epoch(storage, epoch)
        if lines is not None:
            return lines
    return None


def _claim(storage: Storage) -> str:
    highest = max(storage.names(_CLAIMS), default="0")
    number = int(highest.partition("-")[0]) + 1
    epoch = f"{number:06d}-{secrets.token_hex(6)}"
    storage.write(f"{_CLAIMS}/{epoch}", b"")
    return epoch


def _segment(epoch: str, number: int) -> str:
    return f"{EPOCHS}/{epoch}/{number:06d}.jsonl"


def _read_epoch(storage: Storage, epoch: str) -> bytes | None:
    there = {f"{EPOCHS}/{epoch}/{name}" for name in storage.names(f"{EPOCHS}/{epoch}")}
    names = map(_segment, itertools.repeat(epoch), itertools.count())
    unbroken = list(itertools.takewhile(there.__contains__, names))
    if not unbroken:
        return None
    first, *others = storage.read_all(unbroken)
    lines = _unsealed(first)
    return None if lines is None else lines + b"".join(map(complete_lines, others))


def _sealed(lines: bytes) -> bytes:
    """The lines behind their length: on stores that show what is half written, HDFS, it tells."""
    return json.dumps({"bytes": len(lines)}).encode() + b"\n" + lines


def _unsealed(content: bytes) -> bytes | None:
    header, newline, lines = content.partition(b"\n")
    return lines if newline and len(lines) == json.loads(header)["bytes"] else None
