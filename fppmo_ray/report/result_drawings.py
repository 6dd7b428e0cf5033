"""Figures of a search's final networks, and the colours of all figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fppmo_ray.report.result_rows import ACCURACY, label_of, title_of
from fppmo_ray.report.run import Run
from fppmo_ray.service.journal.artifacts import ALLOCATION, DENSE, FPPMO, IMPORTANCE_ONLY
from fppmo_ray.service.journal.facts import EpochFinished

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_GROUP_LABELS = 40
"""Channel groups that a figure names; of more, the names could not be read."""
MANY_LINES = 5
"""Lines whose names take two columns of a legend."""
MIN_CURVE = 3
"""Points that a line may join; two are two networks, not a curve."""

COLORS = {DENSE: "#8a929b", FPPMO: "#2f7ed8", IMPORTANCE_ONLY: "#e2831b", ALLOCATION: "#38a169"}
"""The colour of each kind of network, the same in all figures of a search."""
RUN_COLORS = ("tab:purple", "tab:cyan", "tab:brown", "tab:pink", "tab:olive", "tab:red")
"""The colours of several searches in one figure."""
_MARKERS = {DENSE: "s", FPPMO: "o", IMPORTANCE_ONLY: "D", ALLOCATION: "^"}
_DASHES = ("-", "--", ":", "-.")


def draw_front(figure: Figure, run: Run) -> None:
    """Draw test figures after fine-tuning over the share of MACs that was cut.

    Args:
        figure: An empty figure.
        run: A finished search.
    """
    axes: Axes = figure.subplots()
    for name, label in ((IMPORTANCE_ONLY, IMPORTANCE_ONLY), (FPPMO, "FPPMO"), (DENSE, DENSE)):
        rows = run.named(name)
        figures = [run.measure.of(row, "after") for row in rows]
        _draw_networks(axes, name, [100 * row["macs_cut"] for row in rows], figures, label=label)
    ylabel = run.measure.at("on test")
    axes.set(xlabel="MACs cut, %", ylabel=ylabel, title="Networks after equal fine-tuning")
    axes.legend()
    say_zoomed(axes)


def draw_results(figure: Figure, run: Run) -> None:
    """Draw the test figures of all networks over their MACs.

    Args:
        figure: An empty figure.
        run: A finished search.
    """
    axes: Axes = figure.subplots()
    for name in (DENSE, ALLOCATION, IMPORTANCE_ONLY, FPPMO):
        if rows := run.named(name):
            macs = [row["macs"] / 1e6 for row in rows]
            figures = [run.measure.of(row, "after") for row in rows]
            label = title_of({"name": name})
            _draw_networks(axes, name, macs, figures, label=label)
            _draw_intervals(axes, run, macs, figures, COLORS[name])
    _name_results(axes, run)


def draw_compared(figure: Figure, runs: list[Run]) -> None:
    """Draw the test figures of several searches' networks over their MACs, a colour each.

    Args:
        figure: An empty figure.
        runs: Searches with the same measure, one of them finished.
    """
    axes: Axes = figure.subplots()
    for number, run in enumerate(runs):
        color = RUN_COLORS[number % len(RUN_COLORS)]
        for name in (DENSE, IMPORTANCE_ONLY, FPPMO):
            if rows := run.named(name):
                macs = [row["macs"] / 1e6 for row in rows]
                figures = [run.measure.of(row, "after") for row in rows]
                label = f"{title_of({'name': name})}, {run.name}"
                _draw_networks(axes, name, macs, figures, label=label, color=color)
    _name_results(axes, runs[0])


def _draw_networks(
    axes: Axes, name: str, places: list[float], figures: list[float], **style: Any
) -> None:
    """Draw networks of one kind in its colour, joined by a line if they are three or more."""
    given: dict[str, Any] = {
        "color": COLORS[name],
        "marker": _MARKERS[name],
        "linestyle": "-" if len(places) >= MIN_CURVE else "none",
        "markersize": 7,
        # Hollow, so that a network that is chosen too can be seen in it.
        **({} if name == FPPMO else {"markerfacecolor": "none", "markersize": 9, "mew": 1.8}),
    }
    axes.plot(places, figures, **(given | style))


def _draw_intervals(
    axes: Axes, run: Run, places: list[float], figures: list[float], color: str
) -> None:
    """Draw accuracies' 95 % intervals, where the number of test images is known."""
    num_images = run.started.images.get("test")
    if run.measure == ACCURACY and num_images:
        shares = np.array(figures) / 100
        half = 196 * np.sqrt(shares * (1 - shares) / num_images)
        axes.errorbar(places, figures, half, fmt="none", ecolor=color, elinewidth=1, capsize=3)


