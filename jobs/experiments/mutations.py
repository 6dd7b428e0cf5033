"""Is any change of a run directory's files read as it stands, or answered by a traceback?

    python jobs/experiments/mutations.py --repeats 40 --output runs/mutations.csv

A small search is run once. Then every kind of line of its journal, and every file that it leaves,
is changed in every way, and read. A changed journal has to be refused with the line's number, and
to be repaired to the lines before it; where the change is the same as a crash (lines are missing at
the end), what is left has to be read. Some searches are resumed from changed files as well, and
have to end like the undisturbed one.

Then entries of lines are forged: the checksums are made again, so that nothing shows the change.
The journal, the status and the report then have to answer with a sentence, or as the line says.
"""

from __future__ import annotations

import io
import json
import logging
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from archive import flattened, write_rows
from rich.console import Console
from rich.table import Table

from fppmo_ray import ConsoleProgress, Recipe, SearchResult, load_dataset, search
from fppmo_ray.job import run_job
from fppmo_ray.pruning import load_network
from fppmo_ray.report import print_status, write_report
from fppmo_ray.service.journal.fact_lines import fact_to_json
from fppmo_ray.service.journal.facts import (
    ClockRead,
    ComputeChosen,
    Fact,
    Finished,
    LatencyMeasured,
    Started,
)
from fppmo_ray.service.journal.journal import JOURNAL, to_lines
from fppmo_ray.service.journal.run_directory import open_run, read_journal
from fppmo_ray.service.journal.writers import repair
from fppmo_ray.service.resources import Resources
from fppmo_ray.service.setting_groups import Baseline, Numerics, Sampler, Scoring
from fppmo_ray.training import state_from_bytes
from fppmo_ray.training.networks import build_network, source_of

logger = logging.getLogger(__name__)

OUTCOMES = (
    *("refused", "as after a crash", "unchanged", "made again", "as it says"),
    *("silent", "traceback"),
)
_REPORTED = 4  # of so many forged journals, one is read by the report, which takes a while
_SENTENCES = (ValueError, RuntimeError, OSError)
_OF_ONE_RUN = {"worker", "seconds", "at", "search_id"}  # entries that differ between two searches


@dataclass(frozen=True, kw_only=True)
class Row:
    """The outcomes of one kind of change of one kind of line or file."""

    changed: str
    """Kind of a journal's line, or name of a file."""
    mutation: str
    """Name of the change."""
    outcomes: dict[str, int]
    """Number of changes with each outcome."""


def main(
    repeats: int = 10, seed: int = 0, resumed: bool = True, output: Path | None = None
) -> None:
    """Change everything that a search leaves; end with 1 if a change is silent or a traceback.

    Args:
        repeats: Changes of each kind, of a line or place drawn at random.
        seed: Random seed of the changes.
        resumed: Resume searches too, one for each kind of line and file.
        output: CSV file with a row for each kind of change.
    """
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        origin = Path(folder) / "origin"
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        try:
            run_search(origin, resume=False)
            rng, scratch = random.Random(seed), Path(folder) / "changed"
            rows = [
                *changed_lines(lines_with_latency(origin), scratch, rng, repeats),
                *forged_lines(origin, scratch, rng, repeats),
                *changed_files(origin, scratch, rng, repeats),
                *(resumed_searches(origin, scratch, rng) if resumed else ()),
            ]
        finally:
            ray.shutdown()
    Console(width=140).print(outcomes_table(rows))
    if output is not None:
        write_rows(output, [flattened(asdict(row)) for row in rows])
    if any(row.outcomes["silent"] or row.outcomes["traceback"] for row in rows):
        sys.exit("error: a change was read as it stood, or answered by a traceback")


def run_search(run_dir: Path, *, resume: bool) -> None:
    """Search on digits; a second or two of scores and trainings."""
    search(
        build_network("digits_cnn", 10, seed=0),
        load_dataset("digits"),
        run_dir=run_dir,
        macs_cut=0.5,
        proposals=8,
        sampler=Sampler(population=4, start="allocation"),
        scoring=Scoring(rescore_seeds=2, score_images=200, score_recalibrate_images=200),
        fine_tune=Recipe(epochs=1, batch_size=64),
        baseline=Baseline(baseline_epochs=1),
        numerics=Numerics(dtype="float32"),
        resources=Resources(workers=2),
        resume=resume,
        source=source_of("digits_cnn", 10),
        callbacks=[ConsoleProgress(Console(quiet=True))],
    )


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


