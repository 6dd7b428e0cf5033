"""The artifacts of a finished search: their names, and how they are read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fppmo_ray.service.record.storage import open_storage

RESULT = "result.json"
DENSE, IMPORTANCE_ONLY, FPPMO = "dense", "importance-only", "fppmo"
"""The networks of the final table."""


def network_names(macs_cut: float | None = None) -> tuple[str, str]:
    """Names of a chosen network's weights and recipe; of several budgets, each has its own."""
    stem = named("network", macs_cut)
    return f"{stem}.pt", f"{stem}.json"


def named(name: str, macs_cut: float | None) -> str:
    """What belongs to one of several budgets, told from the others; of one budget, as it is."""
    return name if macs_cut is None else f"{name}-{macs_cut}"


def read_figures(run_dir: str | Path) -> dict[str, Any]:
    """The content of a run directory's result.json.

    Raises:
        ValueError: the search has not finished.
    """
    storage = open_storage(run_dir)
    if not storage.exists(RESULT):
        raise ValueError(f"{storage.location} holds no {RESULT}: the search there has not finished")
    figures: dict[str, Any] = json.loads(storage.read(RESULT))
    return figures


@contextmanager
def network_files(
    run_dir: str | Path, macs_cut: float | None = None
) -> Iterator[tuple[Path, Path]]:
    """Weights and recipe of a smaller network, as files of this machine while the context lasts.

    Args:
        run_dir: Of a finished search.
        macs_cut: Which budget's, of several.

    Raises:
        FileNotFoundError: a file was removed from an object store.
        ValueError: the search has not finished, or the budget is none of its.
    """
    storage = open_storage(run_dir)
    weights, recipe = names = network_names(_budget(read_figures(run_dir), macs_cut))
    if storage.local is not None:
        yield storage.local / weights, storage.local / recipe
        return
    with TemporaryDirectory() as folder:
        for name in names:
            (Path(folder) / name).write_bytes(storage.read(name))
        yield Path(folder) / weights, Path(folder) / recipe


def _budget(figures: dict[str, Any], macs_cut: float | None) -> float | None:
    """What tells a budget's files from others: nothing, where there is one budget."""
    known = budgets_asked(figures)
    if macs_cut in known or (macs_cut is None and len(known) == 1):
        return macs_cut if len(known) > 1 else None
    listed = ", ".join(map(str, known))
    got = "none" if macs_cut is None else macs_cut
    raise ValueError(f"macs_cut must be one of the search's budgets, {listed}, got {got}")


def budgets_asked(figures: dict[str, Any]) -> list[float]:
    """Every ``macs_cut`` that a search was asked for, from its result.json."""
    asked = figures["settings"]["macs_cut"]
    return asked if isinstance(asked, list) else [asked]
