"""The dense weights and the importance: trained or measured once, however the search is cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import simulated_run
import torch
from simulated_run import Killed, all_of, go_on, killed_after, problem_of, told
from simulated_training import SimulatedTrainer, TinyCNN

from fppmo_ray import Recipe, Sampler, Scoring, SearchSettings
from fppmo_ray.pruning import importance
from fppmo_ray.pruning.calibration import FilterOrder
from fppmo_ray.service import dense_network
from fppmo_ray.service.dense_network import measure_filters
from fppmo_ray.service.journal.facts import EpochFinished, ImportanceMeasured, WeightsFrozen
from fppmo_ray.service.journal.run_directory import JOURNAL
from fppmo_ray.service.worker_protocol import digest, to_arrays

SETTINGS = SearchSettings(
    macs_cut=0.6,
    proposals=12,
    fine_tune=Recipe(epochs=3),
    sampler=Sampler(population=4),
    scoring=Scoring(rescore_seeds=2),
)
TRAINED = SETTINGS.changed(baseline_epochs=3)


def test_masks_are_scored_on_the_given_weights_unless_they_are_to_be_trained(
    tmp_path: Path,
) -> None:
    found, pools = go_on(tmp_path, SETTINGS)
    [frozen] = all_of(tmp_path, WeightsFrozen)
    given = digest(to_arrays(problem_of(SETTINGS).network))
    assert frozen.sha256 == found.weights.snapshot.sha256 == given
    assert found.weights is found.given
    assert not any("epoch" in name for name in pools.all[0].names)


def test_a_baseline_is_trained_before_anything_is_scored(tmp_path: Path) -> None:
    found, pools = go_on(tmp_path, TRAINED)
    names = pools.all[0].names
    assert names[:5] == [
        *(f"epoch {e} of baseline" for e in range(3)),
        *("score of the dense network", "importance obs"),
    ]
    [*_, last] = all_of(tmp_path, EpochFinished)
    state = torch.load(tmp_path / last.artifact, weights_only=True)["network"]
    trained = digest({name: tensor.numpy() for name, tensor in state.items()})
    [frozen] = all_of(tmp_path, WeightsFrozen)
    assert frozen.sha256 == found.weights.snapshot.sha256 == found.given.snapshot.sha256 == trained
    network = TinyCNN()
    network.load_state_dict(state)
    [fact] = all_of(tmp_path, ImportanceMeasured)
    assert fact.criterion == "obs"
    # The simulated worker's order of removal is that of the L1 norms of the weights it is given.
    expected = importance(network, problem_of(TRAINED).tracing, "l1")
    assert np.array_equal(np.load(tmp_path / fact.artifact), expected)


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_search_killed_after_any_fact_ends_like_an_undisturbed_one(
    tmp_path: Path, every: int
) -> None:
    undisturbed, _ = go_on(tmp_path / "whole", TRAINED)
    for number in range(1, 1000, every):
        run_dir = tmp_path / str(number)
        try:
            with killed_after(number):
                go_on(run_dir, TRAINED, seed=number, num_workers=1 + number % 3)
        except Killed:
            pass
        else:
            break
        found, _ = go_on(run_dir, TRAINED, seed=number + 1, num_workers=3 - number % 3)
        assert told(run_dir) == told(tmp_path / "whole"), number
        assert np.array_equal(found.choices[0].chosen.keep, undisturbed.choices[0].chosen.keep)
        assert found.weights.snapshot.sha256 == undisturbed.weights.snapshot.sha256
    assert number > 10


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_a_search_cut_back_to_any_fact_ends_like_an_undisturbed_one(
    tmp_path: Path, every: int
) -> None:
    """Unlike after a kill, checkpoints that the journal names are gone."""
    go_on(tmp_path, TRAINED, num_workers=1)
    whole = told(tmp_path)
    lines = (tmp_path / JOURNAL).read_bytes().splitlines(keepends=True)
    for seed, length in enumerate(range(0, len(lines), every)):
        (tmp_path / JOURNAL).write_bytes(b"".join(lines[:length]))
        go_on(tmp_path, TRAINED, seed=seed, num_workers=1 + seed % 3)
        assert told(tmp_path) == whole, length


def test_a_search_that_stopped_amid_training_goes_on_after_its_last_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(RuntimeError):
        pass

    def stop(self: SimulatedTrainer, *arguments: Any) -> Any:
        if arguments[1].name == "baseline" and arguments[2] == 2:
            raise Stopped
        return train(self, *arguments)

    train = SimulatedTrainer.train_epoch
    go_on(tmp_path / "whole", TRAINED)
    monkeypatch.setattr(SimulatedTrainer, "train_epoch", stop)
    with pytest.raises(Stopped):
        go_on(tmp_path / "stopped", TRAINED)
    monkeypatch.undo()
    _, pools = go_on(tmp_path / "stopped", TRAINED)
    epochs = [name for name in pools.all[0].names if name.startswith("epoch")]
    assert epochs == ["epoch 2 of baseline"]
    assert told(tmp_path / "stopped") == told(tmp_path / "whole")


def test_only_the_last_checkpoint_of_a_training_stays(tmp_path: Path) -> None:
    go_on(tmp_path, TRAINED)
    names = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert names == ["baseline-epoch2.pt"]


def test_weights_that_training_no_longer_gives_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on(tmp_path, TRAINED)
    for checkpoint in (tmp_path / "checkpoints").iterdir():
        checkpoint.unlink()  # so that the epochs are trained again

    def other(self: SimulatedTrainer, weights: Any, task: Any, *rest: Any) -> Any:
        return train(self, weights, replace(task, seed=task.seed + 1), *rest)

    train = SimulatedTrainer.train_epoch
    monkeypatch.setattr(simulated_run.SimulatedTrainer, "train_epoch", other)
    with pytest.raises(ValueError, match=r"dense weights are not those of the journal in .*resume"):
        go_on(tmp_path, TRAINED)


def test_the_obs_order_and_its_error_curves_are_kept_and_read_again(tmp_path: Path) -> None:
    settings = SETTINGS.changed(importance="obs")
    _, pools = go_on(tmp_path, settings)
    assert pools.all[0].names[1] == "importance obs"
    [fact] = all_of(tmp_path, ImportanceMeasured)
    assert (fact.criterion, fact.artifact) == ("obs", "importance.npy")
    assert fact.curves_artifact == "error_curves.npy"
    whole = told(tmp_path)
    # The line of the importance is the last: what was measured is read, and nothing else is known.
    lines = (tmp_path / JOURNAL).read_bytes().splitlines(keepends=True)
    end = next(number for number, line in enumerate(lines) if b"ImportanceMeasured" in line)
    (tmp_path / JOURNAL).write_bytes(b"".join(lines[: end + 1]))
    _, pools = go_on(tmp_path, settings)
    assert "importance obs" not in pools.all[0].names
    assert told(tmp_path) == whole
    curves = (tmp_path / "error_curves.npy").read_bytes()
    (tmp_path / "error_curves.npy").write_bytes(b"other")
    _, pools = go_on(tmp_path, settings)
    assert pools.all[0].names == ["importance obs"]
    assert (tmp_path / "error_curves.npy").read_bytes() == curves
    assert told(tmp_path) == whole


def test_error_curves_are_split_by_the_groups_sizes(tmp_path: Path) -> None:
    problem = problem_of(SETTINGS.changed(importance="obs"))
    joined = np.arange(float(problem.space.num_filters + len(problem.space.groups)))
    files = {"importance.npy": np.ones(problem.space.num_filters), "error_curves.npy": joined}
    for name, array in files.items():
        np.save(tmp_path / name, array)
    fact = ImportanceMeasured(
        criterion="obs",
        artifact="importance.npy",
        sha256="",
        curves_artifact="error_curves.npy",
        curves_sha256="",
    )
    run = SimpleNamespace(
        all=lambda kind: [fact],
        read_artifact=lambda name, sha256: (tmp_path / name).read_bytes(),
    )
    found = measure_filters(cast(Any, SimpleNamespace(run=run, problem=problem)), cast(Any, None))
    assert [len(curve) for curve in found.error_curves] == [13, 17]
    assert [curve[0] for curve in found.error_curves] == [0, 13]


def test_an_importance_that_was_measured_is_read_again(tmp_path: Path) -> None:
    go_on(tmp_path, SETTINGS)
    _, pools = go_on(tmp_path, SETTINGS)
    assert pools.all[0].names == []


@pytest.mark.parametrize("content", [None, b"", b"other"])
def test_an_importance_that_is_lost_is_measured_again(
    tmp_path: Path, content: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on(tmp_path, SETTINGS)
    file, whole = tmp_path / "importance.npy", told(tmp_path)
    kept = file.read_bytes()

    def lose() -> None:
        file.unlink()
        if content is not None:
            file.write_bytes(content)

    lose()
    _, pools = go_on(tmp_path, SETTINGS)
    assert file.read_bytes() == kept
    assert pools.all[0].names == ["importance obs"]
    assert told(tmp_path) == whole
    lose()
    other = FilterOrder(importance=np.ones(3), error_curves=())
    monkeypatch.setattr(dense_network, "_measured", lambda context, weights: other)
    with pytest.raises(ValueError, match="is gone, and measured again it is another; resume on"):
        go_on(tmp_path, SETTINGS)
