"""How good is a pruned network before any training, and what is each part of the method worth?

    python jobs/experiments/untrained.py --data DIR --weights resnet20.pt --network resnet20 \
        --held-out-rows search_val_rows.npy --output runs/untrained-resnet20.csv

Every method names the filters to keep; then the layers behind removed filters are refitted or not,
the batch norms are recalibrated, and the layers are reconstructed one after the other or not. All
methods get the same unlabelled images; a seed is a choice
of images. The test set is read once per row, for the row alone. The same command goes on where it
was stopped.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from archive import flattened, read_rows, unflattened, write_rows
from intervals import difference_to, spread
from rich.console import Console
from rich.table import Table
from torch import nn
from untrained_methods import BY_NAME_ONLY, METHODS, Study

from fppmo_ray import load_dataset
from fppmo_ray.distribution import Budget, IntArray
from fppmo_ray.distribution.allocation import GAMMAS
from fppmo_ray.job import run_job
from fppmo_ray.own_network import open_network
from fppmo_ray.pruning import Tracing, trace
from fppmo_ray.training import (
    ComputeConfig,
    Dataset,
    Images,
    evaluate,
    example_batch,
    fold_batchnorm,
    lay_out,
    open_images,
)

logger = logging.getLogger(__name__)

_BATCH = 50  # small batches stay in the cache of a CPU: they are twice as fast as those of 250
_REFERENCE = "l1"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One pruned network."""

    network: str
    macs_cut: float
    images: int
    """Unlabelled images that were used."""
    method: str
    seed: int
    """Which images were used."""
    accuracy: float
    """On the test set, in %."""
    divergence: float
    """From the dense network's answers on the images used: what chooses among gammas."""
    parameters: int
    seconds: float
    """From the loaded network to the pruned one on one core, tracing and scores included."""


def open_subject(
    data: Path, network: str, weights: Path, held_out_rows: Path | None
) -> tuple[Dataset, nn.Module, IntArray]:
    """Return CIFAR-10, the trained network in eval mode, and the training rows to choose from.

    Args:
        data: Folder with CIFAR-10 as parquet files or in torchvision's layout.
        network: Name of the network, or ``MODULE:FUNCTION``, as in ``open_network``.
        weights: The network's trained weights.
        held_out_rows: .npy file of training rows that are not used; None: all are.
    """
    dataset = load_dataset("cifar10", data)
    dense, _ = open_network(network, weights, dataset.num_classes)
    rows = np.arange(len(dataset.train))
    if held_out_rows is not None:
        rows = np.setdiff1d(rows, np.load(held_out_rows))
    return dataset, dense.eval(), rows


def choose_images(dataset: Dataset, rows: IntArray, count: int, seed: int) -> Images:
    """Return training images that a seed chooses.

    Args:
        dataset: The data set.
        rows: Training rows to choose from.
        count: Number of images.
        seed: Seed of the choice, >= 0.
    """
    chosen = np.sort(np.random.default_rng(seed).choice(rows, count, replace=False))
    return open_images(dataset.train, chosen, dataset)


def main(
    data: Path,
    weights: Path,
    *,
    output: Path,
    held_out_rows: Path | None = None,
    network: str = "resnet20",
    macs_cuts: tuple[float, ...] = (0.3, 0.57, 0.7, 0.8),
    images: tuple[int, ...] = (1000,),
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    methods: tuple[str, ...] = (),
    random_scores: int = 160,
    ignore: tuple[str, ...] = ("conv1",),
    min_keep: float = 0.1,
    threads: int = 1,
) -> None:
    """Prune without training by several methods; print and keep the table.

    Args:
        data: Folder with CIFAR-10 as parquet files or in torchvision's layout.
        weights: The network's trained weights.
        output: CSV file of all rows; rows that it holds already are not measured again.
        held_out_rows: .npy file of training rows that are not used.
        network: Which network is pruned, as in ``open_network``.
        macs_cuts: Shares of MACs to remove.
        images: Numbers of unlabelled images.
        seeds: Choices of images.
        methods: Some of those of ``METHODS`` and ``BY_NAME_ONLY``; by default all of the former.
        random_scores: Scores of ``random widths``; the mask that diverges least is taken.
        ignore: Layers that stay whole.
        min_keep: Smallest share of a group's filters that is kept.
        threads: Threads of torch.
    """
    torch.set_num_threads(threads)
    dataset, dense, rows = open_subject(data, network, weights, held_out_rows)
    test = open_images(dataset.test, None, dataset)
    began = time.perf_counter()
    tracing = trace(dense, example_batch(dataset), ignore=ignore)
    trace_seconds = time.perf_counter() - began
    known = read(output)
    if not any(row.network == network and row.method == "dense" for row in known):
        known.append(_dense_row(network, dense, tracing, test))
    done = {(row.network, row.macs_cut, row.images, row.method, row.seed) for row in known}
    space = tracing.space.with_limits(min_keep=min_keep)
    for count, seed in itertools.product(images, seeds):
        study = Study(
            dense=dense,
            tracing=tracing,
            images=choose_images(dataset, rows, count, seed),
            trace_seconds=trace_seconds,
            random_scores=random_scores,
            seed=seed,
        )
        for cut, method in itertools.product(macs_cuts, methods or METHODS):
            if (network, cut, count, method, seed) in done:
                continue
            pruned = study.prune(method, Budget.from_cut(space, cut))
            row = Row(
                network=network,
                macs_cut=cut,
                images=count,
                method=method,
                seed=seed,
                accuracy=accuracy_on(pruned.network, test),
                divergence=pruned.divergence,
                parameters=space.parameters(pruned.keep),
                seconds=round(pruned.seconds, 2),
            )
            logger.info("%s", row)
            known.append(row)
            output.parent.mkdir(parents=True, exist_ok=True)
            write_rows(output, [flattened(asdict(entry)) for entry in known])
    Console(width=140).print(*untrained_tables(known), sep="\n")


