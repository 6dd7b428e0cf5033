"""The journal on an object store, where nothing can be appended to, locked or renamed.

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
"""

from __future__ import annotations

import itertools
import re
import secrets

from fppmo_ray.service.journal.journal import complete_lines
from fppmo_ray.service.journal.storage import Storage

LEASES = "journal"
_CLAIMS = f"{LEASES}/claims"
_TOKEN = re.compile(r"\d{6,}-[0-9a-f]+")


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
