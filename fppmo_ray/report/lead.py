"""The result of a search in sentences: what was removed, at what cost, at what speed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fppmo_ray.report.result_rows import Measure, measure_of
from fppmo_ray.service.journal.artifacts import DENSE, FPPMO, IMPORTANCE_ONLY

_Figures = Mapping[str, Any]


def headlines(figures: _Figures) -> list[str]:
    """Return one sentence for every budget: what was removed, at what cost, at what speed.

    Args:
        figures: The content of result.json.
    """
    dense = _row(figures, DENSE, None)
    return [_headline(figures, row, dense) for row in figures["variants"] if row["name"] == FPPMO]


def against_importance(figures: _Figures) -> list[str]:
    """Return one sentence for every budget: how the network compares with its importance-only one.

    Args:
        figures: The content of result.json.
    """
    measure, sentences = measure_of(figures), list[str]()
    trained = " after as much training" if _is_trained(figures) else ""
    for row in figures["variants"]:
        if row["name"] != FPPMO or (plain := _row(figures, IMPORTANCE_ONLY, row)) is None:
            continue
        budget = f"Budget {row['budget']}: " if "budget" in row else ""
        if plain["widths"] == row["widths"] and plain["after"] == row["after"]:
            sentences.append(
                f"{budget}the chosen mask is the importance-only one; no proposal did better on "
                "choose-val."
            )
            continue
        difference = _difference(measure, row, plain, IMPORTANCE_ONLY)
        sentences.append(
            f"{budget}the importance-only network of the same size has "
            f"{_figure(measure, plain)}{trained}; the search's differs by "
            f"{difference}."
        )
    return [sentence[0].upper() + sentence[1:] for sentence in sentences]


def _row(figures: _Figures, name: str, like: _Figures | None) -> Any:
    """Return a network's row, of the same budget as another row if there is one, else None."""
    budget = None if like is None else like.get("budget")
    for row in figures["variants"]:
        if row["name"] == name and (like is None or row.get("budget") == budget):
            return row
    return None


def _headline(figures: _Figures, row: _Figures, dense: _Figures) -> str:
    measure = measure_of(figures)
    images = figures.get("images", {}).get("test")
    trained = " with the same extra training" if _is_trained(figures) else ""
    on = f" on {images:,} test images" if images else " on test"
    budget = f"Budget {row['budget']}: " if "budget" in row else ""
    return (
        f"{budget}{_removed(row)} removed; {measure.name}{on} is {_figure(measure, row)}, "
        f"{_difference(measure, row, dense, DENSE)} from the dense network{trained}"
        f"{_speed(row, dense)}."
    )


def _is_trained(figures: _Figures) -> bool:
    """Return whether the networks were fine-tuned after all."""
    epochs = figures.get("settings", {}).get("fine_tune", {}).get("epochs", 1)
    return bool(epochs)


def _removed(row: _Figures) -> str:
    cut = row["macs_cut"]
    parts = [f"{100 * cut:.1f} % of the multiply-accumulates"]
    cuts = row.get("cuts", {})
    if "params" in cuts:
        parts.append(f"{100 * cuts['params']['cut']:.1f} % of the parameters")
    if "memory" in cuts:
        parts.append(f"{100 * cuts['memory']['cut']:.1f} % of the activations' memory")
    if "latency" in cuts:
        parts.append(f"{100 * cuts['latency']['measured_cut']:.1f} % of the latency")
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def _figure(measure: Measure, row: _Figures) -> str:
    unit = f" {measure.unit}" if measure.unit else ""
    return f"{measure.written(measure.of(row, 'after'))}{unit}"


def _difference(measure: Measure, row: _Figures, other: _Figures, name: str) -> str:
    """Return how far a network's figure is from another's, with the interval if it is known."""
    found = measure.of(row, "after") - measure.of(other, "after")
    unit = "points" if measure.unit == "%" else measure.unit
    interval = row.get("against", {}).get(name)
    half = "" if interval is None else f" ± {measure.written(measure.scale * interval['half'])}"
    written = measure.written(found)
    sign = "" if written.startswith("-") else "+"
    return f"{sign}{written}{half} {unit}".rstrip()


def _speed(row: _Figures, dense: _Figures) -> str:
    """Return the measured speed-up at the largest batch, empty without measurements."""
    if not row["latency_ms"]:
        return ""
    batch = max(row["latency_ms"], key=int)
    ours, theirs = row["latency_ms"][batch], dense["latency_ms"].get(batch, 0.0)
    if not ours or not theirs:
        return ""
    return f"; it runs {theirs / ours:.2f} times as fast, measured at batch {batch}"
