"""What a search leaves behind, read from its run directory."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
from torch import nn

from fppmo_ray.distribution import BoolArray, unpack_mask
from fppmo_ray.pruning import load_network
from fppmo_ray.service.conclusion import NETWORK_FILES, RESULT
from fppmo_ray.service.record.facts import Asked, Chosen, ends_of_scores
from fppmo_ray.service.record.run_directory import read_journal
from fppmo_ray.service.record.storage import open_storage


@dataclass(frozen=True, kw_only=True)
class Best:
    """The chosen mask and what it makes of the network."""

    finalist: str
    """Where it came from: the distribution's mode, a sample, or the importance alone."""
    keep: BoolArray
    """``(num_filters,)``, True = kept."""
    macs: int
    macs_cut: float
    widths: dict[str, int]
    """Kept filters of each channel group."""
    test_accuracy: float
    """After fine-tuning, in [0, 1]."""


@dataclass(frozen=True)
class SearchResult:
    """A finished search.

    Args:
        run_dir: Its folder, or the URI of where it is.
        dense: A network of the class that was pruned; its weights do not matter.
    """

    run_dir: str | Path
    dense: nn.Module

    @property
    def figures(self) -> dict[str, Any]:
        """The content of result.json."""
        return read_figures(self.run_dir)

    @property
    def best(self) -> Best:
        """The chosen mask."""
        facts, figures = read_journal(self.run_dir), self.figures
        chosen = next(fact for fact in facts if isinstance(fact, Chosen))
        row = next(row for row in figures["variants"] if row["name"] == "fppmo")
        return Best(
            finalist=chosen.finalist,
            keep=unpack_mask(chosen.mask, figures["num_filters"]),
            macs=row["macs"],
            macs_cut=row["macs_cut"],
            widths=row["widths"],
            test_accuracy=row["after"]["test"]["accuracy"],
        )

    @property
    def history(self) -> pd.DataFrame:
        """One row per score that has ended, in order of ids and rungs."""
        return read_history(self.run_dir)

    def network(self) -> nn.Module:
        """The smaller, fine-tuned network, in eval mode on the CPU."""
        with network_files(self.run_dir) as (_, recipe):
            return load_network(recipe, constructor=lambda: copy.deepcopy(self.dense).cpu())


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
def network_files(run_dir: str | Path) -> Iterator[tuple[Path, Path]]:
    """Weights and recipe of the smaller network, as files of this machine while the context lasts.

    Raises:
        FileNotFoundError: a file was removed from an object store.
    """
    storage = open_storage(run_dir)
    weights, recipe = NETWORK_FILES
    if storage.local is not None:
        yield storage.local / weights, storage.local / recipe
        return
    with TemporaryDirectory() as folder:
        for name in NETWORK_FILES:
            (Path(folder) / name).write_bytes(storage.read(name))
        yield Path(folder) / weights, Path(folder) / recipe


_COLUMNS = [
    "id",
    "generation",
    "macs",
    "rung",
    "val_loss",
    "val_accuracy",
    "seconds",
    "worker",
    "at",
    "error",
]


def read_history(run_dir: str | Path) -> pd.DataFrame:
    """Scores of a run directory, a row for every proposal and rung.

    Columns: the proposal's id, generation and MACs; the rung in fine-tuning steps, the score,
    seconds, worker, time or error.
    """
    facts = read_journal(run_dir)
    asked = {fact.id: fact for fact in facts if isinstance(fact, Asked)}
    rows = [
        {
            "id": end.id,
            "generation": asked[end.id].generation,
            "macs": asked[end.id].macs,
            **{name: getattr(end, name, None) for name in _COLUMNS[3:]},
        }
        for end in ends_of_scores(facts).values()
    ]
    return pd.DataFrame(rows, columns=_COLUMNS).sort_values(["id", "rung"], ignore_index=True)
