from __future__ import annotations

import doctest
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

import fppmo_ray
import fppmo_ray.distribution
from fppmo_ray import SearchSettings
from fppmo_ray.pruning import trace
from fppmo_ray.service.image_task import image_classification
from fppmo_ray.service.problem import build_problem
from fppmo_ray.training import build_network

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [README, (ROOT / "fppmo_ray" / "README.md").read_text()]
EXAMPLES = [
    text for page in PAGES for text in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
]


def test_the_readme_can_be_read_in_ten_minutes() -> None:
    assert len(README.split()) <= 2500


def test_the_example_of_the_readme_prunes_its_network(
    ray_here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = next(text for text in EXAMPLES if "result = " in text)
    assert len(example.strip().splitlines()) <= 16
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(example, names)
    smaller, network = names["smaller"], names["network"]
    assert isinstance(smaller, nn.Sequential)
    assert isinstance(network, nn.Sequential)
    widths = [layer.out_channels for layer in smaller if isinstance(layer, nn.Conv2d)]
    assert widths == list(names["result"].best.widths.values())  # type: ignore[attr-defined]
    assert names["result"].best.macs_cut >= 0.5  # type: ignore[attr-defined]
    assert names["result"].best.test_accuracy > 0.7  # type: ignore[attr-defined]


def test_the_lines_about_resnet50_make_a_problem_that_can_be_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [example] = [text for text in EXAMPLES if "resnet50" in text]
    assert len(example.strip().splitlines()) <= 15
    monkeypatch.chdir(tmp_path)
    small = partial(torchvision.models.resnet18, num_classes=2)  # as it takes seconds, not minutes
    monkeypatch.setattr(torchvision.models, "resnet50", small)
    torch.save(small().state_dict(), "resnet50.pth")
    for part in ("train", "val"):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / "imagenet" / part / name).mkdir(parents=True)
            for number in range(20):
                image = Image.new("RGB", (40, 30), (label * 200, number * 10, 0))
                image.save(tmp_path / "imagenet" / part / name / f"{number}.jpg")
    asked: list[dict[str, Any]] = []

    class Result:
        def network(self) -> str:
            return "smaller"

    def search(network: nn.Module, data: Any, *, run_dir: str, **given: Any) -> Result:
        asked.append({"network": network, "data": data, **given})
        return Result()

    monkeypatch.setattr(fppmo_ray, "search", search, raising=False)
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["smaller"] == "smaller"
    [given] = asked
    network, task, gpus = (
        given.pop("network"),
        image_classification(given.pop("data")),
        given.pop("resources"),
    )
    problem = build_problem(network, task, SearchSettings(**given), resources=gpus)
    space = problem.tracing.space
    assert {group.multiple for group in space.groups} == {8}
    assert space.dense_macs == 1_814_073_344 - 998 * 512  # ResNet-18's, but for the classes


def test_the_example_of_asking_and_telling_is_that_of_the_distribution() -> None:
    [example] = [text for text in EXAMPLES if "MaskOptimizer" in text]
    shown = [line.partition("  #")[0] for line in example.splitlines() if line.strip()]
    documented = doctest.DocTestParser().get_examples(fppmo_ray.distribution.__doc__ or "")
    assert shown == "".join(step.source for step in documented).splitlines()


def test_the_lines_about_ray_tune_name_public_functions() -> None:
    [example] = [text for text in EXAMPLES if "FPPMOSearch" in text]
    imports = example.partition("problem = ")[0]
    exec(imports, names := {})
    assert {"FPPMOSearch", "build_problem", "image_classification", "prune_trainable"} <= set(names)


def test_the_lines_about_pruning_without_training_halve_a_network() -> None:
    [example] = [text for text in EXAMPLES if "import prune" in text]
    names: dict[str, Any] = {
        "network": build_network("digits_cnn", 10, seed=0),
        "images": torch.randn(100, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
    }
    exec(example, names)
    dense = trace(names["network"], names["images"][:1]).space.dense_macs
    assert trace(names["smaller"], names["images"][:1]).space.dense_macs <= dense / 2


class Small(nn.Module):
    """A network whose last layer is called ``fc``, as a torchvision ResNet's is."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 32, 3, padding=1)
        self.fc = nn.Linear(32, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.second(torch.relu(self.first(images))))
        answers: torch.Tensor = self.fc(features.mean((2, 3)))
        return answers


@pytest.mark.parametrize("tool", ["From Torch-Pruning", "From NNCF"])
def test_the_same_task_in_another_tool_and_here_leaves_fewer_macs(tool: str) -> None:
    page = (ROOT / "fppmo_ray" / "COMING_FROM.md").read_text()
    section = page.partition(f"## {tool}\n")[2].partition("\n## ")[0]
    there, here = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    images = torch.randn(60, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    network, trained = Small().eval(), []
    names: dict[str, Any] = {
        "network": network,
        "example_inputs": images[:1],
        "images": images,
        "epochs": 2,
        "train_epoch": trained.append,
    }
    dense = trace(network, images[:1]).space.dense_macs
    exec(here, names)
    smaller = trace(names["smaller"], images[:1]).space.dense_macs
    assert 0.4 * dense < smaller <= dense / 2
    assert trace(network, images[:1]).space.dense_macs == dense
    if tool == "From NNCF":  # whose pruning of PyTorch networks is gone
        assert trained == [names["smaller"]] * 2
        return
    exec(there, names)
    assert trace(network, images[:1]).space.dense_macs < dense


def test_a_training_loop_of_ones_own_ends_in_class_names_of_an_onnx_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torchvision import transforms

    example = next(text for text in EXAMPLES if "transform_of(transform)" in text)
    [alone] = [text for text in EXAMPLES if "InferenceSession" in text]
    pytest.importorskip("onnxscript", reason="the extra export is not installed")
    monkeypatch.chdir(tmp_path)
    shades = {"cat": (200, 90, 40), "dog": (40, 90, 200)}
    rng, pictures = np.random.default_rng(0), []
    for number in range(60):
        noisy = rng.normal(list(shades.values())[number % 2], 40, (40, 50, 3)).clip(0, 255)
        pictures.append(Image.fromarray(noisy.astype(np.uint8)))
    pictures[0].save("cat.jpg")
    steps = transforms.Resize(16), transforms.CenterCrop(12), transforms.ToTensor()
    transform = transforms.Compose([*steps, transforms.Normalize([0.5] * 3, [0.25] * 3)])
    images, labels = torch.stack(list(map(transform, pictures))), torch.arange(60) % 2

    def train(network: nn.Module) -> None:
        network.train()
        optimizer = torch.optim.SGD(network.parameters(), 0.05)
        for _ in range(30):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()

    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)),
    )
    train(network)
    names = {"network": network, "images": images, "train": train, "transform": transform}
    exec(example, names)
    classify = fppmo_ray.load_classifier("mine.onnx")
    assert [classify(picture) for picture in pictures[:4]] == ["cat", "dog", "cat", "dog"]
    assert names["smaller"][0].out_channels < 16
    exact = torch.softmax(names["smaller"].eval()(images[:1]), dim=1)[0].tolist()
    assert list(classify.probabilities(pictures[0]).values()) == pytest.approx(exact, abs=1e-4)
    fresh = [sys.executable, "-W", "ignore", "-c", alone]
    assert subprocess.run(fresh, capture_output=True, text=True, check=True).stdout == "cat\n"
    pictures[1].save("cat.jpg")
    exec(alone, {})
    assert capsys.readouterr().out == "dog\n"
