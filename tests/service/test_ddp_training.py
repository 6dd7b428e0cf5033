"""Fine-tuning by two replicas on real Ray: as one worker does it, up to rounding."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fppmo_ray import (
    Numerics,
    Recipe,
    Resources,
    Sampler,
    Scoring,
    SearchSettings,
    load_dataset,
    run_search,
)
from fppmo_ray.distribution import Feedback
from fppmo_ray.service import ddp_training
from fppmo_ray.service.ddp_training import train_on_several
from fppmo_ray.service.journal.facts import EpochFinished
from fppmo_ray.service.journal.journal import JOURNAL
from fppmo_ray.service.journal.run_directory import read_journal
from fppmo_ray.service.pool.cluster import Demand
from fppmo_ray.service.stopping import SearchStopped, signals_stop_searches
from fppmo_ray.service.trainings import Training

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Ray warns of settings of its own
]

NUM_EPOCHS = 3
SETTINGS = SearchSettings(
    macs_cut=0.4,
    proposals=4,
    # Distances of features are relative to the variance of a replica's part: they differ a little.
    fine_tune=Recipe(
        epochs=NUM_EPOCHS,
        batch_size=64,
        learning_rate=0.02,
        weight_decay=1e-4,
        feature_weight=0.0,
    ),
    sampler=Sampler(population=4),
    numerics=Numerics(dtype="float32"),
    scoring=Scoring(
        score_images=50, score_recalibrate_images=50, rescore_images=50, rescore_seeds=1
    ),
)


def without_batchnorm() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 12, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(12, 16, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10)),
    )


def searched(
    run_dir: Path, replicas: int, settings: SearchSettings = SETTINGS, *, resume: bool = False
) -> dict[tuple[str, int], float]:
    """A search whose networks are fine-tuned by so many; the losses of its epochs, in order."""
    run_search(
        without_batchnorm(),
        load_dataset("digits"),
        settings,
        run_dir=run_dir,
        resources=Resources(workers=2, fine_tune_workers=replicas),
        resume=resume,
    )
    epochs = [fact for fact in read_journal(run_dir) if isinstance(fact, EpochFinished)]
    losses = {(fact.task, fact.epoch): fact.train_loss for fact in epochs}
    assert len(losses) == len(epochs)  # none is counted twice
    return losses


@pytest.fixture(scope="module")
def alone(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a search whose networks are fine-tuned by one worker each."""
    run_dir = tmp_path_factory.mktemp("runs") / "alone"
    searched(run_dir, 1)
    return run_dir


def is_as_alone(losses: dict[tuple[str, int], float], alone: Path) -> bool:
    """Whether the epochs were those of one worker, in their order."""
    tasks = ("dense", "importance-only", "allocation", "fppmo")
    assert [*losses] == [(task, epoch) for task in tasks for epoch in range(NUM_EPOCHS)]
    facts = [fact for fact in read_journal(alone) if isinstance(fact, EpochFinished)]
    expected = {(fact.task, fact.epoch): fact.train_loss for fact in facts}
    return losses == pytest.approx(expected, rel=1e-3)


def scores(run_dir: Path) -> list[tuple[int, float]]:
    facts = [fact for fact in read_journal(run_dir) if isinstance(fact, Feedback)]
    return sorted((fact.proposal_id, fact.val_loss) for fact in facts)


def test_two_replicas_train_what_one_worker_trains(alone: Path, tmp_path: Path) -> None:
    assert is_as_alone(searched(tmp_path / "run", 2), alone)
    assert scores(tmp_path / "run") == scores(alone)


def test_replicas_also_train_the_baseline_and_between_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared: list[str] = []

    def note(trainings: Sequence[Training], *arguments: Any) -> dict[str, bytes]:
        shared.extend(training.task.name for training in trainings)
        return train_on_several(trainings, *arguments)

    monkeypatch.setattr(ddp_training, "train_on_several", note)
    settings = SETTINGS.changed(
        baseline_epochs=2,
        baseline_learning_rate=0.02,
        stages=(0.2, 0.4),
        stage_epochs=1,
        proposals=16,
        fine_tune=replace(SETTINGS.fine_tune, epochs=1),
    )
    alone = searched(tmp_path / "alone", 1, settings)
    assert shared == []
    losses = searched(tmp_path / "run", 2, settings)
    assert shared == ["baseline", "stage-1", "dense", "importance-only", "fppmo"]
    assert losses.keys() == alone.keys()
    assert losses == pytest.approx(alone, rel=1e-3)


def after_first_epoch(run_dir: Path, act: Callable[[], None]) -> threading.Thread:
    """A thread that does something once an epoch is in the journal."""

    def watch() -> None:
        while not (run_dir / JOURNAL).is_file() or not any(
            isinstance(fact, EpochFinished) for fact in read_journal(run_dir)
        ):
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def kill_a_replica() -> None:
    """Of this process's own Ray."""

    def parent(process: int) -> int:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])

    for folder in Path("/proc").glob("[0-9]*"):
        process = int(folder.name)
        is_replica = b"RayTrainWorker" in (folder / "cmdline").read_bytes()
        if is_replica and parent(parent(process)) == os.getpid():
            os.kill(process, signal.SIGKILL)
            return
    raise AssertionError("no replica is running")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
def test_an_epoch_is_done_again_when_a_replica_is_killed(
    alone: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir, killed = tmp_path / "run", list[float]()

    def kill() -> None:
        kill_a_replica()
        killed.append(time.time())

    killer = after_first_epoch(run_dir, kill)
    assert is_as_alone(searched(run_dir, 2), alone)
    assert not killer.is_alive()
    ended = "a group of replicas ended before its work was done"
    [noticed] = [record.created for record in caplog.records if ended in record.getMessage()]
    assert 0 <= noticed - killed[0] < 60  # the other replica waits for it in a collective call


def test_a_stop_ends_after_the_epoch_under_way_and_another_driver_goes_on(
    alone: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    after_first_epoch(run_dir, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SearchStopped), signals_stop_searches():
        searched(run_dir, 2)
    with pytest.raises(ValueError, match="fine_tune_workers was 2, now 1;"):
        searched(run_dir, 1, resume=True)
    assert is_as_alone(searched(run_dir, 2, resume=True), alone)


def test_a_group_that_the_cluster_has_no_room_for_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray.train import ControllerError

    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "2")
    monkeypatch.setattr(ddp_training, "_MAX_MINUTES_WITHOUT_ROOM", 2)  # then each takes 2 s
    problem: Any = SimpleNamespace(
        fine_tune_workers=1000, device_type="cpu", replica_demand=Demand(cpus=1)
    )
    with pytest.raises(ControllerError, match="startup timed out after 2"):
        ddp_training._fit(lambda: None, problem)
