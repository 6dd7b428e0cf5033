"""What networks are judged by, as people read it: accuracy, or the score of the user's own task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


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
        """The same, as it is written in tables."""
        return self.written(self.of(row, moment))

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
