"""What do a few unlabelled images and a few hundred steps of distillation make of a pruned network?

    python jobs/experiments/few_images.py --data DIR --weights resnet20.pt --network resnet20 \
        --held-out-rows search_val_rows.npy --output runs/unlabelled-resnet20.csv

A mask comes from the same images, without scores. The pruned network is refitted, recalibrated, by
some methods reconstructed too, and then trained to answer as the dense network does on these
images, augmented; in some ways also to make the same last feature map. A seed is a choice of images
and their order. The test set is read before and after distillation. The same command goes on where
it was stopped.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from archive import flattened, read_rows, unflattened, write_rows
from intervals import difference_to, spread
from rich.console import Console
from rich.table import Table
from untrained import CHOSEN, accuracy_on, choose_images, open_subject
from untrained_methods import BY_NAME_ONLY, METHODS, RECONSTRUCTED, REFIT, Pruned, Study

from fppmo_ray.distribution import Budget
from fppmo_ray.distribution.allocation import GAMMAS
from fppmo_ray.job import run_job
from fppmo_ray.pruning import trace
from fppmo_ray.pruning.calibration.features import last_feature_match
from fppmo_ray.training import example_batch, open_images
from fppmo_ray.training.distill import FEW_IMAGES, distill, endless_batches

logger = logging.getLogger(__name__)

_AS_PRUNE = CHOSEN + RECONSTRUCTED  # what ``fppmo_ray.prune`` does


@dataclass(frozen=True, kw_only=True)
class Row:
    """One pruned and distilled network."""

    network: str
    macs_cut: float
    images: int
    """Unlabelled images that were used."""
    method: str
    """How the mask was found, as in ``untrained_methods.METHODS``, or as in ``prune``."""
    steps: int
    """Distillation steps of 100 images."""
    feature_weight: float
    """Weight of the last feature map; 0: answers alone."""
    learning_rate: float
    """Peak learning rate."""
    seed: int
    before: float
    """Accuracy on the test set before distillation, in %."""
    after: float
    """The same afterwards."""
    seconds: float
    """Of the distillation, on one core."""

    @property
    def setting(self) -> tuple[str, float, int, int, float, float, str]:
        """All but the seed and what was measured."""
        own = (self.macs_cut, self.images, self.steps, self.feature_weight, self.learning_rate)
        return (self.network, *own, self.method)


def main(
    data: Path,
    weights: Path,
    *,
    output: Path,
    held_out_rows: Path | None = None,
    network: str = "resnet20",
    macs_cuts: tuple[float, ...] = (0.57,),
    images: tuple[int, ...] = (500, 1000),
    seeds: tuple[int, ...] = (0, 1, 2),
    methods: tuple[str, ...] = ("l1 + refit", "allocation, gamma 1"),
    steps: tuple[int, ...] = (300,),
    feature_weights: tuple[float, ...] = (0.0, 10.0),
    learning_rates: tuple[float, ...] = (0.02,),
    ignore: tuple[str, ...] = ("conv1",),
    min_keep: float = 0.1,
    tune: bool = False,
    threads: int = 1,
) -> None:
    """Prune and distil on a few images; print and keep the table.

    Args:
        data: Folder with CIFAR-10 as parquet files or in torchvision's layout.
        weights: The network's trained weights.
        output: CSV file of all rows; rows that it holds already are not measured again.
        held_out_rows: .npy file of training rows that are not used.
        network: Which network is pruned, as in ``open_network``.
        macs_cuts: Shares of MACs to remove.
        images: Numbers of unlabelled images.
        seeds: Choices of images.
        methods: How masks are found: some of those of ``untrained_methods``, or "allocation, gamma
            chosen, reconstructed", as ``prune`` finds them.
        steps: Numbers of distillation steps.
        feature_weights: Weights of the last feature map.
        learning_rates: Peak learning rates.
        ignore: Layers that stay whole.
        min_keep: Smallest share of a group's filters that is kept.
        tune: Whether accuracies are those on the held-out rows, to choose settings by, instead of
            those on the test set.
        threads: Threads of torch.
    """
    known_methods = [*METHODS, *BY_NAME_ONLY, _AS_PRUNE]
    unknown = [method for method in methods if method not in known_methods]
    if unknown:
        raise ValueError(f"methods must be some of {', '.join(known_methods)}, got {unknown}")
    torch.set_num_threads(threads)
    dataset, dense, rows = open_subject(data, network, weights, held_out_rows)
    test = open_images(dataset.test, None, dataset)
    if tune:
        if held_out_rows is None:
            raise ValueError("tune needs held_out_rows to measure on")
        test = open_images(dataset.train, np.load(held_out_rows), dataset)
    image = example_batch(dataset)
    tracing = trace(dense, image, ignore=ignore)
    space = tracing.space.with_limits(min_keep=min_keep)
    known = read(output)
    done = {(row.setting, row.seed) for row in known}
    ways = list(itertools.product(steps, feature_weights, learning_rates))
    for seed, count, cut, method in itertools.product(seeds, images, macs_cuts, methods):
        few = choose_images(dataset, rows, count, seed)
        study = Study(
            dense=dense,
            tracing=tracing,
            images=few,
            trace_seconds=0.0,
            random_scores=0,
            seed=seed,
        )
        for num_steps, weight, rate in ways:
            row = Row(
                network=network,
                macs_cut=cut,
                images=count,
                method=method,
                steps=num_steps,
                feature_weight=weight,
                learning_rate=rate,
                seed=seed,
                before=0.0,
                after=0.0,
                seconds=0.0,
            )
            if (row.setting, seed) in done:
                continue
            pruned = pruned_by(study, method, Budget.from_cut(space, cut))
            smaller = pruned.network
            before = accuracy_on(smaller, test)
            matches = last_feature_match(smaller, dense, tracing, pruned.keep, image)
            began = time.perf_counter()
            distill(
                smaller,
                dense,
                endless_batches(few, FEW_IMAGES.batch_size, seed=seed),
                steps=num_steps,
                matches=matches,
                recipe=replace(FEW_IMAGES, learning_rate=rate, feature_weight=weight),
            )
            seconds = round(time.perf_counter() - began, 1)
            after = accuracy_on(smaller, test)
            known.append(replace(row, before=before, after=after, seconds=seconds))
            logger.info("%s", known[-1])
            output.parent.mkdir(parents=True, exist_ok=True)
            write_rows(output, [flattened(asdict(entry)) for entry in known])
    Console(width=180).print(few_images_table(known))


def pruned_by(study: Study, method: str, budget: Budget) -> Pruned:
    """Prune by a method; ``prune`` takes the weight of parameters of least divergence.

    Args:
        study: The network and its images.
        method: One of ``METHODS``, or the name of what ``prune`` does.
        budget: What the mask must meet.
    """
    names = [method]
    if method == _AS_PRUNE:
        names = [f"allocation, gamma {gamma:g}{RECONSTRUCTED}" for gamma in GAMMAS]
    return min((study.prune(name, budget) for name in names), key=lambda each: each.divergence)


def few_images_table(rows: Sequence[Row]) -> Table:
    """A line for each setting, with paired differences to others of the same images.

    Args:
        rows: What was measured, in the order of the lines.
    """
    lines = Table(
        *("network", "cut", "images", "steps", "features", "rate", "method", "before", "after"),
        *("minus answers alone, 95 %", "minus uniform L1, 95 %", "n", "seconds"),
    )
    settings: dict[tuple[object, ...], dict[int, Row]] = defaultdict(dict)
    for row in rows:
        settings[row.setting][row.seed] = row
    for own in settings.values():
        first = next(iter(own.values()))
        l1 = "l1" + (RECONSTRUCTED if first.method.endswith(RECONSTRUCTED) else REFIT)
        alone = settings.get(replace(first, feature_weight=0.0).setting, {})
        uniform = settings.get(replace(first, method=l1).setting, {})
        lines.add_row(
            first.network,
            f"{first.macs_cut:.0%}",
            str(first.images),
            str(first.steps),
            f"{first.feature_weight:g}",
            f"{first.learning_rate:g}",
            first.method,
            spread([row.before for row in own.values()]),
            spread([row.after for row in own.values()]),
            _difference(own, alone),
            _difference(own, uniform),
            str(len(own)),
            f"{np.median([row.seconds for row in own.values()]):.0f}",
        )
    return lines


def _difference(own: dict[int, Row], others: dict[int, Row]) -> str:
    """The paired difference after distillation; empty to itself."""
    if own is others:
        return ""
    mine, theirs = ({seed: row.after for seed, row in rows.items()} for rows in (own, others))
    return difference_to(mine, theirs)


def read(path: Path) -> list[Row]:
    """The rows of a CSV file; none where there is no file."""
    return [Row(**unflattened(row)) for row in read_rows(path)] if path.is_file() else []


if __name__ == "__main__":
    run_job(main)
