"""Figures of a search: how scores rose, how the pruning probabilities moved, the front."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fppmo_ray.service.conclusion import DENSE, FPPMO, RESULT
from fppmo_ray.service.finalists import IMPORTANCE_ONLY
from fppmo_ray.service.record.facts import Started, Updated
from fppmo_ray.service.record.run_directory import read_journal
from fppmo_ray.service.record.storage import location_of, open_storage
from fppmo_ray.service.result import read_figures, read_history

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_GROUP_LABELS = 40


def draw_figures(run_dir: str | Path) -> None:
    """Write ``scores.png`` and ``probabilities.png`` into the run directory.

    Of a finished search with several budgets, ``front.png`` too.

    Raises:
        ValueError: it holds no journal, or nothing has been scored yet.
    """
    from matplotlib.figure import Figure

    if read_history(run_dir)["val_accuracy"].isna().all():
        raise ValueError(
            f"nothing has been scored yet in {location_of(run_dir)}: there is nothing to draw"
        )
    storage = open_storage(run_dir)
    drawings = {"scores": _draw_scores, "probabilities": _draw_probabilities}
    if storage.exists(RESULT) and _has_front(run_dir):
        drawings["front"] = _draw_front
    for name, draw in drawings.items():
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        draw(figure, run_dir)
        image = io.BytesIO()
        figure.savefig(image, dpi=120)
        storage.write(f"{name}.png", image.getvalue())


def _draw_scores(figure: Figure, run_dir: str | Path) -> None:
    """Every score's accuracy on search-val, and each generation's mean and best.

    Of scores in several rungs, mean and best are those of the deepest; of several budgets, each
    has its own.
    """
    from matplotlib.ticker import MaxNLocator

    history = read_history(run_dir).dropna(subset=["val_accuracy"])
    accuracy = 100 * history["val_accuracy"].astype(float)
    rungs = sorted({*history["rung"]})
    axes: Axes = figure.subplots()
    for rung in rungs:
        at_rung = history["rung"] == rung
        label = "proposal" if len(rungs) == 1 else f"proposal, {rung} steps"
        color = "0.7" if rung == rungs[-1] else "0.88"
        axes.plot(history["generation"][at_rung], accuracy[at_rung], ".", color=color, label=label)
    deepest = history["rung"] == rungs[-1]
    budgets = sorted({*history["budget"].dropna()})
    _draw_generations(axes, history[deepest], budgets)
    axes.set(xlabel="generation", ylabel="accuracy on search-val, %", title="Scores")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()


def _draw_generations(axes: Axes, history: pd.DataFrame, budgets: list[float]) -> None:
    """Mean and best of every generation, for each of the budgets."""
    for number, budget in enumerate(budgets or [None]):
        own = history if budget is None else history[history["budget"] == budget]
        accuracy = 100 * own["val_accuracy"].astype(float)
        by_generation = accuracy.groupby(own["generation"])
        behind = "" if budget is None else f", budget {budget}"
        mean, best = ("tab:blue", "tab:orange") if budget is None else 2 * (f"C{number}",)
        axes.plot(by_generation.mean(), color=mean, label=f"generation's mean{behind}")
        style = "-" if budget is None else ":"
        axes.plot(by_generation.max(), style, color=best, label=f"generation's best{behind}")


def _has_front(run_dir: str | Path) -> bool:
    return [row["name"] for row in read_figures(run_dir)["variants"]].count(FPPMO) > 1


def _draw_front(figure: Figure, run_dir: str | Path) -> None:
    """Test accuracy after fine-tuning over the share of MACs that is cut."""
    variants = read_figures(run_dir)["variants"]
    axes: Axes = figure.subplots()
    for name, label in ((FPPMO, "FPPMO"), (IMPORTANCE_ONLY, IMPORTANCE_ONLY), (DENSE, "dense")):
        rows = [row for row in variants if row["name"] == name]
        accuracies = [100 * row["after"]["test"]["accuracy"] for row in rows]
        axes.plot([100 * row["macs_cut"] for row in rows], accuracies, "o-", label=label)
    axes.set(
        xlabel="MACs cut, %", ylabel="test accuracy, %", title="Networks after equal fine-tuning"
    )
    axes.legend()


def _draw_probabilities(figure: Figure, run_dir: str | Path) -> None:
    """Mean pruning probability of every channel group after every update."""
    from matplotlib.ticker import MaxNLocator

    facts = read_journal(run_dir)
    started = next(fact for fact in facts if isinstance(fact, Started))
    updates = [fact for fact in facts if isinstance(fact, Updated)]
    axes: Axes = figure.subplots()
    axes.set(xlabel="updates", title="Mean pruning probability per channel group")
    if not updates:
        return
    prune_prob = 1 - np.array([update.keep_share for update in updates]).T
    num_groups, num_updates = prune_prob.shape
    extent = (0.5, num_updates + 0.5, num_groups - 0.5, -0.5)
    image = axes.imshow(prune_prob, aspect="auto", vmin=0, vmax=1, cmap="viridis", extent=extent)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(started.groups) <= _MAX_GROUP_LABELS:
        axes.set_yticks(range(len(started.groups)), started.groups, fontsize=6)
    figure.colorbar(image, ax=axes, label="P(filter is removed)")
