"""Prune a CIFAR-10 network by feedback.

python jobs/cifar10.py --data DIR --network resnet56 --weights FILE --macs-cut 0.57 \
        --run-dir runs/resnet56
fppmo-ray submit jobs/cifar10.py ... --run-dir s3://BUCKET/PATH --address http://HEAD:8265
"""

from __future__ import annotations

from pathlib import Path

from fppmo_ray import (
    Dataset,
    Resources,
    SearchSettings,
    Splits,
    Transform,
    load_dataset,
    run_search,
)
from fppmo_ray.job import resume_mode, run_job, show_result
from fppmo_ray.training import build_network, load_weights, source_of, splits_from_files


def main(
    data: Path,
    run_dir: str,
    settings: SearchSettings,
    resources: Resources,
    transform: Transform = Transform(),  # noqa: B008 (frozen)
    *,
    network: str = "resnet56",
    weights: Path | None = None,
    search_val_rows: Path | None = None,
    choose_val_rows: Path | None = None,
    resume: bool = False,
    resume_or_start: bool = False,
) -> None:
    """Search, choose, fine-tune, report.

    Args:
        data: Folder with CIFAR-10 as parquet files or in torchvision's layout.
        run_dir: Folder for journal, checkpoints, network and figures, or a URI such as
            s3://BUCKET/PATH.
        settings: What to search for.
        resources: Where it runs.
        transform: How images become the network's input, by default as the public ResNets were
            trained.
        network: Which network to prune: resnet20, 32, 44, 56 or 110 (``_b``: projection shortcuts),
            or vgg16_bn.
        weights: Its trained weights; without, give --baseline-epochs.
        search_val_rows: .npy file of training rows that the weights have never seen; by default
            10 % of every class.
        choose_val_rows: .npy file of further such rows, for the choice among the finalists; by
            default 40 % of the search-val rows.
        resume: Go on with the search in the run directory.
        resume_or_start: The same, but begin it where there is none yet.
    """
    resuming = resume_mode(run_dir, resume=resume, resume_or_start=resume_or_start)
    if weights is None and not settings.baseline.baseline_epochs:
        raise ValueError("an untrained network tells nothing: give --weights or --baseline-epochs")
    dataset = load_dataset("cifar10", data, transform)
    dense = build_network(network, dataset.num_classes, seed=settings.seed)
    if weights is not None:
        load_weights(dense, weights)
    run_search(
        dense,
        dataset,
        settings,
        run_dir=run_dir,
        splits=_splits(dataset, search_val_rows, choose_val_rows, settings.seed),
        resources=resources,
        resume=resuming,
        source=source_of(network, dataset.num_classes),
    )
    show_result(run_dir)


def _splits(
    dataset: Dataset, search_val: Path | None, choose_val: Path | None, seed: int
) -> Splits | None:
    if search_val is None:
        if choose_val is not None:
            raise ValueError("--choose-val-rows needs --search-val-rows beside it")
        return None
    return splits_from_files(
        dataset.train.labels, search_val=search_val, choose_val=choose_val, seed=seed
    )


if __name__ == "__main__":
    run_job(main)
