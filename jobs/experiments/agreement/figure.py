"""The figure of a fidelity study: losses of scores over losses after long fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from cells import Record

from agreement.correlation import spearman
from agreement.study import TRUTH
from agreement.table import FEWEST, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKERS = "ovs^Dx+*"


def draw_agreement(records: Sequence[Record], path: Path) -> None:
    """Write the figure: a mark for each mask and kind of score, the best kind first.

    Args:
        records: Cells of one study; nothing is drawn while no kind has 4 masks.
        path: The figure's file.
    """
    from matplotlib.figure import Figure

    results = Results(records)
    true = {mask: r.figures["held_out"]["loss"] for mask, r in results.figures(TRUTH, 0).items()}
    losses = {}
    for kind in results.kinds:
        scored = results.figures(kind, 0)
        pairs = [(true[m], r.figures["val_loss"]) for m, r in scored.items() if m in true]
        if len(pairs) >= FEWEST:
            losses[kind] = np.array(pairs).T
    if not losses:
        return
    correlations = {kind: float(spearman(*pairs)) for kind, pairs in losses.items()}
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes: Axes = figure.subplots()
    for number, kind in enumerate(sorted(losses, key=lambda kind: -correlations[kind])):
        label = f"{kind}: {correlations[kind]:.2f}"
        axes.plot(*losses[kind], _MARKERS[number % len(_MARKERS)], label=label, alpha=0.7)
    axes.set(xlabel="held-out loss after long fine-tuning", ylabel="loss of the score")
    axes.set_title("Agreement of scores with long fine-tuning, Spearman's correlation")
    axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)
