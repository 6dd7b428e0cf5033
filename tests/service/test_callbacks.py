"""Callbacks of a whole search, and those that keep its figures elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fppmo_ray import (
    Callback,
    FunctionTask,
    MLflow,
    Resources,
    Sampler,
    Scoring,
    SearchResult,
    TensorBoard,
    search,
)
from fppmo_ray.service.journal.facts import EpochFinished, Started
from fppmo_ray.service.observation import Generation, Observation


class Recorder(Callback):
    """Writes down all that it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def start(self, started: Started) -> None:
        self.told.append(("start", started.identity["settings"]["proposals"]))

    def feedback(self, seen: Observation) -> None:
        self.told.append(("feedback", len(seen.ended)))

    def generation(self, generation: Generation, seen: Observation) -> None:
        self.told.append(("generation", generation.index, generation.num_ended))

    def epoch(self, epoch: EpochFinished) -> None:
        self.told.append(("epoch", epoch.task, epoch.epoch))

    def end(self, result: SearchResult | None) -> None:
        self.told.append(("end", None if result is None else result.best.macs_cut >= 0.3))


class Broken(Callback):
    """Raises at the second feedback."""

    def __init__(self) -> None:
        self.calls = 0

    def feedback(self, seen: Observation) -> None:
        self.calls += 1
        if self.calls == 2:
            raise OSError("the server is gone")


def score(network: nn.Module, seed: int) -> float:
    return -float(network(torch.ones(1, 1, 6, 6)).square().mean())


def fine_tune(network: nn.Module) -> None:
    pass


def searched(run_dir: Path, *callbacks: Callback, score_with: Any = score) -> SearchResult:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 3))
    task = FunctionTask(
        example_inputs=torch.zeros(1, 1, 6, 6), score=score_with, fine_tune=fine_tune
    )
    return search(
        *(network, task),
        run_dir=run_dir,
        macs_cut=0.3,
        proposals=4,
        sampler=Sampler(population=2, importance="l1"),
        scoring=Scoring(rescore_seeds=1),
        resources=Resources(workers=1),
        callbacks=callbacks,
    )


def test_callbacks_are_told_of_a_search_from_start_to_end(
    ray_here: None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recorder, broken = Recorder(), Broken()
    events = tmp_path / "events"
    searched(tmp_path / "run", broken, recorder, TensorBoard(events))
    assert recorder.told[0] == ("start", 4)
    assert recorder.told[1] == ("feedback", 0)  # what the journal held
    assert sum(count for kind, count in told_of(recorder, "feedback")) == 4
    assert told_of(recorder, "generation") == [("generation", 0, 2), ("generation", 1, 2)]
    trained = {task for _, task, _ in told_of(recorder, "epoch")}
    assert {"fppmo", "importance-only"} <= trained
    assert recorder.told[-1] == ("end", True)
    assert broken.calls == 2
    printed = capsys.readouterr().out
    assert "importance-only" in printed  # a row of the closing table
    assert f"fppmo-ray report {tmp_path / 'run'}" in printed
    assert "\x1b" not in printed  # nothing for terminals where there is none
    assert (tmp_path / "run" / "scores.png").exists()
    [warning] = [text for text in caplog.messages if "Broken" in text]
    assert warning == ("Broken is not called again: feedback raised OSError('the server is gone')")
    [file] = events.iterdir()
    content = file.read_bytes()
    for tag in (b"search/generation_best_loss", b"search/best_loss", b"result/macs_cut"):
        assert tag in content


def told_of(recorder: Recorder, kind: str) -> list[Any]:
    return [told for told in recorder.told if told[0] == kind]


def test_the_end_of_a_search_that_fails_is_told_without_a_result(
    ray_here: None, tmp_path: Path
) -> None:
    recorder = Recorder()

    def failing(network: nn.Module, seed: int) -> float:
        raise ValueError("no such file")

    with pytest.raises((RuntimeError, ValueError)):
        searched(tmp_path / "run", recorder, score_with=failing)
    assert recorder.told[0] == ("start", 4)
    assert recorder.told[-1] == ("end", None)


def test_mlflow_gets_parameters_metrics_and_the_state_of_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[str, Any]] = []

    def take(name: str) -> Any:
        return lambda *given, **named: calls.append((name, (*given, *named.values())))

    names = ("set_experiment", "start_run", "log_params", "log_metrics", "end_run")
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(**{n: take(n) for n in names}))
    tracker = MLflow("pruning")
    settings = {"proposals": 4, "scoring": {"score_images": 500}, "space": {"layer_limits": {}}}
    tracker.start(
        Started(
            search_id="c0ffee",
            identity={"settings": settings},
            versions={},
            groups=[],
            num_filters=1,
            dense_macs=1,
        )
    )
    tracker.epoch(
        EpochFinished(task="fppmo", epoch=3, train_loss=0.5, seconds=1.0, artifact="a", sha256="b")
    )
    best = SimpleNamespace(macs_cut=0.5, test_score=0.9)
    result: Any = SimpleNamespace(best=best)
    tracker.end(result)
    tracker.end(None)
    flat = {"proposals": 4, "scoring.score_images": 500, "space.layer_limits": {}}
    assert calls == [
        ("set_experiment", ("pruning",)),
        ("start_run", ("c0ffee",)),
        ("log_params", (flat,)),
        ("log_metrics", ({"train_loss/fppmo": 0.5}, 3)),
        ("log_metrics", ({"macs_cut": 0.5, "test_score": 0.9}, 0)),
        ("end_run", ("FINISHED",)),
        ("end_run", ("KILLED",)),
    ]


def test_a_tracker_without_its_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ValueError, match=r"pip install fppmo-ray\[mlflow\]"):
        MLflow()
    with pytest.raises(ValueError, match=r"pip install fppmo-ray\[tensorboard\]"):
        TensorBoard(tmp_path)
