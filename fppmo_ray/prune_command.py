"""``fppmo-ray prune``: a smaller network by a few images, from the command line, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from fppmo_ray.own_network import open_data, open_network
from fppmo_ray.pruning import save_network
from fppmo_ray.pruning.importance import Ordering
from fppmo_ray.pruning.one_call import prune_with_report
from fppmo_ray.training import Transform, evaluate, open_images
from fppmo_ray.training.named_datasets import DatasetName
from fppmo_ray.training.preprocessing import interface_of

_BATCH = 250


def prune(
    network: str,
    data: str,
    *,
    output: Path,
    weights: Path | None = None,
    macs_cut: float = 0.5,
    images: int = 1000,
    dataset: DatasetName = "image_folder",
    class_names: tuple[str, ...] = (),
    transform: Transform = Transform(),  # noqa: B008 (frozen)
    importance: Ordering = "obs",
    refit: bool = True,
    distill_steps: int = 0,
    min_keep: float = 0.1,
    width_multiple: int | Literal["wide"] = 1,
    ignore: tuple[str, ...] = (),
    seed: int = 0,
) -> None:
    """Prune a trained network by a few images, without labels, without Ray, in a minute.

    The smaller network is written as OUTPUT.pt and OUTPUT.json.

    Args:
        network: MODULE:FUNCTION, a function without arguments that constructs the network; or the
            name of a network of torchvision (resnet50), timm (timm:resnet50) or this package.
        data: Folder of the data set: train/<class>/* and test/<class>/* or val/<class>/*; or a
            folder or URI (s3://BUCKET/PATH) of parquet files with images, as on the Hugging Face
            hub.
        output: File name of the smaller network, without a suffix.
        weights: File of the network's weights. Default: those that the function gives it.
        macs_cut: Share of the multiply-accumulates to remove, in (0, 1).
        images: Number of training images to calibrate on. They must fit in memory.
        dataset: The kind of data set in the folder.
        class_names: Class names in the order of the network's outputs. Default: sorted.
        transform: How images become the network's input.
        importance: Criterion of filter importance. obs also finds the widths.
        refit: Whether the layers behind removed filters are refitted by least squares.
        distill_steps: Steps in which the smaller network learns, without labels, to answer as the
            dense one.
        min_keep: Smallest share of a group's filters that is kept, in (0, 1].
        width_multiple: Widths are multiples of this number. wide suits GPUs: multiples of 8 in
            layers of at least 64 filters, any width in narrower ones.
        ignore: Names of layers, or of modules that contain layers, that keep all filters.
        seed: Random seed of the choice of images, >= 0.
    """
    opened = open_data(dataset, data, transform, class_names, seed=seed).dataset
    dense, source = open_network(network, weights, opened.num_classes, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(opened.train), generator=generator)[:images].sort().values.numpy()
    few = torch.cat([batch for batch, _ in open_images(opened.train, rows, opened).batches(_BATCH)])
    report = prune_with_report(
        dense.eval(),
        few[:1],
        few,
        macs_cut=macs_cut,
        importance=importance,
        refit=refit,
        distill_steps=distill_steps,
        min_keep=min_keep,
        width_multiple=width_multiple,
        ignore=ignore,
    )
    test = open_images(opened.test, None, opened)
    for name, found in (("dense", dense), ("pruned", report.network)):
        figures = evaluate(found, test.batches(_BATCH))
        print(f"{name}: {100 * figures.accuracy:.2f} % of {len(opened.test)} test images")
    path = save_network(
        report.network,
        output,
        tracing=report.tracing,
        keep=report.keep,
        source=source,
        interface=interface_of(opened),
    )
    print(
        f"removed {100 * report.macs_cut:.1f} % of the MACs and {100 * report.params_cut:.1f} % of "
        f"the parameters by {report.num_images} images: {path}"
    )
