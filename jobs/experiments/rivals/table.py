"""Tables of a comparison's cells, one for each cut."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

from cells import Record
from intervals import paired_difference, spread
from rich.table import Table

from rivals.methods import DENSE, FPPMO, METHODS, UNIFORM

Rows = dict[str, dict[int, Record]]
"""Records by method and seed."""


def comparison_tables(records: Iterable[Record]) -> list[Table]:
    """Return one table per cut; the dense network is in all of them.

    Raises:
        ValueError: the records belong to different comparisons.
    """
    cuts = by_cut(records)
    return [_table(cut, rows) for cut, rows in cuts.items()]


def by_cut(records: Iterable[Record]) -> dict[float, Rows]:
    """Return the records by the cut that was asked for, in order; the dense network's in every cut.

    Raises:
        ValueError: networks, weights, recipes or compute configurations differ.
    """
    known = list(records)
    _require_alike(known)
    cuts: dict[float, Rows] = defaultdict(lambda: defaultdict(dict))
    for record in known:
        if record.key["method"] != DENSE:
            cuts[record.key["macs_cut"]][record.key["method"]][record.key["seed"]] = record
    dense = {r.key["seed"]: r for r in known if r.key["method"] == DENSE}
    for rows in cuts.values():
        if dense:
            rows[DENSE] = dense
    return {cut: _in_order(cuts[cut]) for cut in sorted(cuts)}


def accuracies_on_test(rows: dict[int, Record], moment: str = "after") -> list[float]:
    """Return accuracies in %, in the order of the seeds.

    Args:
        rows: Records by seed.
        moment: ``before`` or ``after`` fine-tuning.
    """
    return [100 * rows[seed].figures[moment]["test"]["accuracy"] for seed in sorted(rows)]


def _require_alike(records: Sequence[Record]) -> None:
    for name in ("network", "weights", "recipe", "compute", "device_type"):
        found = {str(record.key[name]): record.key for record in records}
        if len(found) > 1:
            first, second = sorted(found)[:2]
            raise ValueError(
                f"the folder holds cells of different comparisons: {name} is {first} and {second}; "
                "give every network and recipe a --results folder of its own"
            )


def _in_order(rows: Rows) -> Rows:
    def place(method: str) -> tuple[int, int]:
        name, _, scores = method.partition("@")
        return METHODS.index(name), int(scores or 0)

    return {method: rows[method] for method in sorted(rows, key=place)}


def _table(cut: float, rows: Rows) -> Table:
    table = Table(title=f"test accuracy, %, with {100 * cut:g} % of the MACs cut")
    table.add_column("method", no_wrap=True)
    for column in (
        "seeds",
        "MACs cut, %",
        "parameters",
        "before",
        "after fine-tuning",
        "minus uniform L1 [95 %]",
        "FPPMO minus it [95 %]",
        "scores",
        "scoring, s",
        "tuning, s",
    ):
        table.add_column(column, justify="right", no_wrap="[95 %]" in column)
    for method, of_seed in rows.items():
        table.add_row(method, *_entries(method, of_seed, rows))
    return table


def _entries(method: str, of_seed: dict[int, Record], rows: Rows) -> list[str]:
    def mean(value: Callable[[Record], float]) -> float:
        return fmean(value(record) for record in of_seed.values())

    scores = mean(lambda r: r.figures["scores"])
    rescores = mean(lambda r: r.figures["rescores"])
    return [
        str(len(of_seed)),
        f"{100 * mean(lambda r: r.figures['macs_cut']):.1f}",
        f"{mean(lambda r: r.figures['parameters']):,.0f}",
        spread(accuracies_on_test(of_seed, "before")),
        spread(accuracies_on_test(of_seed)),
        "" if method == UNIFORM else _difference(of_seed, rows.get(UNIFORM)),
        "" if method == FPPMO else _difference(rows.get(FPPMO), of_seed),
        f"{scores:.0f} + {rescores:.0f}" if scores else "0",
        f"{mean(lambda r: r.figures['score_seconds']):.0f}",
        f"{mean(lambda r: r.figures['tuning_seconds']):.0f}",
    ]


def _difference(of_seed: dict[int, Record] | None, others: dict[int, Record] | None) -> str:
    """Paired difference over the seeds that both methods have."""
    both = sorted((of_seed or {}).keys() & (others or {}).keys())
    if of_seed is None or others is None or not both:
        return ""
    values, baseline = (
        accuracies_on_test({seed: rows[seed] for seed in both}) for rows in (of_seed, others)
    )
    return str(paired_difference(values, baseline))