def _name_results(axes: Axes, run: Run) -> None:
    axes.set(xlabel="MACs, M", ylabel=run.measure.at("on test"))
    axes.set_title("Networks after equal fine-tuning")
    axes.margins(0.1)
    axes.set_xlim(left=0)
    axes.legend(fontsize=8)
    say_zoomed(axes)


def draw_widths(figure: Figure, run: Run) -> None:
    """Draw the filters of every channel group: of the dense and the smallest chosen network.

    Args:
        figure: An empty figure.
        run: A finished search.
    """
    dense, chosen = run.named(DENSE)[0]["widths"], run.named(FPPMO)[-1]["widths"]
    plain = run.named(IMPORTANCE_ONLY)[-1]["widths"]
    places = np.arange(len(dense))
    axes: Axes = figure.subplots()
    axes.bar(places, list(dense.values()), color=COLORS[DENSE], alpha=0.35, label=DENSE)
    axes.bar(places, list(chosen.values()), width=0.6, color=COLORS[FPPMO], label="FPPMO")
    given: dict[str, Any] = {
        "color": COLORS[IMPORTANCE_ONLY],
        "label": IMPORTANCE_ONLY,
        "mew": 2,
        "markersize": 12,
    }
    axes.plot(places, list(plain.values()), "_", **given)
    if len(dense) <= MAX_GROUP_LABELS:
        axes.set_xticks(places, list(map(label_of, dense)), rotation=90, fontsize=7)
    axes.set(ylabel="filters", title="Widths before and after")
    axes.set_ylim(top=1.2 * max(dense.values()))
    axes.legend(ncols=3, loc="upper center")


def draw_training(figure: Figure, run: Run) -> None:
    """Draw the training loss of the final networks by epoch.

    Args:
        figure: An empty figure.
        run: A search whose trainings have journaled their losses.
    """
    from matplotlib.ticker import MaxNLocator

    axes: Axes = figure.subplots()
    dashes: dict[str, int] = {}
    curves = training_curves(run)
    for task, losses in curves.items():
        kind = next(name for name in COLORS if task.startswith(name))
        dash = dashes.setdefault(task.removeprefix(kind), len(dashes))
        label = "FPPMO" + task.removeprefix(FPPMO) if kind == FPPMO else task
        style = _DASHES[dash % len(_DASHES)] if len(losses) >= MIN_CURVE else _MARKERS[kind]
        epochs = range(1, len(losses) + 1)
        axes.plot(epochs, losses, style, color=COLORS[kind], label=label_of(label))
    axes.set(xlabel="epoch", ylabel="training loss", title="Final fine-tuning")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(0.5, max(map(len, curves.values())) + 0.5)
    axes.set_ylim(0, 1.1 * max(max(losses) for losses in curves.values()) or 1)
    axes.legend(ncols=1 if len(axes.lines) < MANY_LINES else 2)


def training_curves(run: Run) -> dict[str, list[float]]:
    """Return the loss after every epoch of the final trainings, by the training's name."""
    curves: dict[str, list[float | None]] = {}
    for fact in run.facts:
        if isinstance(fact, EpochFinished) and fact.task.startswith(tuple(COLORS)):
            curves.setdefault(fact.task, []).append(fact.train_loss)
    return {
        task: [loss for loss in losses if loss is not None]
        for task, losses in curves.items()
        if None not in losses
    }


def say_zoomed(axes: Axes, *sides: str) -> None:
    """Say in the names of axes that they leave out zero.

    Args:
        axes: The drawn axes.
        sides: ``x`` or ``y``; by default y alone.
    """
    for side in sides or ("y",):
        low, high = getattr(axes, f"get_{side}lim")()
        if low > 0 or high < 0:
            name = getattr(axes, f"get_{side}label")()
            getattr(axes, f"set_{side}label")(f"{name}\n(zoomed)")