LineMutation = Callable[[list[bytes], int, random.Random], list[bytes]]
"""Returns the lines with the one at a place changed."""


def _replaced(change: Callable[[bytes, random.Random], bytes]) -> LineMutation:
    def mutate(lines: list[bytes], place: int, rng: random.Random) -> list[bytes]:
        return [*lines[:place], change(lines[place], rng), *lines[place + 1 :]]

    return mutate


def _flipped(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _another_digit(content: bytes, rng: random.Random) -> bytes:
    places = [place for place, byte in enumerate(content) if chr(byte).isdigit()]
    place = rng.choice(places)
    digit = rng.choice(sorted(set(b"0123456789") - {content[place]}))
    return bytes([*content[:place], digit, *content[place + 1 :]])


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def _noise(content: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(len(content))


_EntryChange = Callable[[dict[str, Any], str, random.Random], None]


def _entry(change: _EntryChange) -> Any:
    """Return the change of one entry of a JSON object, written without white space."""

    def mutate(content: bytes, rng: random.Random) -> bytes:
        data = json.loads(content)
        change(data, rng.choice(sorted(data)), rng)
        return json.dumps(data, separators=(",", ":")).encode() + b"\n"

    return mutate


_VALUES: tuple[Any, ...] = (None, True, -1, 10**400, 1e308, "", "x", [], {}, [[]], {"a": {}})


def _put(data: dict[str, Any], name: str, rng: random.Random) -> None:
    data[name] = rng.choice([value for value in _VALUES if value != data[name]])


def _rename(data: dict[str, Any], name: str, rng: random.Random) -> None:
    data[f"{name}_"] = data.pop(name)


def _drop(data: dict[str, Any], name: str, rng: random.Random) -> None:
    del data[name]


def _swap(lines: list[bytes], place: int, rng: random.Random) -> list[bytes]:
    other = rng.choice([number for number in range(len(lines)) if lines[number] != lines[place]])
    changed = list(lines)
    changed[place], changed[other] = lines[other], lines[place]
    return changed


LINE_MUTATIONS: dict[str, LineMutation] = {
    "a bit is flipped": _replaced(_flipped),
    "a digit is another": _replaced(_another_digit),
    "an entry is missing": _replaced(_entry(_drop)),
    "an entry has another value": _replaced(_entry(_put)),
    "an entry has another name": _replaced(_entry(_rename)),
    "the line is cut": _replaced(lambda line, rng: _cut(line, rng) + b"\n"),
    "the line is noise": _replaced(lambda line, rng: _noise(line, rng) + b"\n"),
    "the line is nested deeply": _replaced(lambda line, rng: 99_999 * b"[" + b"\n"),
    "the line is empty": _replaced(lambda line, rng: b"\n"),
    "the line has no end": _replaced(lambda line, rng: line.removesuffix(b"\n")),
    "the line is missing": lambda lines, place, rng: [*lines[:place], *lines[place + 1 :]],
    "the line is repeated": lambda lines, place, rng: [*lines[: place + 1], *lines[place:]],
    "the line is swapped with another": _swap,
    "the journal ends before it": lambda lines, place, rng: lines[:place],
    "the journal ends inside it": lambda lines, place, rng: [
        *lines[:place],
        _cut(lines[place], rng),
    ],
}


def kind_of(line: bytes) -> str:
    """Return the kind of fact in a line."""
    kind: str = json.loads(line)["fact"]
    return kind


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
    kinds = [kind_of(line) for line in lines]
    for kind in dict.fromkeys(kinds):
        places = [place for place, of_line in enumerate(kinds) if of_line == kind]
        for name, mutate in LINE_MUTATIONS.items():
            changed = (mutate(lines, rng.choice(places), rng) for _ in range(repeats))
            outcomes = [journal_outcome(b"".join(one), b"".join(lines), scratch) for one in changed]
            yield _row(kind, name, outcomes)


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
    kinds = [kind_of(line) for line in lines]
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(origin, scratch)
    changes = {"is missing": _drop, "has another value": _put, "has another name": _rename}
    for kind in dict.fromkeys(kinds):
        places = [place for place, of_line in enumerate(kinds) if of_line == kind]
        for name, change in changes.items():
            outcomes = []
            for number in range(repeats):
                place = rng.choice(places)
                changed = [*lines[:place], _forged(lines[place], change, rng), *lines[place + 1 :]]
                (scratch / JOURNAL).write_bytes(sealed(changed))
                outcomes.append(
                    forged_outcome(scratch, reported=number % _REPORTED == _REPORTED - 1)
                )
            yield _row(f"{kind}, forged", f"an entry {name}", outcomes)


def _forged(line: bytes, change: _EntryChange, rng: random.Random) -> bytes:
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
    except _SENTENCES:
        return "refused"
    except Exception:  # the study counts tracebacks of any kind
        logger.exception("a forged journal was answered by a traceback")
        return "traceback"
    return "as it says"


FileMutation = Callable[[bytes, random.Random], bytes | None]
"""Returns the changed content of a file; None: it is deleted."""

FILE_MUTATIONS: dict[str, FileMutation] = {
    "a bit is flipped": _flipped,
    "a digit is another": _another_digit,
    "the file is cut": _cut,
    "the file is noise": _noise,
    "the file is empty": lambda content, rng: b"",
    "the file is longer": lambda content, rng: content + rng.randbytes(1 + rng.randrange(99)),
    "the file is missing": lambda content, rng: None,
}
JSON_MUTATIONS: dict[str, FileMutation] = {
    "an entry is missing": _entry(_drop),
    "an entry has another value": _entry(_put),
    "an entry has another name": _entry(_rename),
    "the file is nested deeply": lambda content, rng: 99_999 * b"[",
}


def changed_files(origin: Path, scratch: Path, rng: random.Random, repeats: int) -> Iterator[Row]:
    """Change files of a finished search, and yield the outcomes of reading them.

    Args:
        origin: The search's run directory.
        scratch: A folder for its copy.
        rng: Source of randomness.
        repeats: Changes of each kind.
    """
    for name, read in readers(origin).items():
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(origin, scratch)
        content, expected = (origin / name).read_bytes(), read(scratch)
        is_json = name.endswith(".json")
        for mutation, mutate in (FILE_MUTATIONS | (JSON_MUTATIONS if is_json else {})).items():
            outcomes = []
            for _ in range(repeats):
                changed = mutate(content, rng)
                (scratch / name).unlink(missing_ok=True)
                if changed is not None:
                    (scratch / name).write_bytes(changed)
                outcomes.append(read_outcome(partial(read, scratch), expected))
            yield _row(name, mutation, outcomes)


def readers(origin: Path) -> dict[str, Callable[[Path], bytes]]:
    """Return, for each file of a finished search, how it is read: to bytes that can be compared.

    ``network.json`` is read without the journal, as from a copy of the two files of a network.
    """
    dense = build_network("digits_cnn", 10)
    checkpoint = next((origin / "checkpoints").glob("fppmo-*")).name
    digests = {fact.artifact: fact.sha256 for fact in _named_artifacts(origin)}

    def artifact(name: str) -> Callable[[Path], bytes]:
        def read(run_dir: Path) -> bytes:
            with open_run(run_dir, resume=True) as run:
                return run.read_artifact(name, digests[name])

        return read

    def state(run_dir: Path) -> bytes:
        content = artifact(f"checkpoints/{checkpoint}")(run_dir)
        return _bytes_of(state_from_bytes(content).network)

    return {
        "result.json": lambda run_dir: json.dumps(SearchResult(run_dir, dense).figures).encode(),
        "network.json": lambda run_dir: _bytes_of(
            load_network(run_dir / "network.json").state_dict()
        ),
        "network.pt": lambda run_dir: _bytes_of(
            SearchResult(run_dir, dense).network().state_dict()
        ),
        "importance.npy": artifact("importance.npy"),
        f"checkpoints/{checkpoint}": state,
    }


def _named_artifacts(run_dir: Path) -> list[Any]:
    return [fact for fact in read_journal(run_dir) if hasattr(fact, "artifact")]


def _bytes_of(state: dict[str, Any]) -> bytes:
    tensors = [tensor.double().flatten() for tensor in state.values()]
    return "".join(state).encode() + torch.cat(tensors).numpy().tobytes()


def read_outcome(read: Callable[[], bytes], expected: bytes) -> str:
    """Return the outcome of reading a changed file.

    Args:
        read: Reads it.
        expected: Content before the change.
    """
    try:
        found = read()
    except _SENTENCES:
        return "refused"
    except Exception:  # the study counts tracebacks of any kind
        return "traceback"
    return "unchanged" if found == expected else "silent"


def resumed_searches(origin: Path, scratch: Path, rng: random.Random) -> Iterator[Row]:
    """Resume a search from changed files, after a repair where one is asked for.

    Args:
        origin: The run directory of the undisturbed search.
        scratch: A folder for its copy.
        rng: Source of randomness.
    """
    lines = (origin / JOURNAL).read_bytes().splitlines(keepends=True)
    kinds = [kind_of(line) for line in lines]

    def damage_line(kind: str) -> None:
        place = rng.choice([number for number, of_line in enumerate(kinds) if of_line == kind])
        changed = [*lines[:place], _another_digit(lines[place], rng), *lines[place + 1 :]]
        (scratch / JOURNAL).write_bytes(b"".join(changed))

    def damage_files(names: list[str]) -> None:
        for name in names:
            (scratch / name).write_bytes(_flipped((scratch / name).read_bytes(), rng))

    def remove_files(names: list[str]) -> None:
        for name in names:
            (scratch / name).unlink()

    checkpoints = [str(path.relative_to(origin)) for path in (origin / "checkpoints").iterdir()]
    everything = ["result.json", "network.json", "network.pt", "importance.npy", *checkpoints]
    for kind in dict.fromkeys(kinds):
        yield resumed_row(kind, "repaired and resumed", partial(damage_line, kind), origin, scratch)
    for names in (["result.json"], ["network.pt"], everything):
        what = names[0] if len(names) == 1 else "all files but the journal"
        for mutation, act in (("changed", damage_files), ("missing", remove_files)):
            damage = partial(act, names)
            yield resumed_row(what, f"{mutation}, and resumed", damage, origin, scratch)


def resumed_row(
    changed: str, mutation: str, damage: Callable[[], None], origin: Path, scratch: Path
) -> Row:
    """Return the outcome of resuming a damaged search.

    Args:
        changed: Kind of line, or files.
        mutation: Name of the change.
        damage: Changes the copy of the search in ``scratch``.
        origin: The run directory of the undisturbed search.
        scratch: A folder for its copy.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(origin, scratch)
    damage()
    try:
        repair(scratch)
        run_search(scratch, resume=True)
    except _SENTENCES:
        return _row(changed, mutation, ["refused"])
    except Exception:  # the study counts tracebacks of any kind
        return _row(changed, mutation, ["traceback"])
    return _row(changed, mutation, ["made again" if _ended_alike(origin, scratch) else "silent"])


def _ended_alike(one: Path, other: Path) -> bool:
    networks = [
        [(run_dir / name).read_bytes() for name in ("network.json", "network.pt")]
        for run_dir in (one, other)
    ]
    return networks[0] == networks[1] and _told(one) == _told(other)


def _told(run_dir: Path) -> set[str]:
    """Return all that a journal says, except for times, workers and ids."""
    told = set()
    for fact in read_journal(run_dir):
        entries = fact_to_json(fact)
        if not isinstance(fact, Finished):  # it names the digest of latencies
            told.add(
                json.dumps({k: entries[k] for k in entries.keys() - _OF_ONE_RUN}, sort_keys=True)
            )
    return told


def _row(changed: str, mutation: str, outcomes: list[str]) -> Row:
    counts = Counter(outcomes)
    return Row(
        changed=changed, mutation=mutation, outcomes={name: counts[name] for name in OUTCOMES}
    )


def outcomes_table(rows: list[Row]) -> Table:
    """Return the outcomes of each kind of line and file, over all changes of it."""
    table = Table("changed", "changes", *OUTCOMES, title="changed files of a search")
    for changed in dict.fromkeys(row.changed for row in rows):
        counts: Counter[str] = Counter()
        for row in rows:
            if row.changed == changed:
                counts.update(row.outcomes)
        cells = [str(counts[name]) for name in OUTCOMES]
        table.add_row(changed, str(counts.total()), *cells)
    return table


if __name__ == "__main__":
    run_job(main)
