"""Figures of a search: each function draws one, and ``draw_figures`` writes some as files."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fppmo_ray.distribution import Feedback, Proposal
from fppmo_ray.report.result_rows import ACCURACY, label_of
from fppmo_ray.report.run import Run, costs_of, finalists, read_run, scores_by_worker
from fppmo_ray.service.journal.artifacts import DENSE, FPPMO, IMPORTANCE_ONLY
from fppmo_ray.service.journal.facts import Updated
from fppmo_ray.service.journal.run_directory import begun_stages
from fppmo_ray.service.journal.storage import location_of, open_storage

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_GROUP_LABELS = 40
_MAX_WORKER_LABELS = 64
_MAX_MARKS = 5_000  # scores that are drawn as shapes; more become pixels, which a page can hold

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
        axes.set(ylabel=label)
    all_axes[0].set(title="Scores on search-val")
    all_axes[0].legend(fontsize=7)
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
        mean, best = ("tab:blue", "tab:orange") if budget is None else 2 * (f"C{number}",)
        style = "-" if budget is None else ":"
        axes.plot(by_generation[column].mean(), color=mean, label=f"generation's mean{behind}")
        axes.plot(best_rows[column], style, color=best, label=f"generation's best{behind}")


def draw_front(figure: Figure, run: Run) -> None:
    """Draw test figures after fine-tuning over the share of MACs that was cut.

    Args:
        figure: An empty figure.
        run: A finished search.
    """
    axes: Axes = figure.subplots()
    for name, label in ((FPPMO, "FPPMO"), (IMPORTANCE_ONLY, IMPORTANCE_ONLY), (DENSE, "dense")):
        rows = run.named(name)
        figures = [run.measure.of(row, "after") for row in rows]
        axes.plot([100 * row["macs_cut"] for row in rows], figures, "o-", label=label)
    ylabel = run.measure.at("on test")
    axes.set(xlabel="MACs cut, %", ylabel=ylabel, title="Networks after equal fine-tuning")
    axes.legend()


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
    if len(groups) <= _MAX_GROUP_LABELS:
        axes.set_yticks(range(len(groups)), list(map(label_of, groups)), fontsize=6)
    figure.colorbar(image, ax=axes, label="P(filter is removed)")


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
    axes.bar(places, list(dense.values()), color="0.6", alpha=0.35, label="dense")
    axes.bar(places, list(chosen.values()), width=0.6, color="tab:blue", label="FPPMO")
    axes.plot(places, list(plain.values()), "_", color="tab:orange", label=IMPORTANCE_ONLY, mew=2)
    if len(dense) <= _MAX_GROUP_LABELS:
        axes.set_xticks(places, list(map(label_of, dense)), rotation=90, fontsize=7)
    axes.set(ylabel="filters", title="Widths before and after")
    axes.legend()


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
        colors = ["tab:blue", "tab:cyan"]
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
        run: A search with finalists that were rescored.
    """
    costs = costs_of(run)
    by_mask = {fact.keep.tobytes(): fact for fact in run.facts if isinstance(fact, Proposal)}
    pairs = []
    for one in finalists(run):
        proposal = by_mask.get(one.keep.tobytes())
        if proposal is not None and proposal.proposal_id in costs:
            again = run.started.merit.cost(one.mean, proposal.parameters)
            pairs.append((costs[proposal.proposal_id], again))
    axes: Axes = figure.subplots()
    axes.plot([score for score, _ in pairs], [again for _, again in pairs], "o")
    name = _compared_figure(run)
    axes.set(xlabel=f"{name}, on search-val", ylabel=f"{name}, on choose-val")
    title = "Finalists that were proposals, scored again"
    if len(pairs) > 2:
        title += f": Spearman {_rank_correlation(pairs):.2f}"
    axes.set_title(title)


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
    for run in runs:
        axes.plot(_scores(run).groupby("generation")["figure"].mean(), label=run.name)
    ylabel = runs[0].measure.at("on search-val")
    axes.set(xlabel="generation", ylabel=ylabel, title="Generations' means")
    axes.legend()


def draw_results(figure: Figure, runs: list[Run]) -> None:
    """Draw test figures over MACs: of dense, chosen and importance-only networks.

    Args:
        figure: An empty figure.
        runs: Finished searches with the same measure.
    """
    axes: Axes = figure.subplots()
    for number, run in enumerate(runs):
        color, behind = f"C{number}", f", {run.name}" if len(runs) > 1 else ""
        for name, marker in ((FPPMO, "o-"), (IMPORTANCE_ONLY, "x--")):
            rows = [*run.named(DENSE), *run.named(name)]
            macs = [row["macs"] / 1e6 for row in rows]
            figures = [run.measure.of(row, "after") for row in rows]
            label = f"{'FPPMO' if name == FPPMO else name}{behind}"
            axes.plot(macs, figures, marker, color=color, label=label, markersize=7)
    ylabel = runs[0].measure.at("on test")
    axes.set(xlabel="MACs, M", ylabel=ylabel, title="Networks after fine-tuning")
    axes.set_xlim(left=0)
    axes.legend()
