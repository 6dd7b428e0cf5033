"""The demo: train a small CNN on scikit-learn's digits and prune it, in under three minutes."""

from __future__ import annotations

from datetime import datetime

from fppmo_ray.job import resume_mode, show_result


def demo(
    run_dir: str | None = None,
    *,
    resume: bool = False,
    resume_or_start: bool = False,
    proposals: int = 96,
    workers: int = 2,
    seed: int = 0,
) -> None:
    """Train a CNN on real 8 x 8 digits, remove 65 % of its MACs, and fine-tune it.

    Args:
        run_dir: The run directory, a folder or a URI such as ``s3://BUCKET/PATH``. Default: a new
            folder under ``runs/``.
        resume: Resume the search in ``run_dir``, which must exist.
        resume_or_start: Resume the search in ``run_dir`` if there is one, else start it.
        proposals: Number of masks to score.
        workers: Number of scoring workers, of one CPU each.
        seed: Random seed of the whole search, >= 0.
    """
    # Imported late, because the command line must start quickly without Ray and torch.
    from fppmo_ray.service.resources import Resources
    from fppmo_ray.service.search import search
    from fppmo_ray.service.setting_groups import Baseline, Numerics, Scoring
    from fppmo_ray.training import Recipe, load_dataset, stratified_splits
    from fppmo_ray.training.networks import build_network, source_of

    run_dir = run_dir or f"runs/digits-{datetime.now():%Y%m%d-%H%M%S}"
    resuming = resume_mode(run_dir, resume=resume, resume_or_start=resume_or_start)
    dataset = load_dataset("digits")
    search(
        build_network("digits_cnn", 10, seed=seed),
        dataset,
        run_dir=run_dir,
        macs_cut=0.65,
        proposals=proposals,
        seed=seed,
        scoring=Scoring(score_steps=10, score_recalibrate_images=500, score_images=500),
        fine_tune=Recipe(epochs=12, batch_size=64),
        baseline=Baseline(baseline_epochs=12),
        numerics=Numerics(dtype="float32"),  # the same figures on every machine
        # Large held-out shares: the usual tenth of 1,437 images is too small to rank masks.
        splits=stratified_splits(dataset.train.labels, search_val=0.25, choose_val=0.15, seed=seed),
        resources=Resources(workers=workers),
        resume=resuming,
        source=source_of("digits_cnn", 10),
    )
    show_result(run_dir)
