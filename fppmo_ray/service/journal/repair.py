"""Repair of a damaged journal: the lines before the first damaged one are kept."""

from __future__ import annotations

import itertools
from pathlib import Path

from fppmo_ray.durable_files import write_whole
from fppmo_ray.service.journal.journal import JOURNAL, open_file, read_file, read_lines
from fppmo_ray.service.journal.leases import LEASES, open_lease, read_leases
from fppmo_ray.service.journal.run_directory import stage_run_dir
from fppmo_ray.service.journal.storage import open_storage


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
        kept = _undamaged(lines, str(journal))
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
    _, damage = read_lines(lines)
    if damage is None:
        return lines
    if not damage.can_be_repaired:
        raise ValueError(f"{place} cannot be repaired: {damage.reason}")
    return lines[: damage.start]


def _no_damage(place: str | Path, lines: bytes) -> str:
    return f"{place} is undamaged, all {len(lines.splitlines())} lines"


def _cut(place: str | Path, lines: bytes, kept: bytes) -> str:
    num_kept, num_lines = (content.count(b"\n") for content in (kept, lines))
    return (
        f"{place} now ends after line {num_kept}, the last one before the damage "
        f"({num_lines - num_kept} lines were removed); resume the search with --resume"
    )
