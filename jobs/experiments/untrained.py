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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from archive import flattened, read_rows, unflattened, write_rows
from intervals import paired_difference, spread
from rich.console import Console
from rich.table import Table
from rivals.rankings import with_random_widths
from rivals.torch_pruning_masks import magnitude_mask
from torch import nn

from fppmo_ray import load_dataset
from fppmo_ray.distribution import BoolArray, Budget, IntArray
from fppmo_ray.distribution.allocation import GAMMAS, allocation_masks
from fppmo_ray.distribution.logits import uniform_priority
from fppmo_ray.job import run_job
from fppmo_ray.own_network import open_network
from fppmo_ray.pruning import Criterion, Tracing, extract, importance, trace
from fppmo_ray.pruning.calibration import (
    Calibration,
    FilterOrder,
    LayerTargets,
    Refit,
    calibrate,
    layer_targets,
    obs_order,
    reconstruct,
)
from fppmo_ray.pruning.calibration.divergence import Answers, answers, divergence
from fppmo_ray.training import (
    ComputeConfig,
    Dataset,
    Images,
    evaluate,
    example_batch,
    fold_batchnorm,
    lay_out,
    open_images,
    recalibrate_batchnorm,
)

logger = logging.getLogger(__name__)

_BATCH = 50  # small batches stay in the cache of a CPU: they are twice as fast as those of 250
_RECALIBRATION_BATCH = 250
_SCORED_ON, _RECALIBRATED_ON = 500, 250  # images of a random mask's score
_REFERENCE = "l1"
REFIT = " + refit"
"""Ends the names of methods whose masks are refitted, where they come without it too."""
RECONSTRUCTED = ", reconstructed"
"""Ends the names of methods whose networks are refitted, recalibrated and reconstructed."""


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
        methods: Some of those of ``METHODS``; by default all.
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


