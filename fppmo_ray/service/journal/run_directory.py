"""A run directory: the journal and the artifacts it names, with one writer at a time."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from fppmo_ray.service.journal.facts import EpochFinished, Fact, Finished, Started
from fppmo_ray.service.journal.journal import (
    JOURNAL,
    Journal,
    LinesRead,
    from_lines,
    last_checksum,
    read_lines,
    to_lines,
    undamaged,
)
from fppmo_ray.service.journal.storage import Storage, open_storage, stage_run_dir
from fppmo_ray.service.journal.writers import (
    LEASES,
    open_file,
    open_lease,
    read_file,
    read_leases,
)

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
"""Folder of the trainings' checkpoints, below a run directory."""

Resume = bool | Literal["auto"]
"""True: resume the search that is there; False: begin one; ``auto``: resume it if there is one by
now, even from another driver that began at the same time, else begin."""

_AnyFact = TypeVar("_AnyFact", bound=Fact)


def read_journal(run_dir: str | Path) -> list[Fact]:
    """Return the facts of a run directory's journal; a torn last line counts as never written.

    Args:
        run_dir: Folder or URI; see ``open_storage``.

    Raises:
        ValueError: there is no journal, it is damaged, or its store cannot be reached.
    """
    return _read_journal(run_dir, skim=False).facts


def skim_journal(run_dir: str | Path) -> LinesRead:
    """Return what a run directory's journal says without masks, and without times of scores.

    Args:
        run_dir: Folder or URI; see ``open_storage``.

    Raises:
        ValueError: see ``read_journal``.
    """
    return _read_journal(run_dir, skim=True)


def _read_journal(run_dir: str | Path, *, skim: bool) -> LinesRead:
    storage = open_storage(run_dir)
    lines = _read_lines(storage)
    if lines is None:
        raise ValueError(
            f"{storage.location} holds no {_journal_name(storage)}; "
            "expected the run directory of a search"
        )
    return undamaged(read_lines(lines, skim=skim), storage.location, _journal_name(storage))


def begun_stages(run_dir: str | Path) -> list[Path | str]:
    """Return the run directories of a search's stages that have begun; none if it has no stages.

    Args:
        run_dir: Run directory of the whole search, a folder or a URI.
    """
    places = (stage_run_dir(run_dir, number) for number in itertools.count(1))
    return list(itertools.takewhile(lambda place: _read_lines(open_storage(place)), places))


def require_fit(run_dir: str | Path, *, resume: Resume, started: Started | None = None) -> None:
    """Refuse what ``open_run`` would refuse, without creating or disturbing anything.

    Args:
        run_dir: Folder or URI; see ``open_storage``.
        resume: See ``open_run``.
        started: See ``open_run``.

    Raises:
        ValueError: see ``open_run``.
    """
    _require_fit(open_storage(run_dir), resume, started)


@contextmanager
def open_run(
    run_dir: str | Path, *, resume: Resume, started: Started | None = None
) -> Iterator[RunDirectory]:
    """Hold a run directory as its single writer.

    A folder is held by a lock. On an object store this driver takes over from any other, which
    stops when it next records something.

    Args:
        run_dir: Folder or URI; see ``open_storage``. A folder is made if absent.
        resume: Whether to resume a search or to begin one; see ``Resume``.
        started: The first fact of the search, for ``RunDirectory.start``. A search that does not
            fit is refused before another driver is disturbed.

    Raises:
        ValueError: another driver writes in this folder; a search is here and ``resume`` is False,
            or another one than ``started``; or ``resume`` is True and there is none; or the journal
            is damaged.
        OSError: the folder cannot be written.
        RuntimeError: another driver has opened this object store's run at the same time.
    """
    storage = open_storage(run_dir)
    seen = _require_fit(storage, resume, started)
    journal: Journal
    with ExitStack() as stack:
        if storage.local is None:
            journal, lines = open_lease(storage)
        else:
            journal, lines = stack.enter_context(open_file(storage.local))
        facts = seen.facts if seen.digest == _digest(lines) else _facts_of(lines, storage)
        checksum = last_checksum(lines)
        del seen, lines  # which nobody needs any more, and which are as large as the facts
        _require_wanted(facts, storage, resume)
        _clear_orphans(storage, facts)
        run = RunDirectory(storage, journal, facts, checksum)
        del facts
        if started is not None:
            run.start(started)
        yield run


