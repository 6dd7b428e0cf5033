"""The demo: train a small CNN on scikit-learn's digits and prune it, in under three minutes."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from fppmo_ray.job import resume_mode, show_result

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fppmo_ray.training import Dataset, Splits

_MACS_CUT = 0.85
_EPOCHS = 12


def demo(
    run_dir: str | None = None,
    *,
    resume: bool = False,
    resume_or_start: bool = False,
    proposals: int = 96,
    workers: int = 2,
    seed: int = 0,
) -> None:
    """Train a CNN on real 8 x 8 digits and remove 85 % of its MACs.

    A search with fine-tuning leaves a run directory and its table. Before it, one call without
    labels, training or Ray makes a network as small, beside the usual way of choosing filters.

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
    from fppmo_ray.service.setting_groups import Baseline, Numerics
    from fppmo_ray.training import Recipe, load_dataset, stratified_splits
    from fppmo_ray.training.networks import build_network, source_of

    run_dir = run_dir or f"runs/digits-{datetime.now():%Y%m%d-%H%M%S}"
    resuming = resume_mode(run_dir, resume=resume, resume_or_start=resume_or_start)
    dataset = load_dataset("digits")
    # Large held-out shares: the usual tenth of 1,437 images is too small to rank masks.
    splits = stratified_splits(dataset.train.labels, search_val=0.25, choose_val=0.15, seed=seed)
    lines = [] if resume else _pruned_in_one_call(dataset, splits, seed)
    search(
        build_network("digits_cnn", 10, seed=seed),
        dataset,
        run_dir=run_dir,
        macs_cut=_MACS_CUT,
        proposals=proposals,
        seed=seed,
        fine_tune=Recipe(epochs=_EPOCHS, batch_size=64, learning_rate=0.05),
        baseline=Baseline(baseline_epochs=_EPOCHS),
        numerics=Numerics(dtype="float32"),  # the same figures on every machine
        splits=splits,
        resources=Resources(workers=workers),
        resume=resuming,
        source=source_of("digits_cnn", 10),
    )
    show_result(run_dir)
    for line in lines:
        print(line)


def _pruned_in_one_call(dataset: Dataset, splits: Splits, seed: int) -> list[str]:
    """Prune a trained network by ``prune`` and by L1 norms, and say what the test images show.

    Args:
        dataset: The digits.
        splits: Which of them the network may train on.
        seed: Random seed of network and training.
    """
    import torch

    from fppmo_ray.pruning.one_call import prune
    from fppmo_ray.training import Recipe, open_images, train_epoch
    from fppmo_ray.training.networks import build_network

    network, state = build_network("digits_cnn", 10, seed=seed), None
    train = open_images(dataset.train, splits.search_train, dataset)
    recipe = Recipe(epochs=_EPOCHS, batch_size=64, learning_rate=0.1, distillation_weight=0.0)
    for epoch in range(_EPOCHS):
        state, _ = train_epoch(network, train, recipe, epoch=epoch, seed=seed, state=state)
    network.eval()
    images = torch.cat([batch[0] for batch in train.batches(500)])  # without their labels
    pruned = prune(network, images[:1], images, macs_cut=_MACS_CUT)
    plain = prune(network, images[:1], images, macs_cut=_MACS_CUT, importance="l1", refit=False)
    right, right_plain, right_dense = (_right(each, dataset) for each in (pruned, plain, network))
    gain = 100 * (right - right_plain)
    half = 1.96 * float(gain.std()) / len(gain) ** 0.5
    mean = float(gain.mean())
    return [
        f"without labels, training or search, {_MACS_CUT:.0%} of the MACs gone, on "
        f"{len(right)} test images (dense: {100 * float(right_dense.mean()):.1f} %):",
        f"  uniform L1, batch norms recalibrated  {100 * float(right_plain.mean()):.1f} %",
        f"  fppmo_ray.prune                       {100 * float(right.mean()):.1f} %  "
        f"({mean:+.1f} points, 95 % interval {mean - half:+.1f} to {mean + half:+.1f})",
    ]


def _right(network: nn.Module, dataset: Dataset) -> Tensor:
    """Return 1 for every test image that a network classifies correctly, else 0."""
    import torch

    from fppmo_ray.training import open_images

    test = open_images(dataset.test, None, dataset)
    with torch.no_grad():
        found = [network(inputs).argmax(1) == labels for inputs, labels in test.batches(500)]
    return torch.cat(found).float()
