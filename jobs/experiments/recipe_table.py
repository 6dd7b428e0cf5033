"""The tables of the recipes job: how every recipe does, and how it does against the default."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from cells import Record
from intervals import paired_difference
from recipe_variants import DEFAULT, without_averaging
from rich.table import Table

Case = tuple[str, int]
"""A mask's name and a seed."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """A recipe, and which of its weights are taken."""

    changes: str
    ema_decay: float
    """0: the last weights."""

    def __str__(self) -> str:
        return self.changes

    @property
    def weights(self) -> str:
        """In words."""
        return f"averaged, {self.ema_decay:g}" if self.ema_decay else "last"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What was read of a fine-tuned network."""

    figures: Mapping[str, Any]
    epoch_seconds: Sequence[float]

    @property
    def accuracy(self) -> float:
        """On all images held out, in %."""
        return 100 * float(self.figures["held_out"]["accuracy"])


Readings = dict[Way, dict[Case, Reading]]


def recipe_tables(records: Sequence[Record], *, default_ema_decay: float) -> list[Table]:
    """One table over all masks, and one for each of several; the best recipe comes first.

    Args:
        records: Of one job; there may be more to come.
        default_ema_decay: Of the default recipe.
    """
    readings = _readings(records)
    masks = list(dict.fromkeys(record.key["mask"] for record in records))
    default = Way(changes=DEFAULT, ema_decay=default_ema_decay)
    tables = [_table("all masks", readings, default)]
    if len(masks) > 1:
        tables += [_table(mask, _of_mask(readings, mask), default) for mask in masks]
    return tables


def _readings(records: Sequence[Record]) -> Readings:
    readings: Readings = defaultdict(dict)
    for record in records:
        changes = without_averaging(record.key["variant"])
        case = record.key["mask"], record.key["seed"]
        seconds = [epoch["seconds"] for epoch in record.figures["epochs"]]
        decays = {"averaged": record.key["recipe"]["ema_decay"], "last": 0.0}
        for name, decay in decays.items():
            way = Way(changes=changes, ema_decay=decay)
            readings[way][case] = Reading(figures=record.figures[name], epoch_seconds=seconds)
    return readings


def _of_mask(readings: Readings, mask: str) -> Readings:
    return {
        way: {case: reading for case, reading in of_case.items() if case[0] == mask}
        for way, of_case in readings.items()
    }


def _table(title: str, readings: Readings, default: Way) -> Table:
    table = Table(title=f"{title}: fine-tuned networks on images held out, best first")
    table.add_column("recipe", no_wrap=True)
    table.add_column("weights", no_wrap=True)
    columns = ("n", "accuracy, %", "minus the default [95 %]", "loss", "test accuracy, %")
    for column in (*columns, "s an epoch"):
        table.add_column(column, justify="right", no_wrap="[95 %]" in column)
    there = {way: of_case for way, of_case in readings.items() if of_case}
    means = {way: _mean_accuracy(of_case) for way, of_case in there.items()}
    for way in sorted(there, key=lambda way: -means[way]):
        of_case = there[way]
        seconds = [value for reading in of_case.values() for value in reading.epoch_seconds]
        table.add_row(
            *(str(way), way.weights, str(len(of_case)), f"{means[way]:.2f}"),
            "" if way == default else _difference(of_case, there.get(default, {})),
            f"{fmean(r.figures['held_out']['loss'] for r in of_case.values()):.4f}",
            f"{100 * fmean(r.figures['test']['accuracy'] for r in of_case.values()):.2f}",
            f"{median(seconds):.1f}",
        )
    return table


def _mean_accuracy(of_case: Mapping[Case, Reading]) -> float:
    return fmean(reading.accuracy for reading in of_case.values())


def _difference(of_case: Mapping[Case, Reading], others: Mapping[Case, Reading]) -> str:
    """Over the masks and seeds that both have."""
    both = sorted(of_case.keys() & others.keys())
    if not both:
        return ""
    pair = ([rows[case].accuracy for case in both] for rows in (of_case, others))
    return str(paired_difference(*pair))
