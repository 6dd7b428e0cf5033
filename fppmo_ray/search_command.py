"""``fppmo-ray search``: a search for one's own network and images, from the command line."""

from __future__ import annotations

from pathlib import Path

from fppmo_ray.job import resume_mode, show_result
from fppmo_ray.own_network import load_function, open_data, open_network
from fppmo_ray.service.resources import Resources
from fppmo_ray.service.search import run_search
from fppmo_ray.service.settings import SearchSettings
from fppmo_ray.training import Transform
from fppmo_ray.training.named_datasets import DatasetName


def search(
    network: str,
    data: str,
    run_dir: str,
    resources: Resources,
    settings: SearchSettings,
    transform: Transform = Transform(),  # noqa: B008 (frozen)
    *,
    weights: Path | None = None,
    dataset: DatasetName = "image_folder",
    class_names: tuple[str, ...] = (),
    latency: str | None = None,
    resume: bool = False,
) -> None:
    """Search for the filters to remove from a trained network, and fine-tune what is left.

    Args:
        network: MODULE:FUNCTION, a function without arguments that constructs the network; or
            the name of a network of torchvision (resnet50), timm (timm:resnet50) or this
            package.
        data: Folder of the data set: train/<class>/* and test/<class>/* or val/<class>/*; or a
            folder or URI (s3://BUCKET/PATH) of parquet files with images, as on the Hugging Face
            hub.
        run_dir: Folder for the journal, the checkpoints, the network and the figures, or a URI
            such as s3://BUCKET/PATH.
        resources: The workers.
        settings: What to search for.
        transform: How images become the network's input.
        weights: File of the network's weights. Default: those that the function gives it.
        dataset: The kind of data set in the folder.
        class_names: Class names in the order of the network's outputs. Default: sorted.
        latency: MODULE:FUNCTION, (network) -> milliseconds: the clock of --latency-cut, on a phone,
            say. Default: a worker measures its own latency.
        resume: There must be a search in the run directory to resume. Without it, a search that is
            there is resumed, and else one begins.
    """
    resuming = resume_mode(run_dir, resume=resume, resume_or_start=True)
    found = open_data(dataset, data, transform, class_names, seed=settings.seed)
    opened = found.dataset
    dense, source = open_network(network, weights, opened.num_classes, seed=settings.seed)
    run_search(
        dense,
        opened,
        settings,
        run_dir=run_dir,
        latency=None if latency is None else load_function(latency),
        resources=resources,
        splits=found.splits,
        resume=resuming,
        source=source,
    )
    show_result(run_dir)
