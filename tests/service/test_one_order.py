"""The best proposal is the same one everywhere: one search, seen by all that show or use it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from inline_pool import InlinePool
from matplotlib.figure import Figure
from rich.console import Console

from fppmo_ray.distribution import (
    BoolArray,
    ChannelGroup,
    Feedback,
    Finalist,
    LayerCost,
    Proposal,
    PruningSpace,
    Width,
)
from fppmo_ray.distribution.space import TensorSize
from fppmo_ray.pruning import Score
from fppmo_ray.report import draw_figures, print_status
from fppmo_ray.service.choices import choose
from fppmo_ray.service.dense_network import Context
from fppmo_ray.service.journal.facts import Started
from fppmo_ray.service.journal.run_directory import RunDirectory, open_run
from fppmo_ray.service.pool.call import Call
from fppmo_ray.service.progress import watch
from fppmo_ray.service.search_loop import ProbabilityModel, score_proposals
from fppmo_ray.service.setting_groups import Sampler, Scoring
from fppmo_ray.service.settings import SearchSettings
from fppmo_ray.service.tune import FPPMOSearch, ranked_trials

FILTERS, MACS_PER_PAIR = (16, 16, 32), (576, 144, 36)
WIDTHS = [Width(constant=3), *(Width(terms=((i, 1),)) for i in range(3))]
SPACE = PruningSpace(
    tuple(ChannelGroup(name=f"conv{i}", num_filters=FILTERS[i]) for i in range(3)),
    tuple(
        LayerCost(
            layer=f"conv{i}",
            macs_per_pair=MACS_PER_PAIR[i],
            in_width=WIDTHS[i],
            out_width=WIDTHS[i + 1],
        )
        for i in range(3)
    ),
    tensor_sizes=tuple(
        TensorSize(tensor=f"conv{i}", per_pair=9, in_width=WIDTHS[i], out_width=WIDTHS[i + 1])
        for i in range(3)
    ),
).with_limits()
IMPORTANCE = np.linspace(1, 2, SPACE.num_filters)
SETTINGS = SearchSettings(
    macs_cut=0.5,
    proposals=8,
    sampler=Sampler(population=4),
    scoring=Scoring(capacity_weight=1.0, rescore_seeds=1),
)

# Parameters of the eight masks, and what they score. The dense network has 7344 parameters, so that
# a loss is multiplied by 7344 / parameters before it is compared.
PARAMETERS = {0: 3339, 1: 2907, 2: 3600, 3: 3600, 4: 3600, 5: 3807, 6: 3600, 7: 3600}
LOSSES_AND_ACCURACIES = {
    0: (1.10, 0.58),  # weighed 2.42
    1: (1.00, 0.60),  # weighed 2.53: the least raw loss
    2: (1.12, 0.55),  # weighed 2.28: the best of generation 0
    3: (1.40, 0.75),  # weighed 2.86: the highest accuracy of generation 0
    4: (1.20, 0.50),  # weighed 2.45
    5: (1.15, 0.52),  # weighed 2.22: the best of generation 1, and of all
    6: (1.50, 0.80),  # weighed 3.06: the highest accuracy
}  # proposal 7 fails
BEST, BEST_FIRST = 5, [5, 2, 0, 4, 1, 3, 6]
BEST_MACS = 41_472


class ScriptedWorker:
    def score(self, proposal: Proposal) -> Feedback:
        if proposal.proposal_id not in LOSSES_AND_ACCURACIES:
            return Feedback(proposal_id=proposal.proposal_id, error="diverged")
        loss, accuracy = LOSSES_AND_ACCURACIES[proposal.proposal_id]
        return Feedback(
            proposal_id=proposal.proposal_id, val_loss=loss, val_accuracy=accuracy, seconds=1.0
        )


class Gauge:
    """Stands in for a metric of Ray's; keeps the last value."""

    def __init__(self) -> None:
        self.value = 0.0

    def set(self, value: float) -> None:
        self.value = value

    def inc(self, value: float = 1.0, tags: dict[str, str] | None = None) -> None:
        self.value += value

    observe = set


@dataclass
class Seen:
    """One search, and all that saw it."""

    run_dir: Path
    exported: dict[str, float]
    logged: list[str]
    model: ProbabilityModel
    proposals: Sequence[Proposal]


@pytest.fixture
def seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Iterator[Seen]:
    gauges: dict[str, Gauge] = {}
    monkeypatch.setattr(
        "fppmo_ray.service.progress._meter",
        lambda metric, search_id: gauges.setdefault(metric.name, Gauge()),
    )
    settings = SETTINGS.optimizer_settings()
    model, pool = ProbabilityModel(SPACE, IMPORTANCE, settings), InlinePool(ScriptedWorker())
    with caplog.at_level(logging.INFO), begun(tmp_path / "run") as run:
        with watch(run, settings, settings.merit(SPACE)) as progress:
            score_proposals(model, pool, run, score_call, progress)  # type: ignore[arg-type]
        proposals = run.all(Proposal)
        assert {item.proposal_id: item.parameters for item in proposals} == PARAMETERS
        exported = {name: gauge.value for name, gauge in gauges.items()}
        yield Seen(tmp_path / "run", exported, caplog.messages, model, proposals)


