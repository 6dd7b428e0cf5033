"""Baselines: weights that never saw the held-out images, and the rows of these images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import baseline
import numpy as np
import pytest
import ray
import torch

from fppmo_ray import Recipe, Resources, load_dataset
from fppmo_ray.training import (
    ComputeConfig,
    build_network,
    evaluate,
    fine_tune,
    load_weights,
    open_images,
    stratified_splits,
)

ray.cloudpickle.register_pickle_by_value(baseline)  # Ray's workers do not find it

RECIPE = Recipe(epochs=2, batch_size=64, distillation_weight=0.0)


def trained(images: Path, output: Path) -> bytes:
    """Run the job, and return its file of weights."""
    baseline.main(images, output, Resources(workers=1), RECIPE, network="resnet20")
    return (output / "weights.pt").read_bytes()


@pytest.mark.usefixtures("ray_here")
def test_training_is_that_of_the_library_and_holds_the_rows_out(few_images: Path) -> None:
    dataset = load_dataset("cifar10", few_images)
    splits = stratified_splits(dataset.train.labels, search_val=40, choose_val=20, seed=0)
    compute = ComputeConfig(threads=1)
    network = build_network("resnet20", 10, seed=0)
    parts = [ray.put(part) for part in (network, dataset, splits)]
    trainer = baseline.Trainer(parts, RECIPE, compute, 3, "cpu")
    state, _ = trainer.train_epoch(None)
    state, seen = trainer.train_epoch(state)
    figures = trainer.look(state)
    assert figures["held_out"]["accuracy"] == seen["held_out_accuracy"]

    images = open_images(dataset.train, splits.search_train, dataset)
    assert len(images) == 340
    fine_tune(network, images, RECIPE, seed=3)
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(state.network[name], tensor)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_the_job_trains_once_and_holds_a_tenth_of_every_class_out(
    few_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(seed: int, epochs: int = 2) -> dict[str, bytes]:
        recipe = Recipe(epochs=epochs, batch_size=64, distillation_weight=0.0)
        baseline.main(
            few_images, tmp_path, Resources(workers=1), recipe, network="resnet20", seed=seed
        )
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    first = run(0)
    files = ["baseline.json", "checkpoint.pt", "search_val_rows.npy", "weights.pt"]
    assert sorted(first) == files
    assert "held_out: " in capsys.readouterr().out
    assert run(0) == first

    rows = np.load(tmp_path / "search_val_rows.npy")
    dataset = load_dataset("cifar10", few_images)
    labels = dataset.train.labels
    shares = np.bincount(labels[rows], minlength=10) / np.bincount(labels, minlength=10)
    assert len(rows) == 40
    assert np.allclose(shares, 0.1, atol=0.05)

    trained = build_network("resnet20", 10, seed=1)
    load_weights(trained, tmp_path / "weights.pt")
    images = open_images(dataset.test, None, dataset, "cpu")
    told = json.loads(first["baseline.json"])["test"]["accuracy"]
    assert evaluate(trained.eval(), images.batches(250)).accuracy == told
    with pytest.raises(ValueError, match=r"another training run: its seed is \[0\]"):
        run(1)
    with pytest.raises(ValueError, match="another training run: its epochs is 2"):
        run(0, epochs=3)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_killed_training_continues_after_its_last_checkpoint(
    few_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(few_images, tmp_path / "whole")
    write = baseline.write_checkpoint

    def write_or_die(
        path: Path, state: baseline.TrainingState, identity: dict[str, object]
    ) -> None:
        if state.epochs_done == 2:  # the curve is written by now, the checkpoint is not
            raise KeyboardInterrupt
        write(path, state, identity)

    with monkeypatch.context() as patched:
        patched.setattr(baseline, "write_checkpoint", write_or_die)
        with pytest.raises(KeyboardInterrupt):
            trained(few_images, tmp_path / "killed")
    assert trained(few_images, tmp_path / "killed") == whole
    told = [
        json.loads((tmp_path / name / "baseline.json").read_text()) for name in ("whole", "killed")
    ]
    assert [epoch["train_loss"] for epoch in told[0]["epochs"]] == [
        epoch["train_loss"] for epoch in told[1]["epochs"]
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_lost_worker_is_replaced_and_gets_network_and_images_again(
    few_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, train = trained(few_images, tmp_path / "whole"), baseline._train

    def kill_and_train(trainer: Any, *arguments: Any) -> dict[str, Any]:
        ray.get(trainer.train_epoch.remote(None))
        ray.kill(trainer, no_restart=False)
        return train(trainer, *arguments)

    monkeypatch.setattr(baseline, "_train", kill_and_train)
    assert trained(few_images, tmp_path / "killed") == whole


@pytest.mark.parametrize(
    ("recipe", "complaint"),
    [
        (Recipe(epochs=0, distillation_weight=0.0), "--fine-tune-epochs must be at least 1"),
        (Recipe(), "--distillation-weight must be 0, .*no network to learn from, got 0.5"),
    ],
)
def test_a_baseline_without_epochs_or_with_a_teacher_is_refused(
    tmp_path: Path, recipe: Recipe, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        baseline.main(tmp_path, tmp_path, Resources(), recipe)
