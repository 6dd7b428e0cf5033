"""Changed and forged lines of a journal, and what becomes of them."""

from __future__ import annotations

import io
import json
import logging
import random
import shutil
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from damage.changes import LINE_MUTATIONS, EntryChange, drop, put, rename, with_line
from damage.outcomes import SENTENCES, Row, row_of
from fppmo_ray.report import print_status, write_report
from fppmo_ray.service.journal.facts import ClockRead, ComputeChosen, Fact, LatencyMeasured, Started
from fppmo_ray.service.journal.journal import JOURNAL, to_lines
from fppmo_ray.service.journal.run_directory import read_journal
from fppmo_ray.service.journal.writers import repair

logger = logging.getLogger(__name__)

_REPORTED = 4  # of so many forged journals, one is read by the report, which takes a while


def lines_with_latency(run_dir: Path) -> list[bytes]:
    """Return the journal's lines, and those that only searches with latency limits have."""
    measured = LatencyMeasured(
        artifact="latency.json",
        sha256="0" * 64,
        batch=1,
        dense_ms=1.5,
        median_error=0.01,
        device="cpu",
    )
    facts: list[Fact] = []
    for fact in read_journal(run_dir):
        facts.append(fact)
        if isinstance(fact, Started):
            clock_read = ClockRead(keep=np.ones(fact.num_filters, dtype=bool), milliseconds=1.25)
        elif isinstance(fact, ComputeChosen):
            facts += [clock_read, measured]
    return to_lines(facts).splitlines(keepends=True)


def kind_of(line: bytes) -> str:
    """Return the kind of fact in a line."""
    kind: str = json.loads(line)["fact"]
    return kind


def places_by_kind(lines: Sequence[bytes]) -> dict[str, list[int]]:
    """Return the places of every kind of line, by the first of each kind."""
    places: dict[str, list[int]] = {}
    for place, line in enumerate(lines):
        places.setdefault(kind_of(line), []).append(place)
    return places


def copy_again(origin: Path, scratch: Path) -> None:
    """Copy a run directory to where an earlier copy may lie."""
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(origin, scratch)


def changed_lines(
    lines: list[bytes], scratch: Path, rng: random.Random, repeats: int
) -> Iterator[Row]:
    """Change lines of a journal, and yield the outcomes.

    Args:
        lines: The journal's lines.
        scratch: A folder for the changed journal.
        rng: Source of randomness.
        repeats: Changes of each kind.
    """
    for kind, places in places_by_kind(lines).items():
        for name, mutate in LINE_MUTATIONS.items():
            changed = (mutate(lines, rng.choice(places), rng) for _ in range(repeats))
            outcomes = [journal_outcome(b"".join(one), b"".join(lines), scratch) for one in changed]
            yield row_of(kind, name, outcomes)


def journal_outcome(content: bytes, original: bytes, scratch: Path) -> str:
    """Return what becomes of a changed journal.

    Args:
        content: The changed journal.
        original: The journal before.
        scratch: A folder for the changed journal.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    journal = scratch / JOURNAL
    journal.write_bytes(content)
    try:
        _print_status(scratch)
        facts = read_journal(scratch)
    except ValueError as error:
        is_named = f"{JOURNAL}, line " in str(error) and "fppmo-ray repair" in str(error)
        repair(scratch)
        kept = journal.read_bytes()
        read_journal(scratch)
        return "refused" if is_named and original.startswith(kept) else "silent"
    except Exception:  # the study counts tracebacks of any kind
        return "traceback"
    if content == original:
        return "unchanged"
    # A torn last line counts as never written.
    left = content[: content.rfind(b"\n") + 1]
    is_crash = original.startswith(left) and len(facts) == left.count(b"\n")
    return "as after a crash" if is_crash else "silent"


def _print_status(run_dir: Path) -> None:
    print_status(run_dir, Console(file=io.StringIO(), width=120))


def forged_lines(origin: Path, scratch: Path, rng: random.Random, repeats: int) -> Iterator[Row]:
    """Forge lines of a finished search's journal, and yield the outcomes of reading it.

    Args:
        origin: The search's run directory.
        scratch: A folder for its copy.
        rng: Source of randomness.
        repeats: Changes of each kind.
    """
    lines = lines_with_latency(origin)
    copy_again(origin, scratch)
    changes = {"is missing": drop, "has another value": put, "has another name": rename}
    for kind, places in places_by_kind(lines).items():
        for name, change in changes.items():
            outcomes = []
            for number in range(repeats):
                place = rng.choice(places)
                changed = with_line(lines, place, _forged(lines[place], change, rng))
                (scratch / JOURNAL).write_bytes(sealed(changed))
                outcomes.append(
                    forged_outcome(scratch, reported=number % _REPORTED == _REPORTED - 1)
                )
            yield row_of(f"{kind}, forged", f"an entry {name}", outcomes)


def _forged(line: bytes, change: EntryChange, rng: random.Random) -> bytes:
    """Return a line of which an entry of any depth was changed."""
    data = json.loads(line)
    del data["sum"]
    inner = rng.choice(list(_dicts_in(data)))
    change(inner, rng.choice(sorted(inner)), rng)
    return json.dumps(data, separators=(",", ":")).encode()


def _dicts_in(value: Any) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects in a value, itself included, that have entries."""
    if isinstance(value, dict) and value:
        yield value
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _dicts_in(item)


def sealed(lines: Sequence[bytes]) -> bytes:
    """Return lines with the checksums that they need behind each other."""
    checksum, whole = b"", b""
    for line in lines:
        body = line.rstrip(b"\n").removesuffix(b"}").partition(b',"sum":"')[0]
        checksum = blake2b(checksum + body, digest_size=8).hexdigest().encode()
        whole += body + b',"sum":"' + checksum + b'"}\n'
    return whole


def forged_outcome(run_dir: Path, *, reported: bool) -> str:
    """Return what becomes of a journal with a forged line.

    Args:
        run_dir: Its run directory.
        reported: Whether the report reads it too.
    """
    try:
        _print_status(run_dir)
        if reported:
            write_report(run_dir, run_dir / "report" / "page.html")
    except SENTENCES:
        return "refused"
    except Exception:  # the study counts tracebacks of any kind
        logger.exception("a forged journal was answered by a traceback")
        return "traceback"
    return "as it says"
