"""What networks of the result were cut of besides MACs, as far as it was limited."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fppmo_ray.distribution import BoolArray, PruningSpace
from fppmo_ray.distribution.limits import Resource, cost_of, dense_cost
from fppmo_ray.service.pool.work import Work
from fppmo_ray.service.record.facts import LatencyMeasured
from fppmo_ray.service.rounds import Context


def table_figures(context: Context) -> dict[str, Any]:
    """What result.json tells of the latency table; nothing where there is none."""
    measured = context.run.all(LatencyMeasured)
    if not measured:
        return {}
    names = ("batch", "dense_ms", "median_error", "device")
    return {"latency_table": {name: getattr(measured[0], name) for name in names}}


def cut_figures(context: Context, masks: Sequence[BoolArray | None]) -> list[dict[str, Any]]:
    """For every network, by resource, what is left and what share was cut.

    Latency is told twice: by the table, and measured now in the same way, all networks in turns.

    Args:
        context: Of the search, its pool with nothing unfinished.
        masks: Of the networks, the dense one (None) first.
    """
    space, limited = context.problem.tracing.space, context.settings.further_cuts
    keeps = [np.ones(space.num_filters, dtype=bool) if keep is None else keep for keep in masks]
    figures: list[dict[str, Any]] = [
        {resource: _exact(space, resource, keep) for resource in limited if resource != "latency"}
        for keep in keeps
    ]
    if "latency" in limited:
        for row, latency in zip(figures, _latencies(context, keeps), strict=True):
            row["latency"] = latency
    return figures


def _exact(space: PruningSpace, resource: Resource, keep: BoolArray) -> dict[str, Any]:
    left = cost_of(space, resource).total(space.widths(keep))
    return {"left": left, "cut": 1 - left / dense_cost(space, resource)}


def _latencies(context: Context, keeps: Sequence[BoolArray]) -> list[dict[str, Any]]:
    space, batch = context.problem.tracing.space, context.settings.latency_batch
    work = Work(name="latencies", method="time_masks", arguments=(context.compute, keeps, batch))
    measured: list[int]
    [measured] = context.pool.run([work])
    predicted = [cost_of(space, "latency").total(space.widths(keep)) for keep in keeps]
    dense = dense_cost(space, "latency")
    return [
        {
            "predicted_ms": by_table / 1e6,
            "predicted_cut": 1 - by_table / dense,
            "measured_ms": now / 1e6,
            "measured_cut": 1 - now / measured[0],
        }
        for by_table, now in zip(predicted, measured, strict=True)
    ]
