"""Long fine-tuning in a study: it goes on where it was stopped, and is compared with L1."""

from __future__ import annotations

from pathlib import Path

import long_training
import numpy as np
import pytest
import torch
from long_training import Course, Row, long_training_table

from fppmo_ray import load_dataset
from fppmo_ray.pruning import trace
from fppmo_ray.training import (
    PLAIN_COMPUTE,
    Recipe,
    build_network,
    example_batch,
    open_images,
    train_epoch,
)


def course() -> Course:
    dataset = load_dataset("digits")
    teacher, image = build_network("digits_cnn", 10, seed=0).eval(), example_batch(dataset)
    return Course(
        teacher=teacher,
        train=open_images(dataset.train, np.arange(96), dataset),
        held_out=open_images(dataset.train, np.arange(96, 128), dataset),
        test=open_images(dataset.test, np.arange(32), dataset),
        recipe=Recipe(epochs=3, batch_size=32),
        compute=PLAIN_COMPUTE,
        tracing=trace(teacher, image),
        image=image,
    )


def test_a_stopped_training_goes_on_and_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    network = build_network("digits_cnn", 10, seed=1)
    whole, seen = course().train_from(network, None, 5, tmp_path / "whole")

    def stopped_before_the_third(*arguments, epoch, **named):
        if epoch == 2:
            raise KeyboardInterrupt
        return train_epoch(*arguments, epoch=epoch, **named)

    monkeypatch.setattr(long_training, "train_epoch", stopped_before_the_third)
    with pytest.raises(KeyboardInterrupt):
        course().train_from(build_network("digits_cnn", 10, seed=1), None, 5, tmp_path / "stopped")
    monkeypatch.setattr(long_training, "train_epoch", train_epoch)
    other = build_network("digits_cnn", 10, seed=9)  # its weights come from the checkpoint
    resumed, seen_again = course().train_from(other, None, 5, tmp_path / "stopped")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor)
    figures = [[epoch["loss"], epoch["held_out"]] for epoch in seen]
    assert [[epoch["loss"], epoch["held_out"]] for epoch in seen_again] == figures
    assert len(figures) == 3


def test_the_table_pairs_seeds_with_those_of_l1():
    def row(method: str, seed: int, after: float) -> Row:
        figures = {"parameters": 1000, "before": 40.0, "held_out": [after], "seconds": 3600.0}
        setting = {"network": "resnet20", "macs_cut": 0.57, "recipe": "default", "epochs": 1}
        return Row(method=method, seed=seed, after=after, **setting, **figures)

    rows = [row("l1 + refit", 0, 86.0), row("l1 + refit", 1, 87.0)]
    rows += [row("allocation", 1, 88.0), row("allocation", 0, 87.0), row("dense", 2, 89.0)]
    columns = [list(column.cells) for column in long_training_table(rows).columns]
    assert columns[2] == ["l1 + refit", "allocation", "dense"]
    assert columns[9] == ["", "+1.00 [+1.00, +1.00]", ""]
    assert columns[10] == ["1.0", "1.0", "1.0"]
