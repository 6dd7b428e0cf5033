"""The progress of a running search: a line of the log per generation, warnings, Ray's metrics.

Ray exports the metrics to Prometheus as ``ray_fppmo_...``.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from fppmo_ray.distribution import Feedback, Merit, OptimizerSettings, Proposal
from fppmo_ray.service.journal.facts import Started
from fppmo_ray.service.journal.run_directory import RunDirectory
from fppmo_ray.service.observation import (
    Generation,
    Listener,
    Observation,
    Tally,
    Workforce,
    workforce_of,
)
from fppmo_ray.service.pool.worker_pool import WorkerPool

logger = logging.getLogger(__name__)


class Progress:
    """Tells its listeners what happens in a search. Made by ``watch``.

    Args:
        tally: Counts the scores.
        listeners: Functions that are given every observation.
    """

    def __init__(self, tally: Tally, listeners: Sequence[Listener]) -> None:
        self._tally = tally
        self._listeners = listeners

    def begin(
        self, proposals: Iterable[Proposal], known: Iterable[Feedback], pool: WorkerPool[Any]
    ) -> None:
        """Tell what the journal already holds.

        Args:
            proposals: The journal's proposals.
            known: Their feedback that counts.
            pool: The workers.
        """
        self._tally.propose(proposals)
        self._tell(self._tally.begin(known, workforce_of(pool)))

    def proposed(self, proposals: Iterable[Proposal]) -> None:
        """Take in new proposals, which no listener is told before they have feedback."""
        self._tally.propose(proposals)

    def ended(self, feedback: Sequence[Feedback], pool: WorkerPool[Any]) -> None:
        """Tell the feedback that has just come.

        Args:
            feedback: The feedback.
            pool: The workers.
        """
        self._tell(self._tally.count(feedback, workforce_of(pool)))

    def _tell(self, seen: Observation) -> None:
        for listener in self._listeners:
            listener(seen)


@contextmanager
def watch(
    run: RunDirectory, settings: OptimizerSettings, merit: Merit, listeners: Sequence[Listener] = ()
) -> Iterator[Progress]:
    """Show a search in the log and in Ray's metrics, and tell further listeners of it.

    Args:
        run: The search, started.
        settings: Its proposals, generations and budgets.
        merit: The order of its scores.
        listeners: Further functions that are given every observation.
    """
    [started] = run.all(Started)
    own = [generation_log(), spread_warning(), metrics_of(started.search_id)]
    yield Progress(Tally(settings, merit), [*listeners, *own])


def generation_log() -> Listener:
    """Return a listener that logs each generation when its last score has ended."""
    began = time.monotonic()

    def log(seen: Observation) -> None:
        if seen.num_ended and not seen.ended:
            logger.info("resumed with %d of %d scores", seen.num_ended, seen.num_wanted)
        for generation in seen.touched:
            if generation.is_complete:
                seconds = time.monotonic() - began
                logger.info("%s  %s  after %.0f s", generation, _workers(seen.workforce), seconds)

    return log


def _workers(workforce: Workforce) -> str:
    return f"workers {workforce.placed} of {workforce.wanted}"


_SMALLEST_SPREAD = 1e-5  # of the largest score; equal logits differ by rounding alone


def spread_warning() -> Listener:
    """Return a listener that warns once, after the first such generation."""
    warned = False

    def listen(seen: Observation) -> None:
        nonlocal warned
        for generation in seen.touched:
            if warned or not generation.is_complete:
                continue
            scores = [
                [abs(item.val_loss) for item in of_budget if item.val_loss is not None]
                for of_budget in generation.by_budget
            ]
            compared = [found for found in scores if len(found) > 1]
            if compared and all(max(s) - min(s) <= _SMALLEST_SPREAD * max(s) for s in compared):
                warned = True
                logger.warning(
                    "all %d masks of generation %d have the same score, so the search learns "
                    "nothing from them: the dense network may answer the same to all images, or "
                    "the cut may leave too little; look at its accuracy, or cut less",
                    sum(map(len, compared)),
                    generation.index,
                )

    return listen


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
        """The name of the series in Prometheus; a histogram has a series of buckets."""
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
    _gauge(
        "generation_best_accuracy",
        "val_accuracy of the last complete generation's best",
    ),
    _gauge("generation_mean_accuracy", "Mean val_accuracy of the last complete generation"),
    _gauge("generation_best_loss", "val_loss of the last complete generation's best"),
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


def metrics_of(search_id: str) -> Listener:
    """Return a listener that exports a search's observations, labelled ``search``."""
    meters = {metric.name.removeprefix("fppmo_"): _meter(metric, search_id) for metric in METRICS}
    requeued = 0

    def export(seen: Observation) -> None:
        nonlocal requeued
        _count_ended(meters, seen, seen.workforce.requeued - requeued)
        requeued = seen.workforce.requeued
        gauges = search_figures(seen) | _workforce(seen.workforce)
        for generation in seen.touched:
            gauges |= generation_figures(generation)
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
        outcome = "failed" if item.failed else "scored"
        meters["proposals_total"].inc(tags={"outcome": outcome})
        if item.seconds:
            meters["score_seconds_total"].inc(item.seconds)
            meters["score_duration_seconds"].observe(item.seconds)
    if num_requeued:
        meters["proposals_total"].inc(num_requeued, tags={"outcome": "requeued"})


def search_figures(seen: Observation) -> dict[str, float]:
    """Return how far a search is, and the figures of its best proposal, by name."""
    standing: dict[str, float] = {
        "proposals_ended": seen.num_ended,
        "proposals_wanted": seen.num_wanted,
        "generations_complete": seen.num_complete,
    }
    if seen.best is None:
        return standing
    proposal, feedback = seen.best
    return standing | {"best_macs": proposal.macs} | _figures("best", feedback)


def _workforce(workforce: Workforce) -> dict[str, float]:
    return {
        "workers_placed": workforce.placed,
        "workers_wanted": workforce.wanted,
        "workers_busy": workforce.busy,
        "queue_length": workforce.queued,
    }


def generation_figures(generation: Generation) -> dict[str, float]:
    """Return the gauges of a complete generation: the mean of a few scores would mislead."""
    if not generation.is_complete or not generation.ranked:
        return {}
    ranked = generation.ranked
    accuracies = [item.val_accuracy for item in ranked if item.val_accuracy is not None]
    losses = [item.val_loss for item in ranked if item.val_loss is not None]
    gauges = _figures("generation_best", ranked[0])
    gauges["generation_mean_loss"] = statistics.fmean(losses)
    if accuracies:
        gauges["generation_mean_accuracy"] = statistics.fmean(accuracies)
    return gauges


def _figures(prefix: str, feedback: Feedback) -> dict[str, float]:
    """Return loss and, where there is one, accuracy of a score."""
    figures = {f"{prefix}_loss": feedback.val_loss, f"{prefix}_accuracy": feedback.val_accuracy}
    return {name: value for name, value in figures.items() if value is not None}