def begun(run_dir: Path) -> Any:
    started = Started(
        search_id="c0ffee",
        identity={"settings": SETTINGS.journaled()},
        versions={},
        groups=[group.name for group in SPACE.groups],
        num_filters=SPACE.num_filters,
        dense_macs=SPACE.dense_macs,
        dense_parameters=SPACE.dense_parameters,
    )
    return open_run(run_dir, resume=False, started=started)


def score_call(proposal: Proposal) -> Call[ScriptedWorker, Feedback]:
    return Call(f"proposal {proposal.proposal_id}", lambda worker: worker.score(proposal))


def best_sample(finalists: Sequence[Finalist]) -> str:
    return next(item.name for item in finalists if item.name.startswith("sample"))


def test_the_optimizers_best_sample_is_the_best_by_weighed_loss(seen: Seen) -> None:
    assert best_sample(seen.model.finalists()) == f"sample {BEST}"


def test_the_log_has_a_line_per_finished_generation_with_the_accuracy_of_its_best(
    seen: Seen,
) -> None:
    lines = [line.partition("  workers")[0] for line in seen.logged]
    assert lines == [
        "generation 0  best 0.5500  mean 0.6200  failed 0/4",
        "generation 1  best 0.5200  mean 0.6067  failed 1/4",
    ]


def test_the_metrics_show_the_figures_of_the_best_and_count_finished_generations(
    seen: Seen,
) -> None:
    shown = {
        name.removeprefix("fppmo_"): value
        for name, value in seen.exported.items()
        if "best" in name or "generations" in name
    }
    assert shown == {
        "best_loss": 1.15,
        "best_accuracy": 0.52,
        "best_macs": BEST_MACS,
        "generation_best_loss": 1.15,
        "generation_best_accuracy": 0.52,
        "generations_complete": 2,
    }


def test_the_status_names_the_best_proposal(seen: Seen) -> None:
    console = Console(record=True, width=120)
    print_status(seen.run_dir, console)
    words = " ".join(console.export_text().replace("│", " ").split())
    assert f"best on search-val 0.5200 (proposal {BEST})" in words
    assert "7 scored, 1 failed of 8" in words


def test_the_figure_of_scores_draws_cost_and_accuracy_of_each_generations_best(
    seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    draw_figures(seen.run_dir)
    best = [
        [round(float(value), 3) for value in line.get_ydata()]
        for axes in drawn[0].axes
        for line in axes.get_lines()
        if line.get_label() == "generation's best"
    ]
    assert best == [[2.285, 2.218], [55.0, 52.0]]  # weighed losses, and accuracies of the same


def test_the_choice_among_rescored_finalists_follows_the_same_order(
    seen: Seen, tmp_path: Path
) -> None:
    scores = {item.keep.tobytes(): item.proposal_id for item in seen.proposals}

    class Rescorer:
        def rescore(self, weights: Any, keep: BoolArray, seed: Any, split: str) -> Score:
            loss, accuracy = LOSSES_AND_ACCURACIES[scores[keep.tobytes()]]
            return Score(val_loss=loss, val_accuracy=accuracy, seconds=1.0)

    named = {1: "sample 1", 3: "importance-only", BEST: f"sample {BEST}", 6: "sample 6"}
    finalists = [
        Finalist(name=name, keep=seen.proposals[i].keep, parameters=PARAMETERS[i])
        for i, name in named.items()
    ]
    problem: Any = SimpleNamespace(settings=SETTINGS, space=SPACE)
    pool: Any = InlinePool(Rescorer())
    with begun(tmp_path / "rescored") as run:
        assert isinstance(run, RunDirectory)
        context = Context(problem=problem, run=run, pool=pool, compute=problem)
        weights: Any = SimpleNamespace(shared=None)
        [choice] = choose(finalists, context, weights)
    assert choice.chosen.name == f"sample {BEST}"


def test_under_tune_the_searcher_and_the_ranked_trials_follow_the_same_order(seen: Seen) -> None:
    search = FPPMOSearch(SPACE, IMPORTANCE, SETTINGS.optimizer_settings())
    results = []
    while isinstance(config := search.suggest(f"t{len(results)}"), dict):
        assert config["parameters"] == PARAMETERS[config["id"]]
        figures = LOSSES_AND_ACCURACIES.get(config["id"], (float("nan"), 0.5))
        metrics = dict(zip(("val_loss", "val_accuracy"), figures, strict=True))
        results.append(SimpleNamespace(config=config, metrics=metrics, error=None, checkpoint=None))
    for number, result in enumerate(results):
        search.on_trial_complete(f"t{number}", result.metrics)
    assert best_sample(search.finalists()) == f"sample {BEST}"
    problem: Any = SimpleNamespace(settings=SETTINGS, space=SPACE)
    trials = ranked_trials(problem, results)  # type: ignore[arg-type]
    assert [trial.proposal.proposal_id for trial in trials] == BEST_FIRST