class RunDirectory:
    """Journal and artifacts of a search. Made by ``open_run``.

    ``facts`` are the journal's facts so far, in order. ``record`` makes new ones durable before
    it returns. Artifacts are written whole, before the fact that names them.
    """

    def __init__(
        self, storage: Storage, journal: Journal, facts: list[Fact], checksum: bytes
    ) -> None:
        self.facts: list[Fact] = []
        self._observers: list[Callable[[Fact], None]] = []
        self._checksum = checksum  # of the journal's last line
        self._by_kind: dict[type, list[Any]] = defaultdict(list)
        self._take_in(facts)
        self._storage = storage
        self._journal = journal

    @property
    def location(self) -> str:
        """Path or URI for messages."""
        return self._storage.location

    def record(self, facts: Iterable[Fact]) -> None:
        """Append facts and wait until they are durable.

        Raises:
            RuntimeError: another driver has taken the search over; the facts must not be used.
        """
        new = list(facts)
        if new:
            lines = to_lines(new, self._checksum)
            self._journal.append(lines)
            self._checksum = last_checksum(lines)
            self._take_in(new)
            for observer in self._observers:
                for fact in new:
                    observer(fact)

    def observe(self, observer: Callable[[Fact], None]) -> None:
        """Call a function with every fact that is recorded from now on, once it is durable."""
        self._observers.append(observer)

    def all(self, kind: type[_AnyFact]) -> Sequence[_AnyFact]:
        """Return all facts of a kind, in order."""
        return self._by_kind[kind]

    def _take_in(self, facts: Sequence[Fact]) -> None:
        self.facts.extend(facts)
        for fact in facts:
            self._by_kind[type(fact)].append(fact)

    def write_artifact(self, name: str, content: bytes) -> str:
        """Write a file whole below the run directory and return its SHA-256.

        Args:
            name: Relative path.
            content: The bytes.

        Raises:
            RuntimeError: another driver has taken the search over; its artifacts are left alone.
        """
        self._journal.require_held()
        self._storage.write(name, content)
        return hashlib.sha256(content).hexdigest()

    def read_artifact(self, name: str, sha256: str) -> bytes:
        """Return the bytes of an artifact that a fact names.

        Args:
            name: Relative path.
            sha256: Digest that the fact names.

        Raises:
            ValueError: the artifact is gone, or its digest differs.
        """
        return read_checked(self._storage, name, sha256)

    def is_finished(self) -> bool:
        """Return whether the search has finished and all its results are there, unchanged.

        A warning names what is missing or changed, and has to be made again.
        """
        if not self.all(Finished):
            return False
        for name, sha256 in self.all(Finished)[-1].artifacts.items():
            try:
                self.read_artifact(name, sha256)
            except ValueError as error:
                logger.warning("%s; the results are made again", error)
                return False
        return True

    def delete_artifact(self, name: str) -> None:
        """Remove an artifact that no later step reads, if it exists."""
        self._storage.delete(name)

    def start(self, started: Started) -> Started:
        """Record the search's identity, or check it against the journal's.

        Returns:
            The journal's first fact.

        Raises:
            ValueError: the directory holds another search; the message names what differs.
        """
        known = self.all(Started)
        if not known:
            self.record([started])
            return started
        _require_same(self.location, known[0].identity, started.identity)
        return known[0]


def read_checked(storage: Storage, name: str, sha256: str) -> bytes:
    """Return the bytes of an artifact that a fact names.

    Args:
        storage: The run directory.
        name: Relative path.
        sha256: Digest that the fact names.

    Raises:
        ValueError: the artifact is gone, or its digest differs.
    """
    place = f"{storage.location}/{name}"
    try:
        content = storage.read(name)
    except FileNotFoundError as error:
        raise ValueError(f"{place} is named in the journal but does not exist") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{place} is not the file that the journal names: SHA-256 differs")
    return content


def facts_in(storage: Storage) -> list[Fact]:
    """Return the facts of a run directory's journal; none if it holds no journal.

    Raises:
        ValueError: the journal is damaged.
    """
    return _read(storage) or []


def _clear_orphans(storage: Storage, facts: Sequence[Fact]) -> None:
    """Remove files that killed drivers left: partial ones, and checkpoints that none goes on from.

    A training goes on from its last checkpoint; a driver that is killed can leave the one before,
    or one that no fact names yet.
    """
    last = {fact.task: fact.artifact for fact in facts if isinstance(fact, EpochFinished)}
    for name in storage.names(CHECKPOINTS):
        if f"{CHECKPOINTS}/{name}" not in last.values():
            storage.delete(f"{CHECKPOINTS}/{name}")
    if storage.local is not None:
        for folder in (storage.local, storage.local / CHECKPOINTS):
            for path in folder.glob("*.part"):
                if not path.is_dir():
                    path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Seen:
    """A journal, read before it is held."""

    digest: bytes | None
    """Digest of its complete lines; None: there is none."""
    facts: list[Fact]
    """The facts of the lines."""


def _look(storage: Storage) -> _Seen:
    lines = _read_lines(storage)
    return _Seen(None, []) if lines is None else _Seen(_digest(lines), _facts_of(lines, storage))


def _read_lines(storage: Storage) -> bytes | None:
    return read_leases(storage) if storage.local is None else read_file(storage.local)


def _digest(lines: bytes) -> bytes:
    return hashlib.blake2b(lines).digest()


def _facts_of(lines: bytes, storage: Storage) -> list[Fact]:
    return from_lines(lines, storage.location, _journal_name(storage))


def _read(storage: Storage) -> list[Fact] | None:
    seen = _look(storage)
    return None if seen.digest is None else seen.facts


def _journal_name(storage: Storage) -> str:
    return LEASES if storage.local is None else JOURNAL


def _require_fit(storage: Storage, resume: Resume, started: Started | None) -> _Seen:
    seen = _look(storage)
    facts = seen.facts
    if seen.digest is None:
        if resume is True:
            raise ValueError(
                f"--resume: {storage.location} holds no {_journal_name(storage)}; "
                "start it without --resume"
            )
        return seen
    _require_wanted(facts, storage, resume)
    known = next((fact for fact in facts if isinstance(fact, Started)), None)
    if known is not None and started is not None:
        _require_same(storage.location, known.identity, started.identity)
    return seen


def _require_wanted(facts: list[Fact], storage: Storage, resume: Resume) -> None:
    if facts and resume is False:
        raise ValueError(
            f"{storage.location} already holds a search; go on with it by --resume, "
            "or choose another run directory"
        )


def _require_same(location: str, known: dict[str, Any], now: dict[str, Any]) -> None:
    # JSON has no tuples: compare what the journal would have kept.
    before, after = _flat(known), _flat(json.loads(json.dumps(now)))
    different = [
        f"{key} was {before.get(key)!r}, now {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    if different:
        raise ValueError(
            f"{location} holds another search: {'; '.join(different)}; "
            "resume with the same settings, or choose another run directory"
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dicts by their full path: ``settings.space.min_keep``."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        leaves |= _flat(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return leaves
