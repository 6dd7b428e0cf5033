"""What networks were cut of besides MACs, as a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_Figures = dict[str, Any]


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


_COLUMNS: dict[str, dict[str, Callable[[_Figures], str]]] = {
    "params": {"parameters cut": lambda of: _share(of["cut"])},
    "latency": {
        "latency cut, by the table": lambda of: _share(of["predicted_cut"]),
        "measured": lambda of: _share(of["measured_cut"]),
        "ms, by the table": lambda of: f"{of['predicted_ms']:.3f}",
        "ms, measured": lambda of: f"{of['measured_ms']:.3f}",
    },
    "memory": {
        "activations cut": lambda of: _share(of["cut"]),
        "at most, kB": lambda of: f"{of['left'] / 1000:.1f}",
    },
}


def cut_table(
    figures: _Figures, title_of: Callable[[_Figures], str]
) -> tuple[list[str], list[list[str]]]:
    """Names of columns, and a row for every network; nothing where MACs alone were cut.

    Args:
        figures: The content of result.json.
        title_of: What a row of it is called.
    """
    variants = [row for row in figures["variants"] if row.get("cuts")]
    if not variants:
        return [], []
    columns = [
        (resource, name, show)
        for resource in variants[0]["cuts"]
        for name, show in _COLUMNS[resource].items()
    ]
    rows = [
        [title_of(row), *(show(row["cuts"][resource]) for resource, _, show in columns)]
        for row in variants
    ]
    return ["network", *(name for _, name, _ in columns)], rows


def table_sentence(figures: _Figures) -> str:
    """How far a latency table may be trusted; empty where there is none."""
    table = figures.get("latency_table")
    if table is None:
        return ""
    return (
        f"latency at batch {table['batch']} on {table['device']}; its table is off by "
        f"{100 * table['median_error']:.1f} % (median of masks that it was not fitted to)"
    )
