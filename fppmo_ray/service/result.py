"""What a search leaves behind, read from its run directory."""

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
    """The chosen mask and what it makes of the network."""

    finalist: str
    """Where it came from: the distribution's mode, a sample, or the importance alone."""
    keep: BoolArray
    """``(num_filters,)``, True = kept."""
    budget: float
    """The ``macs_cut`` that was asked for."""
    macs: int
    macs_cut: float
    """The share that is removed: at least the budget."""
    widths: dict[str, int]
    """Kept filters of each channel group."""
    test_score_before: float
    """Before fine-tuning: accuracy in [0, 1], or what the user's own task says."""
    test_score: float
    """After fine-tuning."""

    @property
    def test_accuracy_before(self) -> float:
        """``test_score_before``, by the name that it has where images are classified."""
        return self.test_score_before

    @property
    def test_accuracy(self) -> float:
        """``test_score``, by the name that it has where images are classified."""
        return self.test_score


@dataclass(frozen=True)
class SearchResult:
    """A finished search.

    Args:
        run_dir: Its folder, or the URI of where it is.
        dense: A network of the class that was pruned; its weights do not matter.
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
            ValueError: the search had several budgets, which have one each.
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
        """One row per proposal that has feedback, by ascending id.

        It is empty for a search in stages, whose proposals are in the stages' own journals.
        """
        return history_of(self._facts)

    @cached_property
    def _facts(self) -> list[Fact]:
        return read_journal(self.run_dir)

    def network(self, macs_cut: float | None = None) -> nn.Module:
        """The smaller, fine-tuned network, in eval mode on the CPU.

        Args:
            macs_cut: Which budget's, of several.

        Raises:
            ValueError: the search had no such budget, or several and none is named.
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
