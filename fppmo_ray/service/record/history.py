"""Every score of a run directory, as a table."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from fppmo_ray.service.record.facts import Asked, ends_of_scores
from fppmo_ray.service.record.run_directory import read_journal

_COLUMNS = [
    "id",
    "generation",
    "budget",
    "macs",
    "rung",
    "val_loss",
    "val_accuracy",
    "score",
    "seconds",
    "worker",
    "at",
    "error",
]


def read_history(run_dir: str | Path) -> pd.DataFrame:
    """Scores of a run directory, a row for every proposal and rung.

    Columns: the proposal's id, generation, budget (a macs_cut, where the search has several) and
    MACs; the rung in fine-tuning steps, loss and accuracy, the score (the accuracy, or that of the
    user's own task), seconds, worker, time or error.
    """
    facts = read_journal(run_dir)
    asked = {fact.id: fact for fact in facts if isinstance(fact, Asked)}
    rows = [
        {
            "id": end.id,
            "generation": asked[end.id].generation,
            "budget": asked[end.id].macs_cut,
            "macs": asked[end.id].macs,
            **{name: getattr(end, name, None) for name in _COLUMNS[4:]},
        }
        for end in ends_of_scores(facts).values()
    ]
    return pd.DataFrame(rows, columns=_COLUMNS).sort_values(["id", "rung"], ignore_index=True)
