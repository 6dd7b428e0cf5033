"""Prune one of torchvision's networks on ImageNet, or on any folder of images like it.

    python jobs/imagenet.py --data DIR --network resnet101 --weights FILE --macs-cut 0.5 \
        --workers 8 --gpus-per-worker 1 --cpus-per-worker 8 --fine-tune-workers 8 --run-dir RUN
    fppmo-ray submit jobs/imagenet.py ... --resume-or-start --run-dir s3://BUCKET/PATH \
        --address http://HEAD:8265

The files stay where they are, on a disk that every node sees at the same path, and are decoded
when they are needed: --cpus-per-worker says how many threads do so. Public weights have seen all
training images, so scores on those held out from fine-tuning flatter; the val folder is read once,
at the end.
"""

from __future__ import annotations

from pathlib import Path

from fppmo_ray import Recipe, Resources, Sampler, Scoring, SearchSettings, Transform, run_search
from fppmo_ray.job import resume_mode, run_job, show_result
from fppmo_ray.training import (
    build_torchvision_network,
    load_imagenet,
    load_weights,
    stratified_splits,
    torchvision_source,
)

# Fine-tuning at a fifth of torchvision's rate of training, with its batch and weight decay. A
# teacher's passes would cost half as much again, and nobody has measured here what they are worth.
RECIPE = Recipe(
    epochs=60, batch_size=256, learning_rate=0.02, weight_decay=1e-4, distillation_weight=0.0
)
SETTINGS = SearchSettings(
    macs_cut=0.5,
    fine_tune=RECIPE,
    sampler=Sampler(rule="widths"),
    scoring=Scoring(
        score_images=1500,
        recalibrate_images=2500,
        score_recalibrate_images=500,
        rescore_images=5000,
    ),
)
"""Where they differ from the defaults, for a thousand classes."""


def main(
    data: Path,
    run_dir: str,
    resources: Resources,
    settings: SearchSettings = SETTINGS,
    transform: Transform = Transform(),  # noqa: B008 (frozen)
    *,
    network: str = "resnet50",
    weights: Path | None = None,
    search_val: int = 10_000,
    choose_val: int = 10_000,
    resume: bool = False,
    resume_or_start: bool = False,
) -> None:
    """Search widths, choose, fine-tune, report top-1 and top-5.

    Args:
        data: Folder with train/<class>/* and val/<class>/*, the same on every node.
        run_dir: Folder for journal, checkpoints, network and figures, or a URI such as
            s3://BUCKET/PATH.
        resources: Where it runs.
        settings: What to search for.
        transform: How images become the network's input.
        network: Which of torchvision's classification networks to prune.
        weights: Its trained weights; without, give --baseline-epochs.
        search_val: Training images that score proposals instead of training networks.
        choose_val: Further ones, for the choice among the finalists.
        resume: Go on with the search in the run directory.
        resume_or_start: The same, but begin it where there is none yet.
    """
    resuming = resume_mode(run_dir, resume=resume, resume_or_start=resume_or_start)
    if weights is None and not settings.baseline.baseline_epochs:
        raise ValueError("an untrained network tells nothing: give --weights or --baseline-epochs")
    dataset = load_imagenet(data, transform)
    dense = build_torchvision_network(network, dataset.num_classes, seed=settings.seed)
    if weights is not None:
        load_weights(dense, weights)
    run_search(
        dense,
        dataset,
        settings,
        run_dir=run_dir,
        splits=stratified_splits(
            dataset.train.labels,
            search_val=search_val,
            choose_val=choose_val,
            seed=settings.seed,
        ),
        resources=resources,
        resume=resuming,
        source=torchvision_source(network, dataset.num_classes),
    )
    show_result(run_dir)


if __name__ == "__main__":
    run_job(main)
