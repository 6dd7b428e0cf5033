"""The Tune job on a few hundred of the real CIFAR-10 images, and what it refuses."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from fppmo_ray import Placement, Recipe, SearchSettings, load_network

REPOSITORY = Path(__file__).resolve().parents[2]
SETTINGS = SearchSettings(
    macs_cut=0.57,
    proposals=2,
    population=2,
    score_steps=2,
    recalibrate_images=64,
    score_images=32,
    recipe=Recipe(epochs=0, batch_size=32),
)
RUNGS = (0, 1, 2)

pytestmark = pytest.mark.filterwarnings("ignore:channel groups left whole")  # option-A shortcuts


@pytest.fixture(scope="module")
def job() -> ModuleType:
    path = REPOSITORY / "jobs/tune_cifar10.py"
    specification = importlib.util.spec_from_file_location("tune_cifar10", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def flags(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """400 training and 100 test images of the real files, and a trained ResNet-20."""
    folder = tmp_path_factory.mktemp("cifar10")
    rows = pq.read_table(shared_data / "cifar10-jpeg" / "test-00000-of-00001.parquet")
    pq.write_table(rows.slice(0, 400), folder / "train-00000-of-00001.parquet")
    pq.write_table(rows.slice(400, 100), folder / "test-00000-of-00001.parquet")
    return {
        "data": folder,
        "weights": shared_data / "pretrained" / "resnet20-cifar10jpeg-rows0-44999.pt",
        "network": "resnet20",
        "rungs": RUNGS,
        "placement": Placement(workers=1),
    }


@pytest.mark.usefixtures("local_ray")
def test_the_job_ends_with_the_best_trials_network_and_resumes_to_it(
    job: ModuleType, flags: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    job.main(settings=SETTINGS, run_dir=run_dir, **flags)
    network = load_network(run_dir / "network.json")
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sum(parameter.numel() for parameter in network.parameters()) < 200_000
    assert "best trials, on search-val" in capsys.readouterr().out

    with pytest.raises(ValueError, match="already holds an experiment; go on with it by --resume"):
        job.main(settings=SETTINGS, run_dir=run_dir, **flags)
    with pytest.raises(ValueError, match="holds another search: it differs in settings"):
        job.main(settings=replace(SETTINGS, seed=1), run_dir=run_dir, resume=True, **flags)
    weights = (run_dir / "network.pt").read_bytes()
    job.main(settings=SETTINGS, run_dir=run_dir, resume=True, **flags)
    assert (run_dir / "network.pt").read_bytes() == weights


def test_resuming_nothing_is_refused(
    job: ModuleType, flags: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"--resume: .* holds no experiment; start it without"):
        job.main(settings=SETTINGS, run_dir=tmp_path / "run", resume=True, **flags)
