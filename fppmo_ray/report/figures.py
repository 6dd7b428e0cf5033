"""Figures of a search: how scores rose, and how the pruning probabilities moved."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fppmo_ray.service.record.facts import Started, Updated
from fppmo_ray.service.record.run_directory import read_journal
from fppmo_ray.service.record.storage import location_of, open_storage
from fppmo_ray.service.result import read_history

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_GROUP_LABELS = 40


def draw_figures(run_dir: str | Path) -> None:
    """Write ``scores.png`` and ``probabilities.png`` into the run directory.

    Raises:
        ValueError: it holds no journal, or nothing has been scored yet.
    """
    from matplotlib.figure import Figure

    if read_history(run_dir)["val_accuracy"].isna().all():
        raise ValueError(
            f"nothing has been scored yet in {location_of(run_dir)}: there is nothing to draw"
        )
    storage = open_storage(run_dir)
    for name, draw in (("scores", _draw_scores), ("probabilities", _draw_probabilities)):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        draw(figure, run_dir)
        image = io.BytesIO()
        figure.savefig(image, dpi=120)
        storage.write(f"{name}.png", image.getvalue())


def _draw_scores(figure: Figure, run_dir: str | Path) -> None:
    """Every score's accuracy on search-val, and each generation's mean and best.

    Of scores in several rungs, mean and best are those of the deepest.
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
    by_generation = accuracy[deepest].groupby(history["generation"][deepest])
    axes.plot(by_generation.mean(), color="tab:blue", label="generation's mean")
    axes.plot(by_generation.max(), color="tab:orange", label="generation's best")
    axes.set(xlabel="generation", ylabel="accuracy on search-val, %", title="Scores")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
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