@dataclass(frozen=True, kw_only=True, eq=False)
class Pruned:
    """What a method made of the dense network."""

    network: nn.Module
    keep: BoolArray
    divergence: float
    seconds: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Study:
    """A dense network, the unlabelled images that all methods get, and what is found once."""

    dense: nn.Module
    tracing: Tracing
    images: Images
    trace_seconds: float
    random_scores: int
    seed: int
    _known_targets: dict[int, tuple[LayerTargets, float]] = field(default_factory=dict)
    """By number of images: the dense network's outputs, and the seconds that they took."""

    def prune(self, method: str, budget: Budget) -> Pruned:
        """Prune by a method, and say how long it took.

        Args:
            method: One of ``METHODS``.
            budget: What the mask must meet.
        """
        reconstructed = method.endswith(RECONSTRUCTED)
        method = method.removesuffix(RECONSTRUCTED)
        calibrated = reconstructed or method.endswith(REFIT) or method not in _PLAIN
        shared = self.trace_seconds + (self._calibrated[1] if calibrated else 0.0)
        if "order" in METHODS[method].__name__:
            shared += self._ordered[1]
        if reconstructed:
            shared += self._targets[1]
        began = time.perf_counter()
        keep = METHODS[method](self, budget)
        network = extract(self.dense, self.tracing, keep)
        if calibrated:
            self._refit(network, keep)
        recalibrate_batchnorm(network, self.images.batches(_RECALIBRATION_BATCH))
        if reconstructed:
            reconstruct(network, self.tracing, keep, self._targets[0])
        seconds = time.perf_counter() - began + shared
        distance = divergence(network, self.images.batches(_BATCH), self._answers)
        return Pruned(network=network, keep=keep, divergence=distance, seconds=seconds)

    def network(
        self, keep: BoolArray, positions: IntArray | None = None, *, batch: int = _BATCH
    ) -> nn.Module:
        """The network that a mask leaves, refitted and recalibrated.

        Args:
            keep: The mask, ``(num_filters,)``.
            positions: Positions of the images that recalibrate it; None: all.
            batch: Images per pass of the recalibration.
        """
        network = extract(self.dense, self.tracing, keep)
        self._refit(network, keep)
        recalibrate_batchnorm(network, self.images.batches(batch, positions))
        return network

    def reconstructed(self, keep: BoolArray, num_images: int | None = None) -> nn.Module:
        """The network that ``prune`` hands out: refitted, recalibrated and reconstructed.

        Args:
            keep: The mask, ``(num_filters,)``.
            num_images: As many images reconstruct it, and recalibrate it before; None: all.
        """
        count = len(self.images) if num_images is None else num_images
        network = self.network(keep, np.arange(count))
        reconstruct(network, self.tracing, keep, self._targets_of(count)[0])
        return network

    @property
    def order(self) -> FilterOrder:
        """The OBS order."""
        return self._ordered[0]

    def score(self, keep: BoolArray) -> float:
        """Divergence on 500 of the images after refit and recalibration on 250."""
        some = np.arange(len(self.images))[-_RECALIBRATED_ON:]
        network = self.network(keep, some, batch=_RECALIBRATION_BATCH)
        num_batches = min(_SCORED_ON // _BATCH, len(self._answers))
        scored = np.arange(min(num_batches * _BATCH, len(self.images)))
        batches = self.images.batches(_BATCH, scored)
        return divergence(network, batches, self._answers[:num_batches])

    @cached_property
    def _calibrated(self) -> tuple[Calibration, float]:
        began = time.perf_counter()
        batches = self.images.batches(_BATCH)
        found = calibrate(self.dense, self.tracing, batches, num_images=len(self.images))
        return found, time.perf_counter() - began

    @cached_property
    def _ordered(self) -> tuple[FilterOrder, float]:
        calibration = self._calibrated[0]
        began = time.perf_counter()
        found = obs_order(self.dense, self.tracing, calibration)
        return found, time.perf_counter() - began

    @property
    def _targets(self) -> tuple[LayerTargets, float]:
        return self._targets_of(len(self.images))

    def _targets_of(self, count: int) -> tuple[LayerTargets, float]:
        if count not in self._known_targets:
            began = time.perf_counter()
            batches = self.images.batches(_BATCH, np.arange(count))
            inputs = torch.cat([images for images, _ in batches])
            found = layer_targets(self.dense, self.tracing, [inputs])
            assert found is not None  # a study has enough images and memory
            self._known_targets[count] = found, time.perf_counter() - began
        return self._known_targets[count]

    @cached_property
    def _answers(self) -> Answers:
        return answers(self.dense, self.images.batches(_BATCH))

    @cached_property
    def _refit(self) -> Refit:
        return Refit(self.dense, self.tracing, self._calibrated[0])


Method = Callable[[Study, Budget], BoolArray]


def _uniform(criterion: Criterion) -> Method:
    """Every group loses the same share, its least important filters first."""

    def uniform(study: Study, budget: Budget) -> BoolArray:
        values = importance(study.dense, study.tracing, criterion)
        return budget.fill(uniform_priority(budget.space, values))

    return uniform


def _torch_pruning(study: Study, budget: Budget) -> BoolArray:
    """Torch-Pruning's magnitude pruner, one threshold for all layers."""
    image = next(study.images.batches(1))[0]
    return magnitude_mask(study.dense, study.tracing, budget, image, global_pruning=True)


def _uniform_on_obs_order(study: Study, budget: Budget) -> BoolArray:
    return budget.fill(uniform_priority(budget.space, study.order.importance))


def _allocation(gamma: float) -> Method:
    """Widths from the error curves, with a weight of parameters."""

    def allocation_on_obs_order(study: Study, budget: Budget) -> BoolArray:
        order = study.order
        [keep] = allocation_masks([budget], order.error_curves, order.importance, gamma=gamma)
        return keep

    return allocation_on_obs_order


def _random_widths_on_obs_order(study: Study, budget: Budget) -> BoolArray:
    """The best of many random widths, by scores on the images."""
    rng = np.random.default_rng(study.seed)
    masks = [
        with_random_widths(budget, study.order.importance, rng) for _ in range(study.random_scores)
    ]
    return min(masks, key=study.score)


METHODS: dict[str, Method] = {
    "l1": _uniform("l1"),
    "fpgm": _uniform("fpgm"),
    "torch-pruning": _torch_pruning,
    "obs, uniform widths": _uniform_on_obs_order,
    "obs, random widths": _random_widths_on_obs_order,
    "allocation, gamma 0": _allocation(0.0),
    "allocation, gamma 0.3": _allocation(0.3),
    "allocation, gamma 1": _allocation(1.0),
    "allocation, gamma 3": _allocation(3.0),
}
"""From a study and a budget to the mask. Masks of plain criteria are refitted only by name."""
_PLAIN = ("l1", "fpgm", "torch-pruning")
METHODS |= {name + REFIT: METHODS[name] for name in _PLAIN}
METHODS |= {
    name + RECONSTRUCTED: METHODS[name]
    for name in (*_PLAIN, "obs, uniform widths", *(n for n in METHODS if "gamma" in n))
}
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
    for method in [*METHODS, CHOSEN, CHOSEN + RECONSTRUCTED]:
        own = by_method.get(method)
        if not own:
            continue
        pairs = [seed for seed in own if seed in reference]
        difference = ""
        if pairs and method != _REFERENCE:
            values, others = ([part[s].accuracy for s in pairs] for part in (own, reference))
            difference = str(paired_difference(values, others))
        lines.add_row(
            method,
            spread([row.accuracy for row in own.values()]),
            difference,
            str(len(own)),
            f"{np.mean([row.parameters for row in own.values()]):,.0f}",
            f"{np.median([row.seconds for row in own.values()]):.1f}",
        )
    return lines


def _chosen(rows: Sequence[Row]) -> Iterator[Row]:
    """For every seed, the allocation whose network diverges least from the dense one."""
    names = {f"allocation, gamma {gamma:g}" for gamma in GAMMAS}
    by_seed = defaultdict(list)
    for row in rows:
        if row.method.removesuffix(RECONSTRUCTED) in names:
            by_seed[row.seed, row.method.endswith(RECONSTRUCTED)].append(row)
    for (_, reconstructed), own in by_seed.items():
        best = min(own, key=lambda row: row.divergence)
        name = CHOSEN + (RECONSTRUCTED if reconstructed else "")
        yield Row(**asdict(best) | {"method": name, "seconds": sum(row.seconds for row in own)})


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
