"""Changed files of a finished search, and searches that are resumed from changed files."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from damage.changes import FILE_MUTATIONS, JSON_MUTATIONS, another_digit, flipped, with_line
from damage.journals import copy_again, places_by_kind
from damage.outcomes import SENTENCES, Row, row_of
from fppmo_ray import ConsoleProgress, Recipe, SearchResult, load_dataset, search
from fppmo_ray.pruning import load_network
from fppmo_ray.service.journal.fact_lines import fact_to_json
from fppmo_ray.service.journal.facts import Finished
from fppmo_ray.service.journal.journal import JOURNAL
from fppmo_ray.service.journal.run_directory import open_run, read_journal
from fppmo_ray.service.journal.writers import repair
from fppmo_ray.service.resources import Resources
from fppmo_ray.service.setting_groups import Baseline, Numerics, Sampler, Scoring
from fppmo_ray.training import state_from_bytes
from fppmo_ray.training.networks import build_network, source_of

_OF_ONE_RUN = {"worker", "seconds", "at", "search_id"}  # entries that differ between two searches


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


def changed_files(origin: Path, scratch: Path, rng: random.Random, repeats: int) -> Iterator[Row]:
    """Change files of a finished search, and yield the outcomes of reading them.

    Args:
        origin: The search's run directory.
        scratch: A folder for its copy.
        rng: Source of randomness.
        repeats: Changes of each kind.
    """
    for name, read in readers(origin).items():
        copy_again(origin, scratch)
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
            yield row_of(name, mutation, outcomes)


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
    except SENTENCES:
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
    places = places_by_kind(lines)

    def damage_line(kind: str) -> None:
        place = rng.choice(places[kind])
        changed = with_line(lines, place, another_digit(lines[place], rng))
        (scratch / JOURNAL).write_bytes(b"".join(changed))

    def damage_files(names: list[str]) -> None:
        for name in names:
            (scratch / name).write_bytes(flipped((scratch / name).read_bytes(), rng))

    def remove_files(names: list[str]) -> None:
        for name in names:
            (scratch / name).unlink()

    checkpoints = [str(path.relative_to(origin)) for path in (origin / "checkpoints").iterdir()]
    everything = ["result.json", "network.json", "network.pt", "importance.npy", *checkpoints]
    for kind in places:
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
    copy_again(origin, scratch)
    damage()
    try:
        repair(scratch)
        run_search(scratch, resume=True)
    except SENTENCES:
        return row_of(changed, mutation, ["refused"])
    except Exception:  # the study counts tracebacks of any kind
        return row_of(changed, mutation, ["traceback"])
    return row_of(changed, mutation, ["made again" if _ended_alike(origin, scratch) else "silent"])


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
