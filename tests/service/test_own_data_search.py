"""A user with own images and an own network gets from a search to class names."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset as TorchDataset

from fppmo_ray import (
    Calibration,
    Resources,
    Sampler,
    Scoring,
    Transform,
    load_classifier,
    search,
)
from fppmo_ray.service.function_task import FunctionTask
from fppmo_ray.service.image_task import task_of
from fppmo_ray.service.result import export_result
from fppmo_ray.training import Recipe

NAMES = ("blue", "green", "red")
SHADES = np.array([[40, 60, 200], [40, 200, 60], [200, 60, 40]])
HALVES = Transform(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), image_size=12, squash=True)
SMALL: dict[str, Any] = {
    "macs_cut": 0.4,
    "proposals": 4,
    "sampler": Sampler(population=2),
    "scoring": Scoring(rescore_seeds=1, score_reconstruct_images=20),
    "calibration": Calibration(calibration_images=40),
    "fine_tune": Recipe(epochs=1, batch_size=32, learning_rate=0.01),
    "resources": Resources(workers=1),
}


def picture(label: int, rng: np.random.Generator) -> Image.Image:
    noise = rng.integers(-40, 40, (16, 20, 3))
    return Image.fromarray((SHADES[label] + noise).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("mine"), np.random.default_rng(0)
    for part, count in (("train", 240), ("val", 30)):
        for row in range(count):
            path = folder / part / NAMES[row % 3] / f"{row}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(row % 3, rng).save(path)
    return folder


def network() -> nn.Module:
    """A network that knows the colours: its last channels are blue, green and red."""
    torch.manual_seed(0)
    made = nn.Sequential(
        *(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 3, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )
    with torch.no_grad():
        for channel in range(3):
            made[0].weight[channel] = 0
            made[0].weight[channel, 2 - channel] = 3
            made[2].weight[channel] = 0
            made[2].weight[channel, channel] = 5
    return made


@pytest.mark.usefixtures("ray_here")
def test_from_jpegs_and_an_own_network_to_class_names_of_an_onnx_file(
    jpegs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = tmp_path / "run"
    given = nn.DataParallel(network().half())
    with caplog.at_level(logging.INFO):
        result = search(given, str(jpegs), run_dir=run_dir, transform=HALVES, **SMALL)
    assert "3 classes, in the order of the network's outputs: blue, green, red" in caplog.messages
    assert (
        "images: RGB squashed to 12 x 12 bilinear, mean 0.5 0.5 0.5, std 0.5 0.5 0.5; training: "
        "crops after padding with 1, mirrored or not" in caplog.messages
    )
    dense = "dense network as given: 100.0 % ± 10.8 on 14 held-out images, chance 35.7 %"
    assert dense in caplog.messages
    assert any("masks are ranked on 14 held-out images" in text for text in caplog.messages)
    assert result.figures["interface"]["class_names"] == list(NAMES)
    assert result.figures["interface"]["mean"] == [0.5, 0.5, 0.5]
    image = picture(2, np.random.default_rng(7))
    assert load_classifier(run_dir / "network.json", network)(image) == "red"
    [path] = export_result(run_dir, tmp_path / "out", format="onnx", constructor=network)
    classify = load_classifier(path)
    assert [classify(picture(label, np.random.default_rng(8))) for label in range(3)] == [*NAMES]


class Mine(TorchDataset[Any]):
    """A data set of the user's own class, with the user's own transform."""

    labels = np.arange(240) % 3

    def __len__(self) -> int:
        return 240

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        image = picture(row % 3, np.random.default_rng(row)).resize((12, 12))
        if torch.rand(()) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1, row % 3


@pytest.mark.usefixtures("local_ray")
def test_a_data_set_of_an_own_class_travels_to_the_workers(tmp_path: Path) -> None:
    data = {"train": Mine(), "val": Mine(), "test": Mine()}
    result = search(network(), data, run_dir=tmp_path / "run", class_names=NAMES, **SMALL)
    assert result.best.test_accuracy > 0.9
    assert result.figures["interface"] == {"class_names": list(NAMES)}
    with pytest.raises(ValueError, match="does not say how images become its input"):
        load_classifier(tmp_path / "run" / "network.json", network)


def test_inputs_without_labels_make_a_task_of_comparison() -> None:
    task = task_of(torch.randn(20, 3, 12, 12))
    assert isinstance(task, FunctionTask)
    assert task.images is not None
    [batch] = task.images()
    assert batch.shape == (20, 3, 12, 12)
    assert task.inputs()[0].shape == (1, 3, 12, 12)
    assert task_of(task) is task
    with pytest.raises(ValueError, match="splits divide a data set"):
        task_of(task, splits=object())  # type: ignore[arg-type]
