"""Figures of a search: each function draws one, and ``draw_figures`` writes some as files."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fppmo_ray.distribution import Feedback, Proposal
from fppmo_ray.report.result_drawings import (
    COLORS,
    MANY_LINES,
    MAX_GROUP_LABELS,
    MIN_CURVE,
    RUN_COLORS,
    draw_front,
    say_zoomed,
)
from fppmo_ray.report.result_rows import ACCURACY, label_of
from fppmo_ray.report.run import Run, costs_of, finalists, read_run, scores_by_worker
from fppmo_ray.service.journal.artifacts import FPPMO, IMPORTANCE_ONLY
from fppmo_ray.service.journal.facts import Rescored, Updated
from fppmo_ray.service.journal.run_directory import begun_stages
from fppmo_ray.service.journal.storage import location_of, open_storage

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_WORKER_LABELS = 64
_MAX_MARKS = 5_000  # scores that are drawn as shapes; more become pixels, which a page can hold
_MIN_PAIRS = 8  # of which a correlation says something
_BLUES = ("#2f7ed8", "#16437a", "#7fb3f0", "#0f9bb8", "#6b5fd3")  # of the proposals, by budget

LITERAL: dict[Any, Any] = {"text.parse_math": False}
"""Matplotlib's settings of every figure: a dollar sign in a name begins no formula."""


def draw_figures(run_dir: str | Path) -> None:
    """Write ``scores.png`` and ``probabilities.png`` into a run directory.

    A finished search with several budgets gets ``front.png`` too. A search in stages gets the
    figures of each stage in the stage's own run directory. A finished search without proposals gets
    no figures of scores and probabilities.

    Args:
        run_dir: The search's run directory, a folder or a URI.

    Raises:
        ValueError: the run directory holds no journal, or nothing has been scored yet.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    run = read_run(run_dir)
    is_scored = not run.history["score"].isna().all()
    if not is_scored and (stages := begun_stages(run_dir)):
        for place in stages:
            draw_figures(place)
        return
    if not is_scored and run.figures is None:
        raise ValueError(
            f"nothing has been scored yet in {location_of(run_dir)}: there is nothing to draw"
        )
    drawings: dict[str, Callable[[Figure, Run], None]] = {}
    if is_scored:
        drawings = {"scores": draw_scores, "probabilities": draw_probabilities}
    if len(run.named(FPPMO)) > 1:
        drawings["front"] = draw_front
    storage = open_storage(run_dir)
    for name, draw in drawings.items():
        with rc_context(LITERAL):
            figure = Figure(figsize=(7, 4.2), layout="constrained")
            draw(figure, run)
            image = io.BytesIO()
            figure.savefig(image, dpi=120)
        storage.write(f"{name}.png", image.getvalue())


def draw_scores(figure: Figure, run: Run) -> None:
    """Draw every score on search-val, with each generation's mean and best.

    The upper axes show the loss that the search compares, the lower ones the accuracy of the same
    proposals. A search that compares accuracies, or scores of a user's own task, needs one of them.
    Each budget has its own mean and best.

    Args:
        figure: An empty figure.
        run: A search with at least one score.
    """
    from matplotlib.ticker import MaxNLocator

    history = _scores(run)
    labels = {"figure": run.measure.label}
    if run.measure == ACCURACY and run.started.merit.rank_by == "val_loss":
        labels = {"cost": _compared_figure(run), **labels}
    all_axes = figure.subplots(len(labels), sharex=True, squeeze=False)[:, 0]
    for axes, (column, label) in zip(all_axes, labels.items(), strict=True):
        axes.plot(
            *(history["generation"], history[column], "."),
            **{"color": "0.7", "label": "proposal", "rasterized": len(history) > _MAX_MARKS},
        )
        _draw_generations(axes, history, column)
        if column == "figure":
            _draw_importance_only(axes, run)
        axes.set(ylabel=label)
        say_zoomed(axes)
    all_axes[0].set(title="Scores on search-val")
    if len(all_axes[-1].lines) < MANY_LINES:
        all_axes[-1].legend(fontsize=7)
    else:
        lines, names = all_axes[-1].get_legend_handles_labels()
        figure.legend(lines, names, loc="outside lower center", ncols=2, fontsize=7)
    all_axes[-1].set(xlabel="generation")
    all_axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))


def _scores(run: Run) -> pd.DataFrame:
    """Return the scores that did not fail, with columns ``cost`` and ``figure``.

    ``cost`` is the number that the search compares; ``figure`` is the score in display units.
    """
    history = run.history.dropna(subset=["score"])
    return history.assign(
        cost=history["id"].map(costs_of(run)),
        figure=run.measure.scale * history["score"].astype(float),
    )


def _compared_figure(run: Run) -> str:
    """Return the name of the number that the search compares."""
    merit = run.started.merit
    if merit.rank_by == "val_accuracy":
        return "minus accuracy"
    return "weighed loss" if merit.capacity_weight else "loss"


def _draw_generations(axes: Axes, history: pd.DataFrame, column: str) -> None:
    """Draw a column's mean of every generation and its value for the best proposal, by budget."""
    budgets = sorted({*history["budget"].dropna()})
    for number, budget in enumerate(budgets or [None]):
        own = history if budget is None else history[history["budget"] == budget]
        by_generation = own.groupby("generation")
        best_rows = own.loc[by_generation["cost"].idxmin()].set_index("generation")
        behind = "" if budget is None else f", budget {budget}"
        given: dict[str, Any] = {"color": _BLUES[number % len(_BLUES)], "markersize": 6}
        mean = by_generation[column].mean()
        is_curve = len(mean) >= MIN_CURVE
        mean_style, best_style = (":", "-") if is_curve else ("_", "o")
        axes.plot(mean, mean_style, **given, label=f"generation's mean{behind}")
        axes.plot(best_rows[column], best_style, **given, label=f"generation's best{behind}")


