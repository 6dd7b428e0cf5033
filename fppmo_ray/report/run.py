"""Everything that reports read from a run directory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from fppmo_ray.distribution import BoolArray, Feedback, Proposal
from fppmo_ray.report.result_rows import Measure, label_of, measure_of
from fppmo_ray.service.journal.artifacts import RESULT, history_of, read_figures
from fppmo_ray.service.journal.facts import Chosen, Fact, Rescored, Started
from fppmo_ray.service.journal.run_directory import read_journal
from fppmo_ray.service.journal.storage import open_storage

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """A finished or running search, as its run directory describes it."""

    location: str
    """The run directory, without a URI's credentials and options."""
    name: str
    """The last part of the location, or as many parts as distinguish it from other runs."""
    facts: list[Fact]
    """All facts of the journal, in order."""
    history: pd.DataFrame
    """A row for every score, see ``history_of``."""
    figures: dict[str, Any] | None
    """The content of result.json; None before the search has finished."""

    @property
    def started(self) -> Started:
        """The journal's first fact: identity, versions, groups."""
        return next(fact for fact in self.facts if isinstance(fact, Started))

    @property
    def measure(self) -> Measure:
        """The figure by which the search's networks are compared."""
        return measure_of(self.started.identity)

    def named(self, variant: str) -> list[dict[str, Any]]:
        """Return the rows of result.json of that name; none before the search has finished."""
        rows: list[dict[str, Any]] = (self.figures or {}).get("variants", [])
        return [row for row in rows if row["name"] == variant]


@dataclass(frozen=True, kw_only=True, eq=False)
class RescoredFinalist:
    """A finalist's scores with fresh seeds on choose-val."""

    name: str
    """Where the mask comes from, such as ``mode`` or ``sample 3``."""
    keep: BoolArray
    """The mask, ``(num_filters,)``, True = kept."""
    losses: tuple[float, ...]
    """The loss of each score; minus the score of the user's own task."""
    accuracies: tuple[float, ...]
    """The accuracy of each score; empty for the user's own task."""
    is_chosen: bool
    """Whether this finalist was chosen."""

    @property
    def mean(self) -> Feedback:
        """The mean of the scores."""
        accuracy = fmean(self.accuracies) if self.accuracies else None
        return Feedback(proposal_id=0, val_loss=fmean(self.losses), val_accuracy=accuracy)


def read_run(run_dir: str | Path) -> Run:
    """Read a run directory.

    Raises:
        ValueError: it holds no journal, or the search has not begun.
    """
    storage = open_storage(run_dir)
    facts = read_journal(run_dir)
    if not any(isinstance(fact, Started) for fact in facts):
        raise ValueError(
            f"the search in {storage.location} has not begun: there is nothing to report"
        )
    return Run(
        location=storage.location.rstrip("/"),
        name=label_of(storage.location.rstrip("/").rpartition("/")[2]),
        facts=facts,
        history=history_of(facts),
        figures=read_figures(run_dir, facts) if storage.exists(RESULT) else None,
    )


def with_distinct_names(runs: Sequence[Run]) -> list[Run]:
    """Return the runs, named by as many last parts of their locations as distinguish them."""
    parts = [run.location.split("/") for run in runs]
    for count in range(1, max(map(len, parts)) + 1):
        names = [label_of("/".join(part[-count:])) for part in parts]
        if len(set(names)) == len(names):
            break
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def finalists(run: Run) -> list[RescoredFinalist]:
    """Return the finalists that were rescored on choose-val, in that order."""
    chosen = {fact.keep.tobytes() for fact in run.facts if isinstance(fact, Chosen)}
    scores: dict[tuple[str, bytes], list[Rescored]] = {}
    for fact in run.facts:
        if isinstance(fact, Rescored) and fact.split == "choose_val":
            scores.setdefault((fact.finalist, fact.keep.tobytes()), []).append(fact)
    return [
        RescoredFinalist(
            name=name,
            keep=repeats[0].keep,
            losses=tuple(fact.val_loss for fact in repeats),
            accuracies=tuple(
                fact.val_accuracy for fact in repeats if fact.val_accuracy is not None
            ),
            is_chosen=mask in chosen,
        )
        for (name, mask), repeats in scores.items()
    ]


def scores_by_worker(run: Run) -> dict[str, list[Feedback]]:
    """Return every worker's scores in the order in which they ended, by the worker's name."""
    by_worker: dict[str, list[Feedback]] = {}
    timed = (fact for fact in _scored(run) if fact.at is not None)
    for fact in sorted(timed, key=lambda fact: fact.at or 0.0):
        by_worker.setdefault(fact.worker, []).append(fact)
    return by_worker


def costs_of(run: Run) -> dict[int, float]:
    """Return the number that the search compares, the lower the better, for each scored id."""
    merit = run.started.merit
    parameters = {f.proposal_id: f.parameters for f in run.facts if isinstance(f, Proposal)}
    return {f.proposal_id: merit.cost(f, parameters[f.proposal_id]) for f in _scored(run)}


def _scored(run: Run) -> Iterator[Feedback]:
    return (fact for fact in run.facts if isinstance(fact, Feedback) and not fact.failed)
