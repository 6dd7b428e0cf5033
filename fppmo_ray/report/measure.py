"""What networks are judged by, as people read it: accuracy, or the score of the user's own task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_TOP5 = "top5_accuracy"


@dataclass(frozen=True, kw_only=True)
class Measure:
    """How figures of a search are named and written."""

    name: str
    unit: str
    """None: empty."""
    entry: str
    """Of the metrics in result.json."""
    scale: float
    """What is kept is multiplied by it."""

    def at(self, where: str) -> str:
        """For tables and axes: ``accuracy on search-val, %``."""
        return f"{self.name} {where}, {self.unit}" if self.unit else f"{self.name} {where}"

    def of(self, row: Mapping[str, Any], moment: str) -> float:
        """A network's figure on the test data, ``before`` or ``after`` fine-tuning.

        Args:
            row: Of result.json.
            moment: Which.
        """
        return self.scale * float(row[moment]["test"][self.entry])

    def text(self, row: Mapping[str, Any], moment: str) -> str:
        """The same, as it is written in tables; behind it top-5 accuracy, where it is known."""
        figures = [self.of(row, moment)]
        if (top5 := row[moment]["test"].get(_TOP5)) is not None:
            figures.append(self.scale * top5)
        return " / ".join(map(self.written, figures))

    def written(self, figure: float) -> str:
        """A figure of that scale: of a score nobody knows how large it is, so five digits count."""
        return f"{figure:.2f}" if self == ACCURACY else f"{figure:#.5g}"


ACCURACY = Measure(name="accuracy", unit="%", entry="accuracy", scale=100)


def measure_of(told: Mapping[str, Any]) -> Measure:
    """The measure of a search.

    Args:
        told: Its result.json, or the identity in its journal.
    """
    task = told.get("task")
    if task is None:
        return ACCURACY
    name, _, unit = task["measure"].partition(", ")
    return Measure(name=name, unit=unit, entry="score", scale=1)


def on_test(figures: Mapping[str, Any]) -> str:
    """What the figures in the rows of a result.json are: ``accuracy on test, %``."""
    has_top5 = _TOP5 in figures["variants"][0]["before"]["test"]
    return measure_of(figures).at("on test") + (" (top-1 / top-5)" if has_top5 else "")
