"""The artifacts of a search: names of the files, and what reports read from a run directory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from fppmo_ray.distribution import Proposal
from fppmo_ray.service.journal.facts import Fact, Finished, latest_feedback
from fppmo_ray.service.journal.run_directory import (
    facts_in,
    read_checked,
    read_journal,
)
from fppmo_ray.service.journal.storage import Storage, open_storage

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS = [
    *("id", "generation", "budget", "macs", "parameters", "steps"),
    *("val_loss", "val_accuracy", "score", "seconds", "worker", "at", "error"),
]

RESULT = "result.json"
DENSE, IMPORTANCE_ONLY, FPPMO = "dense", "importance-only", "fppmo"
ALLOCATION = "allocation"
"""The networks of the final table."""


def network_names(macs_cut: float | None = None, *, distilled: bool = False) -> tuple[str, str]:
    """Return the file names of a chosen network's weights and recipe.

    Args:
        macs_cut: Its budget, if the search has several.
        distilled: Whether it is the network after distillation and before fine-tuning.
    """
    stem = name_for_budget("network-distilled" if distilled else "network", macs_cut)
    return f"{stem}.pt", f"{stem}.json"


def name_for_budget(name: str, macs_cut: float | None) -> str:
    """Return ``name``, with ``-{macs_cut}`` appended when the search has several budgets.

    Args:
        name: Name of a file, or of a training.
        macs_cut: The budget, or None when the search has only one.
    """
    return name if macs_cut is None else f"{name}-{macs_cut}"


def read_figures(run_dir: str | Path, facts: Iterable[Fact] | None = None) -> dict[str, Any]:
    """Return the content of a run directory's result.json.

    Args:
        run_dir: Folder or URI of the search.
        facts: The facts of its journal; None: they are read from it.

    Raises:
        ValueError: the search has not finished, or the file is not the one that it wrote.
    """
    storage = open_storage(run_dir)
    if not storage.exists(RESULT):
        raise ValueError(f"{storage.location} holds no {RESULT}: the search there has not finished")
    facts = facts_in(storage) if facts is None else facts
    content = _read_result(storage, RESULT, finished_artifacts(facts))
    try:
        figures = json.loads(content)
    except (ValueError, RecursionError):
        figures = None
    if not isinstance(figures, dict):
        raise ValueError(f"{storage.location}/{RESULT} is damaged: expected a JSON object")
    return figures


def finished_artifacts(facts: Iterable[Fact]) -> dict[str, str]:
    """Return the SHA-256 of every result by its name; nothing before the search has finished."""
    finished = [fact for fact in facts if isinstance(fact, Finished)]
    return finished[-1].artifacts if finished else {}


def _read_result(storage: Storage, name: str, digests: Mapping[str, str]) -> bytes:
    """Return the bytes of one of a search's results, checked if the journal names it."""
    if name not in digests:
        return storage.read(name)
    try:
        return read_checked(storage, name, digests[name])
    except ValueError as error:
        raise ValueError(f"{error}; --resume writes it again") from error


@contextmanager
def network_files(
    run_dir: str | Path, macs_cut: float | None = None, *, distilled: bool = False
) -> Iterator[tuple[Path, Path]]:
    """Yield weights and recipe of a smaller network, as files of this machine.

    Args:
        run_dir: Run directory of a finished search.
        macs_cut: The budget, if the search had several.
        distilled: Whether to yield the network after distillation and before fine-tuning.

    Raises:
        FileNotFoundError: a file is missing that the journal does not name.
        ValueError: the search has not finished, it had no such budget or no distillation, or a file
            is not the one that it wrote.
    """
    storage = open_storage(run_dir)
    facts = facts_in(storage)
    figures = read_figures(run_dir, facts)
    if distilled and not figures["settings"]["calibration"]["distill_steps"]:
        raise ValueError(
            f"the search in {storage.location} distilled no network; take the final one, or search "
            "with distill_steps"
        )
    budget = _budget(figures, macs_cut)
    weights, recipe = names = network_names(budget, distilled=distilled)
    contents = {name: _read_result(storage, name, finished_artifacts(facts)) for name in names}
    if storage.local is not None:
        yield storage.local / weights, storage.local / recipe
        return
    with TemporaryDirectory() as folder:
        for name, content in contents.items():
            (Path(folder) / name).write_bytes(content)
        yield Path(folder) / weights, Path(folder) / recipe


def _budget(figures: dict[str, Any], macs_cut: float | None) -> float | None:
    """Return the budget in the names of its files: None if the search had only one."""
    known = budgets_asked(figures)
    if macs_cut in known or (macs_cut is None and len(known) == 1):
        return macs_cut if len(known) > 1 else None
    listed = ", ".join(map(str, known))
    got = "none" if macs_cut is None else macs_cut
    raise ValueError(f"macs_cut must be one of the search's budgets, {listed}, got {got}")


def budgets_asked(figures: dict[str, Any]) -> list[float]:
    """Return every ``macs_cut`` of a search, from its result.json."""
    asked = figures["settings"]["macs_cut"]
    return asked if isinstance(asked, list) else [asked]


def read_history(run_dir: str | Path) -> pd.DataFrame:
    """Return the feedback in a run directory as a table; see ``history_of``."""
    return history_of(read_journal(run_dir))


def history_of(facts: Iterable[Fact]) -> pd.DataFrame:
    """Return one row for every proposal with feedback, by ascending id.

    Columns: the proposal's id, generation, budget (a macs_cut, where the search has several), MACs
    and parameters; fine-tuning steps, loss and accuracy, the score (the accuracy, or that of the
    user's own task), seconds, worker, time or error.
    """
    import pandas as pd  # slow to import, and `fppmo-ray status` does without

    facts = list(facts)
    proposals = {fact.proposal_id: fact for fact in facts if isinstance(fact, Proposal)}
    rows = [
        {
            "id": item.proposal_id,
            "generation": proposals[item.proposal_id].generation,
            "budget": proposals[item.proposal_id].macs_cut,
            "macs": proposals[item.proposal_id].macs,
            "parameters": proposals[item.proposal_id].parameters,
            **{name: _encodable(getattr(item, name)) for name in _COLUMNS[5:]},
        }
        for item in latest_feedback(facts).values()
    ]
    return pd.DataFrame(rows, columns=_COLUMNS).sort_values("id", ignore_index=True)


def _encodable(value: Any) -> Any:
    """Return a value, in a text with halves of surrogate pairs escaped: pandas takes none."""
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value
