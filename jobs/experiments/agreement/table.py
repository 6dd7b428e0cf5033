"""The tables of the fidelity job: agreement of scores with the truth, their noise, their cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, median

import numpy as np
from cells import Record
from rich.table import Table

from agreement.correlation import (
    Statistic,
    agreement,
    interval,
    noise,
    noise_beside_others,
    spearman,
    top_quarter_recall,
)
from agreement.study import TRUTH
from fppmo_ray.distribution import FloatArray, RankBy

FEWEST = 4  # masks that a correlation is taken of
_MEASURES = ("loss", "accuracy")


@dataclass(frozen=True)
class Results:
    """The cells of a study that are measured so far."""

    records: Sequence[Record]
    """Scores and fine-tunings. The kinds of score and the masks are shown in their order."""

    def capacities(self, names: Sequence[str], weight: float) -> FloatArray:
        """The factors that the losses of some masks' scores are multiplied by.

        Args:
            names: Of the masks.
            weight: See ``fppmo_ray.distribution.capacity.capacity_factor``.

        Returns:
            ``(masks,)``: (share of the parameters left) ** -weight, exactly 1 for a weight of 0.
        """
        left = {r.key["mask"]: r.key["parameters_left"] for r in self.records}
        return np.array([1.0 if weight == 0 else left[name] ** -weight for name in names])

    @cached_property
    def masks(self) -> dict[str, bool]:
        """The masks that were fine-tuned by name: whether each is near an optimum; those last."""
        found = {r.key["mask"]: r.key["is_near"] for r in self.records if r.key["kind"] == TRUTH}
        return dict(sorted(found.items(), key=lambda item: item[1]))

    @cached_property
    def kinds(self) -> list[str]:
        """The kinds of score, in the order of the records."""
        kinds = dict.fromkeys(r.key["kind"] for r in self.records if r.key["kind"] != TRUTH)
        return list(kinds)

    def figures(self, kind: str, repeat: int) -> dict[str, Record]:
        """The records of a kind of score by the name of the mask.

        Args:
            kind: One of ``kinds``, or ``TRUTH``.
            repeat: Number of the seed, from 0.
        """
        wanted = kind, repeat
        found = [r for r in self.records if (r.key["kind"], r.key["repeat"]) == wanted]
        return {r.key["mask"]: r for r in found}

    def repeats(self, kind: str, masks: Sequence[str]) -> list[dict[str, Record]]:
        """The repeats of a kind that are complete for some masks.

        Args:
            kind: One of ``kinds``, or ``TRUTH``.
            masks: Names of the masks that a repeat must have.

        Returns:
            For each such repeat, its records by the name of the mask.
        """
        numbers = range(1 + max(r.key["repeat"] for r in self.records))
        found = [self.figures(kind, repeat) for repeat in numbers]
        return [records for records in found if records and set(masks) <= records.keys()]


def agreement_tables(
    records: Sequence[Record],
    *,
    rank_by: RankBy = "val_loss",
    proposals: int = 640,
    capacity_weight: float = 0.0,
) -> list[Table]:
    """Return tables of how well scores agree with the truth, of their cost, and of the masks.

    Args:
        records: Cells of one study, which need not be complete.
        rank_by: The figure of a score that is judged.
        proposals: Number of scores whose cost is shown.
        capacity_weight: Weight of the parameters that masks leave, beside the loss; see
            ``fppmo_ray.distribution.capacity.capacity_factor``.
    """
    results = Results(records)
    return [
        _agreement_table(results, rank_by, capacity_weight, near_only=False),
        _agreement_table(results, rank_by, capacity_weight, near_only=True),
        _cost_table(results, rank_by, proposals),
        _mask_table(results),
    ]


def _agreement_table(
    results: Results, rank_by: RankBy, capacity_weight: float, *, near_only: bool
) -> Table:
    title = "masks near the optimum" if near_only else "all masks"
    if capacity_weight:
        title += f", losses by (share of parameters left) ** -{capacity_weight:g}"
    table = Table(
        *(f"{rank_by} of a score", "masks", "seeds"),
        *(f"Spearman, true {measure}" for measure in _MEASURES),
        *(f"top-quarter recall, {measure}" for measure in _MEASURES),
        title=f"{title}: agreement with the truth, and 95 % intervals over masks",
    )
    names = [name for name, is_near in results.masks.items() if is_near or not near_only]
    true = results.figures(TRUTH, 0)
    for kind in results.kinds:
        judged = [name for name in names if name in true and name in results.figures(kind, 0)]
        if len(judged) < FEWEST:
            continue
        costs = _score_costs(results, kind, judged, rank_by)
        costs = costs * results.capacities(judged, capacity_weight)
        table.add_row(kind, str(len(judged)), str(len(costs)), *_agreements(results, judged, costs))
    judged = [name for name in names if name in true]
    if len(judged) >= FEWEST:
        alone = results.capacities(judged, 1.0)[None]
        row = _agreements(results, judged, alone)
        table.add_row("parameters left, alone", str(len(judged)), "", *row)
    return _with_ceiling(table, results, judged)


def _agreements(results: Results, judged: Sequence[str], costs: FloatArray) -> list[str]:
    """Agreement of costs ``(seeds, masks)`` of some masks with the truth, as cells of a table."""
    truths = [_true_costs(results, judged, measure) for measure in _MEASURES]
    return [
        _with_interval(statistic, costs, truth)
        for statistic in (spearman, top_quarter_recall)
        for truth in truths
    ]


def _with_ceiling(table: Table, results: Results, judged: Sequence[str]) -> Table:
    """Add a row for one fine-tuning against another, which no score is expected to beat."""
    repeats = results.repeats(TRUTH, judged)
    if len(repeats) < 2 or len(judged) < FEWEST:
        return table
    pairs = [
        [_costs_of_truth(records, judged, measure) for records in repeats[:2]]
        for measure in _MEASURES
    ]
    table.add_row(
        *("fine-tuned again", str(len(judged)), "1"),
        *(_with_interval(spearman, one[None], other) for one, other in pairs),
        *(_with_interval(top_quarter_recall, one[None], other) for one, other in pairs),
    )
    return table


def _cost_table(results: Results, rank_by: RankBy, proposals: int) -> Table:
    table = Table(
        *("fidelity", "scores", "s a score", f"{proposals} scores, epochs"),
        *("noise", "noise beside others", "spread near the optimum", "mean accuracy, %"),
        title=f"cost, and noise of {rank_by} (standard deviations)",
        caption="an epoch: of fine-tuning a pruned network, on one worker as the scores are; "
        "noise beside others: without what a seed does to all masks alike",
    )
    epoch_seconds = _epoch_seconds(results)
    for kind in results.kinds:
        scored = results.figures(kind, 0)
        if not scored:
            continue
        records = [r for repeat in results.repeats(kind, []) for r in repeat.values()]
        seconds = median(record.seconds for record in records)
        costs = _score_costs(results, kind, list(scored), rank_by)
        near = [name for name, record in scored.items() if record.key["is_near"]]
        spread = _score_costs(results, kind, near, rank_by).mean(0).std() if near else np.nan
        table.add_row(
            *(kind, str(len(records)), f"{seconds:.2f}"),
            "" if epoch_seconds is None else f"{proposals * seconds / epoch_seconds:.1f}",
            *(_number(value) for value in (noise(costs), noise_beside_others(costs), spread)),
            f"{100 * fmean(record.figures['val_accuracy'] for record in records):.2f}",
        )
    return table


def _mask_table(results: Results) -> Table:
    table = Table(
        *("mask", "near", "held-out loss", "held-out accuracy, %", "test accuracy, %"),
        title="truth: masks after fine-tuning"
        + ("" if (seconds := _epoch_seconds(results)) is None else f", {seconds:.0f} s an epoch"),
    )
    for mask, is_near in results.masks.items():
        fine_tuned = [r[mask].figures for r in results.repeats(TRUTH, [mask])]
        if not fine_tuned:
            continue
        table.add_row(
            *(mask, "yes" if is_near else ""),
            f"{fmean(figures['held_out']['loss'] for figures in fine_tuned):.4f}",
            *(
                f"{100 * fmean(figures[split]['accuracy'] for figures in fine_tuned):.2f}"
                for split in ("held_out", "test")
            ),
        )
    return table


def _score_costs(results: Results, kind: str, masks: Sequence[str], rank_by: RankBy) -> FloatArray:
    """Costs ``(seeds, masks)`` of the repeats that are complete for these masks."""
    sign = 1 if rank_by == "val_loss" else -1
    repeats = results.repeats(kind, masks)
    return sign * np.array([[records[m].figures[rank_by] for m in masks] for records in repeats])


def _true_costs(results: Results, masks: Sequence[str], measure: str) -> FloatArray:
    """Mean costs ``(masks,)`` over the fine-tunings that are complete for these masks."""
    repeats = results.repeats(TRUTH, masks)
    costs: FloatArray = np.mean([_costs_of_truth(r, masks, measure) for r in repeats], axis=0)
    return costs


def _costs_of_truth(
    records: Mapping[str, Record], masks: Sequence[str], measure: str
) -> FloatArray:
    sign = 1 if measure == "loss" else -1
    return sign * np.array([records[mask].figures["held_out"][measure] for mask in masks])


def _epoch_seconds(results: Results) -> float | None:
    """Median seconds of an epoch of fine-tuning; None before the first truth."""
    records = [r for repeat in results.repeats(TRUTH, []) for r in repeat.values()]
    seconds = [second for record in records for second in record.figures["epoch_seconds"]]
    return median(seconds) if seconds else None


def _with_interval(statistic: Statistic, costs: FloatArray, truth: FloatArray) -> str:
    low, high = interval(statistic, costs, truth)
    return f"{agreement(statistic, costs, truth):.2f} [{low:.2f}, {high:.2f}]"


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.4f}"
