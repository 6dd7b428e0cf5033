"""The figure of a comparison: accuracy over MACs, scores, and the epochs of fine-tuning."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from cells import Record

from rivals.methods import DENSE, FPPMO, SCRATCH, UNIFORM
from rivals.table import Rows, accuracies_on_test, by_cut

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_comparison(records: Iterable[Record], path: Path) -> None:
    """Write the figure; nothing is drawn if no method was measured.

    The network trained from random weights is left to the table: after a short fine-tuning it is so
    much worse that all other methods would be squeezed together.

    Args:
        records: Cells of one comparison.
        path: The figure's file.

    Raises:
        ValueError: the records belong to different comparisons.
    """
    from matplotlib.figure import Figure

    cuts = by_cut(records)
    if not cuts:
        return
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    axes: list[Axes] = list(figure.subplots(1, 3))
    first, second, third = axes
    names = list(dict.fromkeys(method for rows in cuts.values() for method in rows))
    plain = [name for name in names if "@" not in name and name != SCRATCH]
    colours = dict(zip(plain, _colours(len(plain)), strict=True))
    _draw_macs(first, cuts, colours)
    cut, rows = max(cuts.items(), key=lambda item: len(item[1]))
    _draw_epochs(second, rows, colours)
    second.set_title(f"Advantage over uniform L1, {100 * cut:g} % cut")
    _draw_scores(third, rows)
    third.set_title(f"Scores spent, {100 * cut:g} % cut")
    figure.legend(*first.get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    figure.savefig(path, dpi=120)


def _draw_macs(axes: Axes, cuts: dict[float, Rows], colours: dict[str, str]) -> None:
    """Draw mean test accuracy of every method at every cut, with standard deviations."""
    for name, colour in colours.items():
        points = [rows[name] for rows in cuts.values() if name in rows]
        if name == DENSE:  # far away on the axis of MACs: a level
            axes.axhline(fmean(accuracies_on_test(points[0])), color=colour, ls="--", label=name)
            continue
        macs = [fmean(record.figures["macs"] for record in p.values()) / 1e6 for p in points]
        accuracies = [accuracies_on_test(p) for p in points]
        axes.errorbar(
            macs,
            [fmean(values) for values in accuracies],
            yerr=[_deviation(values) for values in accuracies],
            marker=_marker(name),
            color=colour,
            linewidth=1,
            label=name,
        )
    axes.set(xlabel="MACs, M", ylabel="test accuracy, %", title="After equal fine-tuning")


def _draw_epochs(axes: Axes, rows: Rows, colours: dict[str, str]) -> None:
    """Draw choose-val accuracy after every epoch, minus uniform L1's of the same seed and epoch."""
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel="epochs of fine-tuning", ylabel="choose-val accuracy, points")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.axhline(0, color="0.7", linewidth=1)
    baseline = rows.get(UNIFORM, {})
    for name, colour in colours.items():
        both = sorted(rows.get(name, {}).keys() & baseline.keys())
        if name in (DENSE, UNIFORM) or not both:
            continue
        curves = [
            [a - b for a, b in zip(_curve(rows[name][s]), _curve(baseline[s]), strict=True)]
            for s in both
        ]
        # Before the first epoch the difference may be tens of points: the figure is of after it.
        means = [fmean(values) for values in zip(*curves, strict=True)][1:]
        axes.plot(range(1, len(means) + 1), means, marker=_marker(name), color=colour, label=name)


def _draw_scores(axes: Axes, rows: Rows) -> None:
    """Draw test accuracy of searches over their scores; uniform L1 has none."""
    searches = {name.partition("@")[0] for name in rows if rows[name]} & {FPPMO, "random"}
    for name in sorted(searches):
        found = [rows[key] for key in rows if key.partition("@")[0] in (name, UNIFORM)]
        points = sorted(
            (fmean(r.figures["scores"] for r in p.values()), accuracies_on_test(p)) for p in found
        )
        axes.errorbar(
            [scores for scores, _ in points],
            [fmean(values) for _, values in points],
            yerr=[_deviation(values) for _, values in points],
            marker=_marker(name),
            label=name,
        )
    axes.set(xlabel="scores", ylabel="test accuracy after fine-tuning, %")
    if searches:
        axes.legend(fontsize=7)


def _colours(count: int) -> list[str]:
    """``count`` colours: first the ten dark ones of a palette of twenty, then the light ones."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    palette = [to_hex(colour) for colour in colormaps["tab20"](range(20))]
    palette = [*palette[::2], *palette[1::2]]
    return [palette[place % len(palette)] for place in range(count)]


def _curve(record: Record) -> list[float]:
    """Choose-val accuracy before the first epoch and after each, in %."""
    before: float = record.figures["before"]["choose_val"]["accuracy"]
    return [
        100 * before,
        *(100 * epoch["val_accuracy"] for epoch in record.figures["epochs"]),
    ]


def _marker(name: str) -> str:
    return "*" if name == FPPMO else "."


def _deviation(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0
