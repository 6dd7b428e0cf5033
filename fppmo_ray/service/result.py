"""The result of a finished search, read from its run directory."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from fppmo_ray.distribution import BoolArray
from fppmo_ray.pruning import load_network
from fppmo_ray.service.journal.artifacts import (
    FPPMO,
    budgets_asked,
    history_of,
    network_files,
    read_figures,
)
from fppmo_ray.service.journal.facts import Chosen, Fact
from fppmo_ray.service.journal.run_directory import read_journal


@dataclass(frozen=True, kw_only=True)
class Best:
    """The chosen mask of a budget, and the figures of its network."""

    finalist: str
    """Name of the chosen finalist: ``mode``, ``averaged mode``, ``sample <id>`` or
    ``importance-only``."""
    keep: BoolArray
    """``(num_filters,)``, True = kept."""
    budget: float
    """The ``macs_cut`` of the settings."""
    macs: int
    """Multiply-accumulates of the network for one input."""
    macs_cut: float
    """Share of the dense network's MACs that is removed: at least ``budget``."""
    widths: dict[str, int]
    """Kept filters of each channel group."""
    test_score_before: float
    """Figure on the test split before fine-tuning: accuracy in [0, 1], or the task's own score."""
    test_score: float
    """The same figure after fine-tuning."""

    @property
    def test_accuracy_before(self) -> float:
        """The same as ``test_score_before``, for image classification."""
        return self.test_score_before

    @property
    def test_accuracy(self) -> float:
        """The same as ``test_score``, for image classification."""
        return self.test_score


@dataclass(frozen=True)
class SearchResult:
    """A finished search.

    Args:
        run_dir: Its run directory, a folder or a URI.
        dense: A network with the architecture of the dense network; its weights do not matter.
    """

    run_dir: str | Path
    dense: nn.Module

    @cached_property
    def figures(self) -> dict[str, Any]:
        """The content of result.json."""
        return read_figures(self.run_dir)

    @property
    def best(self) -> Best:
        """The chosen mask.

        Raises:
            ValueError: the search had several budgets; see ``front``.
        """
        front = self.front
        if len(front) > 1:
            listed = ", ".join(str(item.budget) for item in front)
            raise ValueError(
                f"the search had several budgets ({listed}), and none is the best: "
                "take one of result.front"
            )
        return front[0]

    @cached_property
    def front(self) -> tuple[Best, ...]:
        """The chosen mask of every budget, the widest first."""
        facts, figures = self._facts, self.figures
        chosen = {fact.macs_cut: fact for fact in facts if isinstance(fact, Chosen)}
        rows = [row for row in figures["variants"] if row["name"] == FPPMO]
        return tuple(_best(row, chosen[row.get("budget")], figures) for row in rows)

    @cached_property
    def history(self) -> pd.DataFrame:
        """One row for every proposal with feedback, by ascending id; see ``history_of``."""
        return history_of(self._facts)

    @cached_property
    def _facts(self) -> list[Fact]:
        return read_journal(self.run_dir)

    def network(self, macs_cut: float | None = None) -> nn.Module:
        """Return the smaller, fine-tuned network, in eval mode on the CPU.

        Args:
            macs_cut: Budget of the network; None: the only one.

        Raises:
            ValueError: the search had no such budget, or several budgets and ``macs_cut`` is None.
        """
        with network_files(self.run_dir, macs_cut) as (_, recipe):
            return load_network(recipe, constructor=lambda: copy.deepcopy(self.dense).cpu())


def _best(row: dict[str, Any], chosen: Chosen, figures: dict[str, Any]) -> Best:
    return Best(
        finalist=chosen.finalist,
        keep=chosen.keep,
        budget=row.get("budget", budgets_asked(figures)[0]),
        macs=row["macs"],
        macs_cut=row["macs_cut"],
        widths=row["widths"],
        test_score_before=_test_score(row["before"]),
        test_score=_test_score(row["after"]),
    )


def _test_score(moment: dict[str, Any]) -> float:
    metrics: dict[str, float] = moment["test"]
    return metrics["accuracy"] if "accuracy" in metrics else metrics["score"]
