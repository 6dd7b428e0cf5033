"""The denoising job, which prunes by functions of its own, on scikit-learn's digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from denoise import DnCNN, main

from fppmo_ray import Resources, SearchSettings
from fppmo_ray.service.result import SearchResult


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    "changes",
    [{"proposals": 4}, {"proposals": 0, "importance": "obs", "start": "allocation", "refit": True}],
    ids=["scored", "without scores"],
)
def test_a_denoiser_keeps_its_psnr_above_that_of_the_noisy_images(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    settings = SearchSettings(macs_cut=0.5).changed(population=4, rescore_seeds=1, **changes)
    weights, run_dir = tmp_path / "dncnn.pt", tmp_path / "run"
    main(
        *(run_dir, weights, settings, Resources(workers=1)),
        dataset="digits",
        width=12,
        depth=4,
        steps=150,
    )
    result = SearchResult(run_dir, DnCNN(1, 12, 4))
    assert result.best.macs_cut >= 0.5
    assert result.best.test_score > 20.17  # -20 log10(25 / 255): that of the noise itself
    assert torch.load(weights, weights_only=True).keys() == result.dense.state_dict().keys()
