"""The tables of the recipes job: how every recipe does, and how it does against the default."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from cells import Record
from intervals import paired_difference
from rich.table import Table

Case = tuple[str, int]
"""A mask's name and a seed."""


DEFAULT = "default"
LAST_WEIGHTS = "last"


@dataclass(frozen=True, kw_only=True)
class Way:
    """A recipe, and which weights its fine-tuning ends with."""

    variant: str
    """``default``, or the settings in which the recipe differs."""
    weights: str
    """``last``; averaged weights were measured once and are still in the archive."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The figures of a fine-tuned network."""

    figures: Mapping[str, Any]
    epoch_seconds: Sequence[float]

    @property
    def accuracy(self) -> float:
        """On all held-out images, in %."""
        return 100 * float(self.figures["held_out"]["accuracy"])


Readings = dict[Way, dict[Case, Reading]]


def recipe_tables(records: Sequence[Record]) -> list[Table]:
    """Return one table over all masks and one for each of several masks, the best recipe first.

    Args:
        records: Cells of one study, which need not be complete.
    """
    readings: Readings = defaultdict(dict)
    for record in records:
        way = Way(variant=record.key["variant"], weights=record.key.get("weights", LAST_WEIGHTS))
        readings[way][record.key["mask"], record.key["seed"]] = Reading(
            figures=record.figures,
            epoch_seconds=[epoch["seconds"] for epoch in record.figures["epochs"]],
        )
    masks = list(dict.fromkeys(record.key["mask"] for record in records))
    tables = [_table("all masks", readings)]
    if len(masks) > 1:
        tables += [_table(mask, _of_mask(readings, mask)) for mask in masks]
    return tables


def _of_mask(readings: Readings, mask: str) -> Readings:
    return {
        way: {case: reading for case, reading in of_case.items() if case[0] == mask}
        for way, of_case in readings.items()
    }


def _table(title: str, readings: Readings) -> Table:
    default = Way(variant=DEFAULT, weights=LAST_WEIGHTS)
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
            *(way.variant, way.weights, str(len(of_case)), f"{means[way]:.2f}"),
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
