"""Figures of result.json as text: a network's name, accuracy or score, size, and what was cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fppmo_ray.service.journal.artifacts import DENSE, FPPMO

_Figures = dict[str, Any]
_TOP5 = "top5_accuracy"


_MAX_LABEL = 40


def plain(text: str) -> str:
    """Return text whose control characters, line ends and halves of surrogate pairs are escaped.

    No file of SVG or HTML may hold them, and in a terminal they are commands.
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def label_of(name: str) -> str:
    """Return a name as a label of a figure: plain, and cut where it is long."""
    shown = plain(name)
    return shown if len(shown) <= _MAX_LABEL else f"{shown[: _MAX_LABEL - 1]}…"


@dataclass(frozen=True, kw_only=True)
class Measure:
    """The figure by which people compare networks: accuracy, or the score of the user's task."""

    name: str
    """Its name in tables and on axes."""
    unit: str
    """Its unit; empty if it has none."""
    entry: str
    """Its name among the metrics in result.json."""
    scale: float
    """Factor from the recorded number to the displayed one."""

    @property
    def label(self) -> str:
        """Name and unit: ``accuracy, %``."""
        return f"{self.name}, {self.unit}" if self.unit else self.name

    def at(self, where: str) -> str:
        """Return name, place and unit for tables and axes: ``accuracy on search-val, %``."""
        return f"{self.name} {where}, {self.unit}" if self.unit else f"{self.name} {where}"

    def of(self, row: Mapping[str, Any], moment: str) -> float:
        """Return a network's figure on the test data.

        Args:
            row: The network's row of result.json.
            moment: ``before`` or ``after`` fine-tuning.
        """
        return self.scale * float(row[moment]["test"][self.entry])

    def text(self, row: Mapping[str, Any], moment: str) -> str:
        """Return the same figure as text, followed by the top-5 accuracy if there is one.

        Args:
            row: The network's row of result.json.
            moment: ``before`` fine-tuning, ``distilled`` or ``after``; the text is empty if the
                network was not tested then.
        """
        if moment not in row:
            return ""
        figures = [self.of(row, moment)]
        if (top5 := row[moment]["test"].get(_TOP5)) is not None:
            figures.append(self.scale * top5)
        return " / ".join(map(self.written, figures))

    def written(self, figure: float) -> str:
        """Return a displayed figure as text: two decimals, or five digits of a task's score."""
        return f"{figure:.2f}" if self == ACCURACY else f"{figure:#.5g}"


ACCURACY = Measure(name="accuracy", unit="%", entry="accuracy", scale=100)


def measure_of(recorded: Mapping[str, Any]) -> Measure:
    """Return the measure of a search.

    Args:
        recorded: The search's result.json, or the identity in its journal.
    """
    task = recorded.get("task")
    if task is None:
        return ACCURACY
    name, _, unit = label_of(task["measure"]).partition(", ")
    return Measure(name=name, unit=unit, entry="score", scale=1)


def moments_of(figures: Mapping[str, Any]) -> dict[str, str]:
    """Return the moments at which networks were tested, each with the name of its column.

    Args:
        figures: The content of result.json.
    """
    has_distilled = any("distilled" in row for row in figures["variants"])
    distilled = {"distilled": "distilled"} if has_distilled else {}
    return {"before": "before fine-tuning", **distilled, "after": "after"}


def on_test(figures: Mapping[str, Any]) -> str:
    """Return a label of a result.json's figures, such as ``accuracy on test, %``."""
    has_top5 = _TOP5 in figures["variants"][0]["before"]["test"]
    return measure_of(figures).at("on test") + (" (top-1 / top-5)" if has_top5 else "")


def title_of(row: _Figures) -> str:
    """Return a network's name in tables, with its budget if the search had several."""
    name = "FPPMO" if row["name"] == FPPMO else row["name"]
    return f"{name}, budget {row['budget']}" if "budget" in row else name


def network_rows(figures: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of the table of networks: name, figures at every moment, sizes.

    The dense network has two: as given, and after the extra training that all networks get.

    Args:
        figures: The content of result.json.
    """
    measure, moments = measure_of(figures), moments_of(figures)
    rows = []
    for row in figures["variants"]:
        titles = {title_of(row): [*moments]}
        if row["name"] == DENSE:
            titles = {DENSE: ["before"], "dense, same extra training": ["after"]}
        for title, shown in titles.items():
            texts = [measure.text(row, at) if at in shown else "" for at in moments]
            rows.append([title, *texts, *sizes(row)])
    return rows


def size_columns(row: _Figures) -> list[str]:
    """Return the column names of ``sizes``."""
    return [
        *("MACs, M", "MACs cut", "parameters", "file, kB", "activations, kB"),
        *(f"ms at batch {batch}" for batch in row["latency_ms"]),
    ]


def sizes(row: _Figures) -> list[str]:
    """Return a network's MACs, share of MACs cut, parameters, kB and latencies as text.

    Activations are the peak of the bytes that one image's activations take during inference.
    """
    return [
        f"{row['macs'] / 1e6:.2f}",
        f"{100 * row['macs_cut']:.1f} %",
        f"{row['parameters']:,}",
        f"{row['file_bytes'] / 1000:.0f}",
        f"{row['activation_bytes'] / 1000:.1f}",
        *(f"{milliseconds:.2f}" for milliseconds in row["latency_ms"].values()),
    ]


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


_CUT_COLUMNS: dict[str, dict[str, Callable[[_Figures], str]]] = {
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


def cut_table(figures: _Figures) -> tuple[list[str], list[list[str]]]:
    """Return the table of resources that were cut besides MACs.

    Args:
        figures: The content of result.json.

    Returns:
        The names of the columns, and a row for every network. Both are empty if only MACs were cut.
    """
    variants = [row for row in figures["variants"] if row.get("cuts")]
    if not variants:
        return [], []
    columns = [
        (resource, name, show)
        for resource in variants[0]["cuts"]
        for name, show in _CUT_COLUMNS[resource].items()
    ]
    rows = [
        [title_of(row), *(show(row["cuts"][resource]) for resource, _, show in columns)]
        for row in variants
    ]
    return ["network", *(name for _, name, _ in columns)], rows


def table_sentence(figures: _Figures) -> str:
    """Return a sentence about the latency table's error, empty without a table."""
    table = figures.get("latency_table")
    if table is None:
        return ""
    place = f"at batch {table['batch']} on" if table["batch"] else "by"
    return (
        f"latency {place} {table['device']}; its table is off by "
        f"{100 * table['median_error']:.1f} % (median of masks that it was not fitted to)"
    )