def _draw_importance_only(axes: Axes, run: Run) -> None:
    """Draw the importance-only masks' mean figures on search-val, where they were scored there."""
    by_mask: dict[bytes, list[float]] = {}
    for fact in run.facts:
        if isinstance(fact, Rescored) and fact.split == "search_val":
            figure = -fact.val_loss if fact.val_accuracy is None else fact.val_accuracy
            by_mask.setdefault(fact.keep.tobytes(), []).append(run.measure.scale * figure)
    for number, figures in enumerate(by_mask.values()):
        label = "" if number else IMPORTANCE_ONLY
        axes.axhline(float(np.mean(figures)), ls="--", color=COLORS[IMPORTANCE_ONLY], label=label)


def draw_probabilities(figure: Figure, run: Run) -> None:
    """Draw the mean pruning probability of every channel group after every update.

    Args:
        figure: An empty figure.
        run: A search.
    """
    from matplotlib.ticker import MaxNLocator

    groups = run.started.groups
    updates = [fact for fact in run.facts if isinstance(fact, Updated)]
    axes: Axes = figure.subplots()
    axes.set(xlabel="updates", title="Mean pruning probability per channel group")
    if not updates:
        return
    prune_prob = 1 - np.array([update.keep_share for update in updates]).T
    num_groups, num_updates = prune_prob.shape
    extent = (0.5, num_updates + 0.5, num_groups - 0.5, -0.5)
    image = axes.imshow(prune_prob, aspect="auto", vmin=0, vmax=1, cmap="viridis", extent=extent)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(groups) <= MAX_GROUP_LABELS:
        axes.set_yticks(range(len(groups)), list(map(label_of, groups)), fontsize=6)
    figure.colorbar(image, ax=axes, label="P(filter is removed)")


