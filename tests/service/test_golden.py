"""The golden search: a refactor must reproduce it, a change of numbers must rewrite it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fppmo_ray import (
    Baseline,
    Calibration,
    Numerics,
    Recipe,
    Resources,
    Sampler,
    Scoring,
    SearchSettings,
    load_dataset,
    run_search,
)
from fppmo_ray.training import build_network

# Losses of three generations of 16 proposals, after one epoch of training: few enough steps for
# processors of different kinds to agree on the order of all scores.
GOLDEN_LOSSES = [
    *(1.7789, 1.5983, 1.7157, 1.5769, 1.5089, 1.6372, 1.6559, 1.6729),
    *(1.6649, 1.5893, 1.6648, 1.5972, 1.7444, 1.6239, 1.5826, 1.6400),
    *(1.6209, 1.6735, 1.6973, 1.6848, 1.7164, 1.5814, 1.6274, 1.6662),
    *(1.6381, 1.6927, 1.5489, 1.6965, 1.6466, 1.5522, 1.6151, 1.6040),
    *(1.6069, 1.5119, 1.7009, 1.5809, 1.5508, 1.5456, 1.5428, 1.5643),
    *(1.6419, 1.7464, 1.6702, 1.5779, 1.6651, 1.7341, 1.8066, 1.5473),
]
GOLDEN_BEST = "30d1b48bb0212e8fb1fefb8e8ffff5edffedff6bfffbef7f"


def test_a_search_from_equal_shares_scores_the_recorded_masks(ray_here: None, tmp_path: Path):
    settings = SearchSettings(
        macs_cut=0.6,
        proposals=48,
        fine_tune=Recipe(epochs=1, batch_size=64),
        baseline=Baseline(baseline_epochs=1),
        sampler=Sampler(start="uniform", importance="fpgm"),
        calibration=Calibration(refit=False),
        scoring=Scoring(score_by="labels", score_recalibrate_images=500, score_images=300),
        numerics=Numerics(dtype="float32"),
    )
    network, dataset = build_network("digits_cnn", 10, seed=0), load_dataset("digits")
    resources = Resources(workers=1)
    result = run_search(network, dataset, settings, run_dir=tmp_path / "run", resources=resources)
    losses = result.history["val_loss"].tolist()
    assert losses == pytest.approx(GOLDEN_LOSSES, rel=1e-4)
    assert np.packbits(result.best.keep).tobytes().hex() == GOLDEN_BEST
