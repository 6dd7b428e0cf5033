"""A search as metrics: Ray exports them to Prometheus as ``ray_fppmo_...``."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from fppmo_ray.service.watching.observation import Generation, Listener, Observation, Workforce

_SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric that every search exports, with the label ``search``."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    description: str
    labels: tuple[str, ...] = ()
    """Beside ``search``."""

    @property
    def series(self) -> str:
        """What Prometheus calls it; a histogram's own series are its buckets."""
        return f"ray_{self.name}_bucket" if self.kind == "histogram" else f"ray_{self.name}"


def _counter(name: str, description: str, *labels: str) -> Metric:
    return Metric(name=f"fppmo_{name}", kind="counter", description=description, labels=labels)


def _gauge(name: str, description: str) -> Metric:
    return Metric(name=f"fppmo_{name}", kind="gauge", description=description)


METRICS = (
    _counter("proposals_total", "Scores done, failed by themselves or re-queued", "outcome"),
    # Ray makes up a histogram's sum from the middles of its buckets, so the seconds are counted.
    _counter("score_seconds_total", "Seconds that workers have spent on scores"),
    Metric(
        name="fppmo_score_duration_seconds",
        kind="histogram",
        description="Seconds that a score takes on its worker",
    ),
    _gauge("proposals_ended", "Scores that have ended, those before a resumption included"),
    _gauge("proposals_wanted", "Scores of the whole search"),
    _gauge("generations_complete", "Generations whose scores have all ended"),
    _gauge("generation_best_accuracy", "Best val_accuracy of the last complete generation"),
    _gauge("generation_mean_accuracy", "Mean val_accuracy of the last complete generation"),
    _gauge("generation_best_loss", "Best val_loss of the last complete generation"),
    _gauge("generation_mean_loss", "Mean val_loss of the last complete generation"),
    _gauge("best_accuracy", "val_accuracy of the best proposal so far"),
    _gauge("best_loss", "val_loss of the best proposal so far"),
    _gauge("best_macs", "Multiply-accumulates per image of the best proposal so far"),
    _gauge("workers_placed", "Workers that the cluster has room for"),
    _gauge("workers_wanted", "Workers asked for"),
    _gauge("workers_busy", "Workers with a score in hand"),
    _gauge("queue_length", "Scores that wait for a worker"),
)
"""All there is, as data: the Grafana dashboard is tested against it."""


def metrics_of(search_id: str, macs: Callable[[int], int]) -> Listener:
    """A listener that exports a search's observations.

    Args:
        search_id: The label ``search`` of all of them.
        macs: Multiply-accumulates of a proposal, by its id.
    """
    meters = {metric.name.removeprefix("fppmo_"): _meter(metric, search_id) for metric in METRICS}
    requeued = 0
    best_id: int | None = None

    def export(seen: Observation) -> None:
        nonlocal requeued, best_id
        _count_ended(meters, seen, seen.workforce.requeued - requeued)
        requeued = seen.workforce.requeued
        gauges = _standing(seen) | _workforce(seen.workforce)
        for generation in seen.touched:
            gauges |= _generation(generation)
        if seen.best is not None and seen.best.proposal_id != best_id:
            best_id = seen.best.proposal_id
            gauges["best_macs"] = macs(best_id)
        for name, value in gauges.items():
            meters[name].set(value)

    return export


def _meter(metric: Metric, search_id: str) -> Any:
    from ray.util.metrics import Counter, Gauge, Histogram

    keys = ("search", *metric.labels)
    meter: Any
    if metric.kind == "histogram":
        meter = Histogram(metric.name, metric.description, list(_SECONDS), keys)
    else:
        kind = Counter if metric.kind == "counter" else Gauge
        meter = kind(metric.name, metric.description, keys)
    return meter.set_default_tags({"search": search_id})


def _count_ended(meters: dict[str, Any], seen: Observation, num_requeued: int) -> None:
    for item in seen.ended:
        outcome = "failed" if item.feedback.failed else "scored"
        meters["proposals_total"].inc(tags={"outcome": outcome})
        if item.seconds:
            meters["score_seconds_total"].inc(item.seconds)
            meters["score_duration_seconds"].observe(item.seconds)
    if num_requeued:
        meters["proposals_total"].inc(num_requeued, tags={"outcome": "requeued"})


def _standing(seen: Observation) -> dict[str, float]:
    standing: dict[str, float] = {
        "proposals_ended": seen.num_ended,
        "proposals_wanted": seen.num_wanted,
        "generations_complete": seen.num_complete,
    }
    if seen.best is not None and seen.best.val_loss is not None:
        standing["best_loss"] = seen.best.val_loss
    if seen.best is not None and seen.best.val_accuracy is not None:
        standing["best_accuracy"] = seen.best.val_accuracy
    return standing


def _workforce(workforce: Workforce) -> dict[str, float]:
    return {
        "workers_placed": workforce.placed,
        "workers_wanted": workforce.wanted,
        "workers_busy": workforce.busy,
        "queue_length": workforce.queued,
    }


def _generation(generation: Generation) -> dict[str, float]:
    """Only of complete ones: the mean of a few says little of the rest."""
    if not generation.is_complete or not generation.losses:
        return {}
    return {
        "generation_best_loss": min(generation.losses),
        "generation_mean_loss": statistics.fmean(generation.losses),
        **_accuracies(generation),
    }


def _accuracies(generation: Generation) -> dict[str, float]:
    """None where the task is the user's own: its losses tell its scores."""
    if not generation.accuracies:
        return {}
    return {
        "generation_best_accuracy": max(generation.accuracies),
        "generation_mean_accuracy": statistics.fmean(generation.accuracies),
    }