CHOSEN = "allocation, gamma chosen"
"""The row of the gamma whose network diverges least on the images, among the default ones."""


def untrained_tables(rows: Sequence[Row]) -> list[Table]:
    """A table for each network, cut and number of images."""
    cells = defaultdict(list)
    dense = {row.network: row.accuracy for row in rows if row.method == "dense"}
    for row in rows:
        if row.method != "dense":
            cells[row.network, row.macs_cut, row.images].append(row)
    return [
        _table(
            f"{network}, {cut:.0%} of MACs cut, {images} images, dense {dense[network]:.2f}", own
        )
        for (network, cut, images), own in cells.items()
    ]


def _table(title: str, rows: Sequence[Row]) -> Table:
    by_method: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in [*rows, *_chosen(rows)]:
        by_method[row.method][row.seed] = row
    lines = Table(
        "method", "test %", f"minus {_REFERENCE}, 95 %", "n", "parameters", "seconds", title=title
    )
    reference = by_method.get(_REFERENCE, {})
    chosen = [method for method in by_method if method.startswith(CHOSEN)]
    for method in [*METHODS, *BY_NAME_ONLY, *chosen]:
        own = by_method.get(method)
        if not own:
            continue
        mine, others = ({s: row.accuracy for s, row in part.items()} for part in (own, reference))
        lines.add_row(
            method,
            spread([row.accuracy for row in own.values()]),
            "" if method == _REFERENCE else difference_to(mine, others),
            str(len(own)),
            f"{np.mean([row.parameters for row in own.values()]):,.0f}",
            f"{np.median([row.seconds for row in own.values()]):.1f}",
        )
    return lines


def _chosen(rows: Sequence[Row]) -> Iterator[Row]:
    """For every seed, the allocation whose network diverges least from the dense one."""
    alternatives = defaultdict(list)
    for row, gamma in itertools.product(rows, GAMMAS):
        name = f"allocation, gamma {gamma:g}"
        if row.method == name or row.method.startswith(f"{name}, "):
            alternatives[row.seed, row.method.removeprefix(name)].append(row)
    for (_, rest), own in alternatives.items():
        best = min(own, key=lambda row: row.divergence)
        seconds = sum(row.seconds for row in own)
        yield Row(**asdict(best) | {"method": CHOSEN + rest, "seconds": seconds})


def _dense_row(network: str, dense: nn.Module, tracing: Tracing, test: Images) -> Row:
    return Row(
        network=network,
        macs_cut=0.0,
        images=0,
        method="dense",
        seed=0,
        accuracy=accuracy_on(dense, test),
        divergence=0.0,
        parameters=tracing.space.dense_parameters,
        seconds=0.0,
    )


def accuracy_on(network: nn.Module, images: Images) -> float:
    """Share of images that a network classifies correctly, in %."""
    faster = fold_batchnorm(network.eval())
    lay_out(faster, ComputeConfig(channels_last=True))
    return 100 * evaluate(faster, images.batches(_BATCH)).accuracy


def read(path: Path) -> list[Row]:
    """The rows of a CSV file; none where there is no file."""
    return [Row(**unflattened(row)) for row in read_rows(path)] if path.is_file() else []


if __name__ == "__main__":
    run_job(main)
