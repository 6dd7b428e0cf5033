"""What other methods came to, from the cells that ``jobs/compare.py`` leaves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from fppmo_ray.report.cells import reading_cell

_OWN = "fppmo"  # what a search finds is not its own rival
_TOLERANCE = 0.005  # of the dense network's MACs: a cell tells them by a share


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A method at one budget: its networks' test accuracies after equal fine-tuning, by seed."""

    method: str
    budget: float
    macs: float
    """Mean over seeds."""
    accuracies: tuple[float, ...]
    """In [0, 1]."""

    @property
    def mean(self) -> float:
        """Of the accuracies."""
        return fmean(self.accuracies)

    @property
    def deviation(self) -> float:
        """Standard deviation of the accuracies; 0 of one alone."""
        return stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0


def read_rivals(folder: Path, dense_macs: int) -> list[Rival]:
    """The methods in a folder of cells, by budget and from the worst to the best.

    Args:
        folder: Such as ``jobs/results/compare/resnet20``.
        dense_macs: Of the network that they are compared on.

    Raises:
        ValueError: the folder holds no cells, or cells of another network.
    """
    cells = [_read(path) for path in sorted(folder.glob("*.json"))]
    if not cells:
        raise ValueError(f"{folder} holds no cells of jobs/compare.py to compare with")
    found: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for path, key, figures in cells:
        dense = figures["macs"] / (1 - figures["macs_cut"])
        if abs(dense - dense_macs) > _TOLERANCE * dense_macs:
            raise ValueError(
                f"{path} is of a network of {dense:,.0f} MACs, and this search of one of "
                f"{dense_macs:,}; give the cells of the same network"
            )
        if key["method"].partition("@")[0] != _OWN:
            found.setdefault((key["macs_cut"], key["method"]), []).append(figures)
    rivals = [_rival(method, budget, rows) for (budget, method), rows in found.items()]
    return sorted(rivals, key=lambda rival: (rival.budget, rival.mean))


def _read(path: Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    with reading_cell(path, "jobs/compare.py"):
        told = json.loads(path.read_text())
        return path, told["key"], told["figures"]


def _rival(method: str, budget: float, rows: Sequence[dict[str, Any]]) -> Rival:
    return Rival(
        method=method,
        budget=budget,
        macs=fmean(row["macs"] for row in rows),
        accuracies=tuple(row["after"]["test"]["accuracy"] for row in rows),
    )
