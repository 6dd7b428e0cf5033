"""The exported metrics, and the Grafana dashboard that shows them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fppmo_ray.distribution import Feedback, Merit, OptimizerSettings, Proposal
from fppmo_ray.service import progress
from fppmo_ray.service.observation import Tally, Workforce
from fppmo_ray.service.progress import METRICS, Metric, metrics_of

GRAFANA = Path(__file__).resolve().parents[2] / "cluster" / "grafana"


class Recorder:
    """Stands in for a metric of Ray's: keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[float, str | None]] = []

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        self.told.append((value, (tags or {}).get("outcome")))

    def inc(self, value: float = 1.0, tags: dict[str, str] | None = None) -> None:
        self.set(value, tags)

    observe = set


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorder]:
    made: dict[str, Recorder] = {}

    def record(metric: Metric, search_id: str) -> Recorder:
        assert search_id == "c0ffee"
        return made.setdefault(metric.name, Recorder())

    monkeypatch.setattr(progress, "_meter", record)
    return made


def workforce(*, requeued: int = 0) -> Workforce:
    return Workforce(wanted=8, placed=6, busy=5, queued=3, requeued=requeued)


def scored(proposal_id: int, loss: float, accuracy: float | None) -> Feedback:
    return Feedback(proposal_id=proposal_id, val_loss=loss, val_accuracy=accuracy, seconds=2.0)


def tally(macs: list[int], *, num_proposals: int = 8, population: int = 3) -> Tally:
    """Return a tally that has been told proposals of these MACs, the best by their losses."""
    settings = OptimizerSettings(
        macs_cut=0.5, num_proposals=num_proposals, population_size=population
    )
    counting = Tally(settings, Merit())
    counting.propose(
        Proposal(proposal_id=i, generation=i // population, keep=np.ones(4, bool), macs=value)
        for i, value in enumerate(macs)
    )
    return counting


def test_every_metric_follows_the_observations(recorders: dict[str, Recorder]) -> None:
    export, counting = metrics_of("c0ffee"), tally([700, 600, 500])
    export(counting.begin([], workforce()))
    export(counting.count([scored(0, 0.5, 0.75), scored(1, 0.25, 0.5)], workforce(requeued=2)))
    failure = Feedback(proposal_id=2, error="NaN")
    export(counting.count([failure], workforce(requeued=3)))
    told = {name.removeprefix("fppmo_"): recorder.told for name, recorder in recorders.items()}
    assert told["proposals_total"] == [
        (1, "scored"),
        (1, "scored"),
        (2, "requeued"),
        (1, "failed"),
        (1, "requeued"),
    ]
    assert told["score_seconds_total"] == [(2, None), (2, None)]
    assert told["score_duration_seconds"] == [(2, None), (2, None)]
    last = {name: values[-1][0] for name, values in told.items()}
    assert last == {
        "proposals_total": 1,
        "score_seconds_total": 2,
        "score_duration_seconds": 2,
        "proposals_ended": 3,
        "proposals_wanted": 8,
        "generations_complete": 1,
        "generation_best_accuracy": 0.5,  # of the lowest loss
        "generation_mean_accuracy": 0.625,
        "generation_best_loss": 0.25,
        "generation_mean_loss": 0.375,
        "best_accuracy": 0.5,
        "best_loss": 0.25,
        "best_macs": 600,
        "workers_placed": 6,
        "workers_wanted": 8,
        "workers_busy": 5,
        "queue_length": 3,
    }


def test_a_task_without_accuracies_exports_none(recorders: dict[str, Recorder]) -> None:
    export, counting = metrics_of("c0ffee"), tally([700, 600, 500])
    ended = [scored(i, -0.1 * i, None) for i in range(3)]
    export(counting.count(ended, workforce()))
    told = {name.removeprefix("fppmo_"): recorder.told for name, recorder in recorders.items()}
    assert told["best_loss"] == told["generation_best_loss"] == [(-0.2, None)]
    for name in ("best_accuracy", "generation_best_accuracy", "generation_mean_accuracy"):
        assert told[name] == []


def test_a_generation_without_a_score_exports_no_best(recorders: dict[str, Recorder]) -> None:
    export, counting = metrics_of("c0ffee"), tally([700, 600, 500])
    export(counting.count([Feedback(proposal_id=i, error="NaN") for i in range(3)], workforce()))
    told = {name.removeprefix("fppmo_"): recorder.told for name, recorder in recorders.items()}
    assert told["generations_complete"] == [(1, None)]
    assert [name for name, values in told.items() if "best" in name and values] == []


@pytest.mark.usefixtures("local_ray")
def test_without_a_metrics_agent_nothing_breaks_or_warns() -> None:
    export, counting = metrics_of("c0ffee"), tally([1, 1], num_proposals=2, population=2)
    export(counting.begin([], workforce()))
    export(counting.count([scored(0, 0.5, 0.5), scored(1, 0.5, 0.5)], workforce(requeued=1)))


def dashboard() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((GRAFANA / "fppmo.json").read_text())
    return content


def expressions() -> list[str]:
    return [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]


def test_the_grafana_dashboard_shows_every_exported_metric_and_no_other() -> None:
    shown = {name for text in expressions() for name in re.findall(r"ray_\w+", text)}
    assert shown == {metric.series for metric in METRICS}


def test_the_grafana_dashboard_asks_for_exported_labels_only_and_always_for_the_search() -> None:
    labels = {metric.series: {"search", "le", *metric.labels} for metric in METRICS}
    for text in expressions():
        for name, selector in re.findall(r"(ray_\w+)(\{[^}]*\})?", text):
            assert 'search=~"$search"' in selector, text
            assert set(re.findall(r"(\w+)=", selector)) <= labels[name], text
        series = re.findall(r"ray_\w+", text)
        for group in re.findall(r"by \(([^)]*)\)", text):
            assert set(group.split(", ")) <= set.union(*(labels[name] for name in series)), text


def test_the_grafana_dashboard_takes_any_data_source_and_lists_the_searches() -> None:
    content = dashboard()
    source, search = content["templating"]["list"]
    assert (source["name"], source["type"], source["query"]) == (
        "datasource",
        "datasource",
        "prometheus",
    )
    [metric] = re.findall(r"label_values\((ray_\w+), search\)", search["query"]["query"])
    assert metric in {item.series for item in METRICS}
    for panel in content["panels"]:
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    ids = [panel["id"] for panel in content["panels"]]
    assert len(set(ids)) == len(ids)


def test_the_grafana_readme_says_what_every_metric_is() -> None:
    lines = (GRAFANA / "README.md").read_text().splitlines()
    rows = {line.split("`")[1]: line for line in lines if line.startswith("| `")}
    assert list(rows) == [f"ray_{metric.name}" for metric in METRICS]
    for metric in METRICS:
        assert f"| {metric.kind}" in rows[f"ray_{metric.name}"]
        assert metric.description in rows[f"ray_{metric.name}"]
