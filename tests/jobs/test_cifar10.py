"""The CIFAR-10 job on a few hundred of the real images, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cifar10 as job
import numpy as np
import pytest
import torch

from fppmo_ray import (
    Calibration,
    Recipe,
    Resources,
    Sampler,
    Scoring,
    SearchSettings,
    load_network,
)
from fppmo_ray.service.journal.artifacts import read_history
from fppmo_ray.service.journal.facts import ComputeChosen
from fppmo_ray.service.journal.run_directory import read_journal
from fppmo_ray.training import native_dtype

REPOSITORY = Path(__file__).resolve().parents[2]
SETTINGS = SearchSettings(
    macs_cut=0.57,
    proposals=4,
    fine_tune=Recipe(epochs=1, batch_size=64),
    sampler=Sampler(population=4),
    scoring=Scoring(
        score_steps=1,
        recalibrate_images=64,
        score_recalibrate_images=64,
        score_images=32,
        rescore_seeds=1,
        score_reconstruct_images=8,
    ),
    calibration=Calibration(calibration_images=32),
)


@pytest.mark.filterwarnings("ignore:channel groups left whole")  # option-A shortcuts
@pytest.mark.usefixtures("ray_here")
def test_the_job_ends_with_a_network_of_less_than_half_the_macs(
    few_images: Path, weights: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job.main(few_images, run_dir, SETTINGS, Resources(), network="resnet20", weights=weights)
    history = read_history(run_dir)
    assert history["val_accuracy"].notna().all()
    assert (history["macs"] <= 0.43 * 40_551_040).all()  # ResNet-20, option A
    [chosen] = [fact for fact in read_journal(run_dir) if isinstance(fact, ComputeChosen)]
    assert chosen.compute["dtype"] == native_dtype(torch.device("cpu"))
    assert chosen.trials == []
    network = load_network(run_dir / "network.json")
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sum(parameter.numel() for parameter in network.parameters()) < 200_000  # of 270,000


def test_an_untrained_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give --weights or --baseline-epochs"):
        job.main(tmp_path, tmp_path / "run", SETTINGS, Resources())


def test_an_unfit_run_directory_is_refused_before_the_data_is_read(tmp_path: Path) -> None:
    no_data = tmp_path / "no data"
    with pytest.raises(ValueError, match=r"--resume: .* holds no journal"):
        job.main(no_data, str(tmp_path / "run"), SETTINGS, Resources(), resume=True)
    with pytest.raises(ValueError, match=r"cannot be used: .*Unrecognized filesystem"):
        job.main(no_data, "nowhere://bucket/run", SETTINGS, Resources())


def test_another_networks_checkpoint_is_refused(
    few_images: Path, weights: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="holds the weights of another network"):
        job.main(few_images, tmp_path / "run", SETTINGS, Resources(), weights=weights)


def test_overlapping_rows_are_refused(few_images: Path, weights: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "search_val.npy", tmp_path / "choose_val.npy"
    np.save(first, np.arange(0, 50))
    np.save(second, np.arange(49, 90))
    with pytest.raises(ValueError, match=r"splits must be disjoint, got 1 rows in both"):
        job.main(
            few_images,
            tmp_path / "run",
            SETTINGS,
            Resources(),
            network="resnet20",
            weights=weights,
            search_val_rows=first,
            choose_val_rows=second,
        )


def test_a_truncated_data_file_ends_the_job_with_a_sentence(
    few_images: Path, weights: Path, tmp_path: Path
) -> None:
    for file in few_images.iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[: len(content) // 2])
    flags = ["--data", tmp_path, "--run-dir", tmp_path / "run", "--network", "resnet20"]
    done = subprocess.run(
        [sys.executable, "jobs/cifar10.py", *flags, "--weights", weights, "--macs-cut", "0.57"],
        cwd=REPOSITORY,
        env=os.environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "train-00000-of-00001.parquet" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