def draw_timeline(figure: Figure, run: Run) -> None:
    """Draw when each worker computed scores.

    Args:
        figure: An empty figure.
        run: A search with at least one score.
    """
    workers = scores_by_worker(run)
    spans = {worker: [_span(item) for item in scores] for worker, scores in workers.items()}
    begin = min(start for of_worker in spans.values() for start, _ in of_worker)
    end = max(sum(span) for of_worker in spans.values() for span in of_worker)
    axes: Axes = figure.subplots()
    is_long = sum(map(len, spans.values())) > _MAX_MARKS
    for row, of_worker in enumerate(spans.values()):
        bars = [(start - begin, seconds) for start, seconds in of_worker]
        colors = [_BLUES[0], _BLUES[2]]
        axes.broken_barh(bars, (row - 0.4, 0.8), color=colors, rasterized=is_long)
    busy = sum(seconds for of_worker in spans.values() for _, seconds in of_worker)
    idle = max(0.0, 1 - busy / ((end - begin) * len(workers))) if end > begin else 0.0
    failed = sum(isinstance(fact, Feedback) and fact.failed for fact in run.facts)
    names = [label_of(name.partition("@")[0]) for name in workers]
    if len(names) <= _MAX_WORKER_LABELS:
        axes.set_yticks(range(len(workers)), names, fontsize=7)
    axes.set(xlabel="seconds", ylabel="worker")
    axes.set_title(f"Scores by worker: {100 * idle:.1f} % idle, {failed} failed")


def _span(feedback: Feedback) -> tuple[float, float]:
    """Return when a score began, as Unix time, and how many seconds it took."""
    assert feedback.at is not None  # the driver notes it for every score
    seconds = feedback.seconds or 0.0
    return feedback.at - seconds, seconds


def draw_agreement(figure: Figure, run: Run) -> None:
    """Draw the finalists' scores on choose-val over their scores as proposals.

    Both are the number that the search compares, on choose-val the mean over fresh seeds.

    Args:
        figure: An empty figure.
        run: A search with ``agreement_pairs``.
    """
    pairs = agreement_pairs(run)
    axes: Axes = figure.subplots()
    axes.plot([one for one, _ in pairs], [again for _, again in pairs], "o", color=COLORS[FPPMO])
    name = _compared_figure(run)
    axes.set(xlabel=f"{name} on search-val", ylabel=f"{name} on choose-val")
    correlation = f"Spearman {_rank_correlation(pairs):.2f}, n = {len(pairs)}"
    axes.set_title(f"Finalists scored again: {correlation}")
    say_zoomed(axes, "x", "y")


def agreement_pairs(run: Run) -> list[tuple[float, float]]:
    """Return the finalists' costs on search-val and choose-val; none if they are fewer than eight.

    Args:
        run: A search.
    """
    costs = costs_of(run)
    by_mask = {fact.keep.tobytes(): fact for fact in run.facts if isinstance(fact, Proposal)}
    pairs = []
    for one in finalists(run):
        proposal = by_mask.get(one.keep.tobytes())
        if proposal is not None and proposal.proposal_id in costs:
            again = run.started.merit.cost(one.mean, proposal.parameters)
            pairs.append((costs[proposal.proposal_id], again))
    return pairs if len(pairs) >= _MIN_PAIRS else []


def _rank_correlation(pairs: list[tuple[float, float]]) -> float:
    """Return Spearman's rank correlation of pairs of numbers."""
    import pandas as pd

    return float(pd.DataFrame(pairs).corr("spearman").to_numpy()[0, 1])


def draw_runs(figure: Figure, runs: list[Run]) -> None:
    """Draw the mean score of every generation, for each of several runs.

    Args:
        figure: An empty figure.
        runs: Searches with the same measure.
    """
    axes: Axes = figure.subplots()
    for number, run in enumerate(runs):
        means = _scores(run).groupby("generation")["figure"].mean()
        style = "-" if len(means) >= MIN_CURVE else "o"
        axes.plot(means, style, color=RUN_COLORS[number % len(RUN_COLORS)], label=run.name)
    ylabel = runs[0].measure.at("on search-val")
    axes.set(xlabel="generation", ylabel=ylabel, title="Generations' means")
    axes.legend()
    say_zoomed(axes)
