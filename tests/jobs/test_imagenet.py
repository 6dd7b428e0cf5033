"""The ImageNet job on a miniature of it, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import imagenet as job
import pytest
import torch

from fppmo_ray import Recipe, Resources, SearchSettings, Transform, load_network
from fppmo_ray.training import build_torchvision_network

SIZES = {
    "transform": Transform(image_size=32, resize=36),
    "search_val": 40,
    "choose_val": 40,
}


@pytest.fixture(scope="module")
def settings() -> SearchSettings:
    """The job's own, with next to no work."""
    return job.SETTINGS.changed(
        proposals=4,
        population=2,
        dtype="float32",
        recalibrate_images=40,
        score_recalibrate_images=40,
        score_images=40,
        rescore_images=40,
        rescore_seeds=1,
        fine_tune=Recipe(epochs=1, batch_size=40, learning_rate=0.01),
    )


@pytest.fixture(scope="module")
def squeezenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a small network that was never trained: only where they come from matters."""
    path = tmp_path_factory.mktemp("weights") / "squeezenet.pth"
    torch.save(build_torchvision_network("squeezenet1_1", 20).state_dict(), path)
    return path


@pytest.mark.usefixtures("ray_here")
def test_the_job_halves_a_network_and_tells_top_1_and_top_5(
    settings: SearchSettings,
    squeezenet: Path,
    image_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = tmp_path / "run"
    job.main(
        *(image_folder, run_dir, Resources(workers=1), settings),
        network="squeezenet1_1",
        weights=squeezenet,
        **SIZES,
    )
    dense, *others = json.loads((run_dir / "result.json").read_text())["variants"]
    assert [row["macs"] <= 0.5 * dense["macs"] for row in others] == [True] * 3
    for row in (dense, *others):
        test = row["after"]["test"]
        assert 0 <= test["accuracy"] <= test["top5_accuracy"] <= 1
    assert "top-1 / top-5" in capsys.readouterr().out
    network = load_network(run_dir / "network.json")
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 20)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"network": "resnet51"}, "no classification network 'resnet51'; near it: .*resnet50"),
        ({"network": "googlenet"}, "googlenet trains with auxiliary outputs"),
        ({"network": "resnet34"}, "holds the weights of another network than ResNet"),
        ({"weights": None}, "give --weights or --baseline-epochs"),
        ({"search_val": 390, "choose_val": 20}, "leave none for search-train"),
        (
            {"transform": Transform(image_size=32, resize=31)},
            "at least the 32 pixels of the centre crop, got 31",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_ray_is_asked(
    settings: SearchSettings,
    squeezenet: Path,
    image_folder: Path,
    tmp_path: Path,
    changes: dict[str, object],
    complaint: str,
) -> None:
    flags = {"network": "squeezenet1_1", "weights": squeezenet, **SIZES, **changes}
    with pytest.raises(ValueError, match=complaint):
        job.main(image_folder, tmp_path / "run", Resources(workers=1), settings, **flags)
    assert not (tmp_path / "run").exists()
