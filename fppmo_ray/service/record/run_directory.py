"""A run directory: the journal, the artifacts it names, and the lock of the one writer."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from fppmo_ray.durable_files import write_whole
from fppmo_ray.service.record.facts import Fact, Started, fact_from_json, fact_to_json

JOURNAL = "journal.jsonl"
_AnyFact = TypeVar("_AnyFact", bound=Fact)


def read_journal(path: Path) -> list[Fact]:
    """The facts of a run directory's journal; a torn last line counts as never written.

    Raises:
        ValueError: there is no journal, or a line before the last is damaged.
    """
    journal = path / JOURNAL
    if not journal.is_file():
        raise ValueError(f"{path} holds no {JOURNAL}; expected the run directory of a search")
    facts, _ = _parse(journal.read_bytes(), journal)
    return facts


def _parse(content: bytes, journal: Path) -> tuple[list[Fact], int]:
    """Facts of the complete lines, and how many bytes these take."""
    complete = content[: content.rfind(b"\n") + 1]
    facts = []
    for number, line in enumerate(complete.splitlines(), start=1):
        try:
            facts.append(fact_from_json(json.loads(line)))
        except ValueError as error:
            raise ValueError(f"{journal}, line {number} is damaged: {error}") from error
    return facts, len(complete)


@contextmanager
def open_run(path: Path, *, resume: bool) -> Iterator[RunDirectory]:
    """Hold a run directory as its single writer.

    Args:
        path: The folder; made if absent.
        resume: Whether to go on with the search that the folder holds.

    Raises:
        ValueError: another driver writes here; a search is here and ``resume`` is False; or
            ``resume`` is True and there is no search to go on with.
    """
    journal = path / JOURNAL
    if resume and not journal.is_file():
        raise ValueError(f"--resume: {path} holds no {JOURNAL}; start it without --resume")
    path.mkdir(parents=True, exist_ok=True)
    with (path / "lock").open("ab") as lock:
        _require_lock(lock, path)
        content = journal.read_bytes() if journal.is_file() else b""
        facts, length = _parse(content, journal)
        if facts and not resume:
            raise ValueError(
                f"{path} already holds a search; go on with it by --resume, "
                "or choose another run directory"
            )
        with journal.open("ab") as file:
            file.truncate(length)
            yield RunDirectory(path, facts, file)


class RunDirectory:
    """Journal and artifacts of a search. Made by ``open_run``.

    ``facts`` are the journal's facts so far, in order. ``record`` makes new ones durable before
    it returns. Artifacts are written whole, before the fact that names them.
    """

    def __init__(self, path: Path, facts: list[Fact], file: IO[bytes]) -> None:
        self.path = path
        self.facts = facts
        self._file = file

    def record(self, facts: Iterable[Fact]) -> None:
        """Append facts and wait until the disk has them."""
        new = list(facts)
        lines = [json.dumps(fact_to_json(fact), separators=(",", ":")) + "\n" for fact in new]
        self._file.write("".join(lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.facts.extend(new)

    def all(self, kind: type[_AnyFact]) -> list[_AnyFact]:
        """All facts of a kind, in order."""
        return [fact for fact in self.facts if isinstance(fact, kind)]

    def write_artifact(self, name: str, content: bytes) -> str:
        """Write a file atomically below the run directory and return its SHA-256."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, content)
        return hashlib.sha256(content).hexdigest()

    def read_artifact(self, name: str, sha256: str) -> bytes:
        """The bytes of an artifact that a fact names.

        Raises:
            ValueError: the file is gone or not the one the journal speaks of.
        """
        target = self.path / name
        if not target.is_file():
            raise ValueError(f"{target} is named in the journal but does not exist")
        content = target.read_bytes()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ValueError(f"{target} is not the file the journal speaks of: SHA-256 differs")
        return content

    def start(self, started: Started) -> Started:
        """Record the search's identity, or check it against the one that is here.

        Returns the fact that counts: the first one.

        Raises:
            ValueError: the directory holds another search; names what differs.
        """
        known = self.all(Started)
        if not known:
            self.record([started])
            return started
        _require_same(self.path, known[0].identity, started.identity)
        return known[0]


def _require_same(path: Path, known: dict[str, Any], now: dict[str, Any]) -> None:
    # JSON has no tuples: compare what the journal would have kept.
    before, after = _flat(known), _flat(json.loads(json.dumps(now)))
    different = [
        f"{key} was {before.get(key)!r}, now {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    if different:
        raise ValueError(
            f"{path} holds another search: {'; '.join(different)}; "
            "resume with the same settings, or choose another run directory"
        )


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    """The leaves of nested dicts by their own names."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _flat(value) if isinstance(value, dict) else {key: value}
    return leaves


def _require_lock(lock: IO[bytes], path: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"{path} is being written by another driver; wait for it, or stop it"
        ) from error
