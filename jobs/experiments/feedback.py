"""Where does feedback pay: what do scores add to the allocation, which needs none?

    python jobs/experiments/feedback.py --data DIR --weights resnet20.pt --network resnet20 \
        --held-out-rows search_val_rows.npy --output runs/feedback-resnet20.csv

All methods share the calibration on 1,000 unlabelled images, the OBS order, the refit and the
reconstruction, so masks differ in their widths alone (or, for LeGR and the filter search, in what
moves the order). A score is the divergence from the dense network's answers on 500 held-out images,
of a network that was reconstructed on 100 images; the finalists of a method are reconstructed on
all, and compared on 2,000 others. The test set is read for the chosen network alone: before
training, and after 300 steps of distillation on the 1,000 images. The same command goes on where it
was stopped.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from archive import flattened, read_rows, unflattened, write_rows
from intervals import difference_to, spread
from rich.console import Console
from rich.table import Table
from rivals.rankings import with_random_widths
from rivals.searches import LeGR
from torch import nn
from untrained import accuracy_on, choose_images, open_subject
from untrained_methods import Study

from fppmo_ray.distribution import (
    RULES,
    BoolArray,
    Budget,
    Feedback,
    MaskOptimizer,
    OptimizerSettings,
    UpdateRule,
)
from fppmo_ray.distribution.allocation import GAMMAS, allocation_masks
from fppmo_ray.job import run_job
from fppmo_ray.pruning import trace
from fppmo_ray.pruning.calibration.divergence import Answers, answers, divergence
from fppmo_ray.pruning.calibration.features import last_feature_match
from fppmo_ray.training import (
    ComputeConfig,
    Images,
    example_batch,
    fold_batchnorm,
    lay_out,
    open_images,
)
from fppmo_ray.training.distill import FEW_IMAGES, distill, endless_batches

logger = logging.getLogger(__name__)

_BATCH = 50
_SCORED_ON, _CHOSEN_ON, _RECALIBRATED_ON = 500, 2000, 250
_NUM_SAMPLES = 3  # best scored masks among the finalists, as in a search
_ALLOCATION = "allocation"


@dataclass(frozen=True, kw_only=True)
class Row:
    """The network that a method chose."""

    network: str
    macs_cut: float
    method: str
    """How widths were found, and by how many scores: ``widths 160``."""
    capacity_weight: float
    """How much the parameters left count when masks are compared."""
    score_images: int
    """Images that a score reconstructs its network on; 0: it is refitted alone."""
    seed: int
    """Which images were used, and the seed of the search."""
    chosen: str
    """The finalist that was best on the choice's images."""
    divergence: float
    """On the choice's images."""
    parameters: int
    accuracy: float
    """On the test set before training, in %."""
    distilled: float
    """The same after distillation; NaN where it was not asked for."""
    seconds: float
    """Of all scores, on one core."""

    @property
    def setting(self) -> tuple[str, float, str, float, int]:
        """All but the seed and what was measured."""
        of_scores = self.capacity_weight, self.score_images
        return self.network, self.macs_cut, self.method, *of_scores


def main(
    data: Path,
    weights: Path,
    held_out_rows: Path,
    *,
    output: Path,
    network: str = "resnet20",
    macs_cuts: tuple[float, ...] = (0.57, 0.7, 0.8, 0.9),
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    methods: tuple[str, ...] = (_ALLOCATION, "widths 160", "random 160", "legr 160"),
    steps: int = 300,
    gammas: tuple[float, ...] = GAMMAS,
    capacity_weight: float = 0.0,
    score_images: int = 100,
    ignore: tuple[str, ...] = ("conv1",),
    min_keep: float = 0.1,
    threads: int = 1,
) -> None:
    """Find widths with and without scores; print and keep the table.

    Args:
        data: Folder with CIFAR-10 as parquet files or in torchvision's layout.
        weights: The network's trained weights.
        held_out_rows: .npy file of training rows for scores and choice.
        output: CSV file of all rows; rows that it holds already are not measured again.
        network: Which network is pruned, as in ``open_network``.
        macs_cuts: Shares of MACs to remove.
        seeds: Choices of images.
        methods: ``allocation``, or a rule of ``fppmo_ray.distribution.RULES``, ``random`` (widths)
            or ``legr`` with a number of scores.
        steps: Distillation steps of 100 images; 0: the networks are not trained.
        gammas: Weights of the parameters in the allocation, of which the one that scores best is
            taken.
        capacity_weight: How much the parameters left count when masks are compared.
        score_images: Images that a score reconstructs its network on; 0: it is refitted alone.
        ignore: Layers that stay whole.
        min_keep: Smallest share of a group's filters that is kept.
        threads: Threads of torch.
    """
    torch.set_num_threads(threads)
    dataset, dense, rows = open_subject(data, network, weights, held_out_rows)
    held_out = np.load(held_out_rows)
    test = open_images(dataset.test, None, dataset)
    tracing = trace(dense, example_batch(dataset), ignore=ignore)
    space = tracing.space.with_limits(min_keep=min_keep)
    known = read(output)
    done = {(row.setting, row.seed) for row in known}
    scored, chosen = (
        with_answers(dense, open_images(dataset.train, part, dataset))
        for part in np.split(held_out[: _SCORED_ON + _CHOSEN_ON], [_SCORED_ON])
    )
    studies = {
        seed: Study(  # calibrates once for all cuts and methods, when the first of them asks
            dense=dense,
            tracing=tracing,
            images=choose_images(dataset, rows, 1000, seed),
            trace_seconds=0.0,
            random_scores=0,
            seed=seed,
        )
        for seed in seeds
    }
    for seed, cut, method in itertools.product(seeds, macs_cuts, methods):
        weight = 0.0 if method == _ALLOCATION else capacity_weight
        if ((network, cut, method, weight, score_images), seed) in done:
            continue
        study = studies[seed]
        subject = Subject(
            study=study,
            budget=Budget.from_cut(space, cut),
            gammas=gammas,
            capacity_weight=weight,
            score_images=score_images,
            scored=scored,
            chosen=chosen,
        )
        _ = study.order  # so that it counts in no method's seconds
        began = time.perf_counter()
        finalists = subject.finalists(method)
        seconds = time.perf_counter() - began
        distances = {name: subject.distance(keep) for name, keep in finalists.items()}
        name = min(distances, key=lambda each: subject.cost(distances[each], finalists[each]))
        keep = finalists[name]
        smaller = study.reconstructed(keep)
        row = Row(
            network=network,
            macs_cut=cut,
            method=method,
            capacity_weight=weight,
            score_images=score_images,
            seed=seed,
            chosen=name,
            divergence=distances[name],
            parameters=space.parameters(keep),
            accuracy=accuracy_on(smaller, test),
            distilled=float("nan"),
            seconds=round(seconds, 1),
        )
        if steps:
            batches = endless_batches(study.images, FEW_IMAGES.batch_size, seed=seed)
            matches = last_feature_match(smaller, dense, tracing, keep, example_batch(dataset))
            distill(smaller, dense, batches, steps=steps, matches=matches)
            row = replace(row, distilled=accuracy_on(smaller, test))
        logger.info("%s", row)
        known.append(row)
        output.parent.mkdir(parents=True, exist_ok=True)
        write_rows(output, [flattened(asdict(entry)) for entry in known])
    Console(width=140).print(feedback_table(known))


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """What the methods work on."""

    study: Study
    budget: Budget
    gammas: tuple[float, ...]
    capacity_weight: float
    score_images: int
    scored: tuple[Images, Answers]
    """Images of the scores, with the dense network's answers."""
    chosen: tuple[Images, Answers]
    """Those of the choice."""

    def finalists(self, method: str) -> dict[str, BoolArray]:
        """The masks that a method ends with, by name; the allocation is always among them."""
        allocation = self.allocation()
        if method == _ALLOCATION:
            return {_ALLOCATION: allocation}
        name, scores = method.split()
        if name in RULES:
            return self._searched(RULES[name], int(scores))
        masks = self._drawn(name, int(scores))
        best = sorted(masks, key=lambda i: masks[i][1])[:_NUM_SAMPLES]
        return {_ALLOCATION: allocation} | {f"sample {i}": masks[i][0] for i in best}

    def allocation(self) -> BoolArray:
        """The allocation of the weight that scores best."""
        order = self.study.order
        masks = [
            allocation_masks([self.budget], order.error_curves, order.importance, gamma=gamma)[0]
            for gamma in self.gammas
        ]
        if len(masks) == 1:
            return masks[0]
        return min(masks, key=lambda keep: self.cost(self.score(keep), keep))

    def score(self, keep: BoolArray) -> float:
        """The divergence that a score sees: recalibrated on few images, in small batches."""
        if self.score_images:
            made = self.study.reconstructed(keep, self.score_images)
        else:
            made = self.study.network(keep, np.arange(_RECALIBRATED_ON))
        network = fold_batchnorm(made.eval())
        lay_out(network, ComputeConfig(channels_last=True))
        images, known = self.scored
        return divergence(network, images.batches(_BATCH), known)

    def cost(self, distance: float, keep: BoolArray) -> float:
        """The divergence of a mask, weighed by the parameters that it leaves."""
        space = self.budget.space
        share = space.parameters(keep) / space.dense_parameters
        return distance * float(share**-self.capacity_weight)

    def distance(self, keep: BoolArray) -> float:
        """The divergence on the images of the choice, reconstructed on all images."""
        images, known = self.chosen
        return divergence(self.study.reconstructed(keep), images.batches(_BATCH), known)

    def _searched(self, rule: UpdateRule, scores: int) -> dict[str, BoolArray]:
        order = self.study.order
        settings = OptimizerSettings(
            macs_cut=1 - self.budget.max_macs / self.budget.space.dense_macs,
            num_proposals=scores,
            rule=rule,
            seed=self.study.seed,
            capacity_weight=self.capacity_weight,
        )
        start = [self.allocation()]
        search = MaskOptimizer(self.budget.space, order.importance, settings, allocations=start)
        while not search.finished:
            for proposal in search.ask():
                loss = self.score(proposal.keep)
                found = Feedback(proposal_id=proposal.proposal_id, val_loss=loss, val_accuracy=None)
                search.tell(found)
        finalists = search.finalists(_NUM_SAMPLES)
        return {item.name: item.keep for item in finalists if item.name != "importance-only"}

    def _drawn(self, name: str, scores: int) -> dict[int, tuple[BoolArray, float]]:
        """Masks and scores of a method that draws one mask after the other."""
        importance, seed = self.study.order.importance, self.study.seed
        legr = LeGR(self.budget, importance, scores, seed)
        masks: dict[int, tuple[BoolArray, float]] = {}
        for i in range(scores):
            if name == "legr":
                [keep] = legr(range(i, i + 1), {j: cost for j, (_, cost) in masks.items()})
            else:
                rng = np.random.default_rng([seed, i])
                keep = with_random_widths(self.budget, importance, rng)
            masks[i] = keep, self.cost(self.score(keep), keep)
        return masks


def with_answers(dense: nn.Module, images: Images) -> tuple[Images, Answers]:
    """Images, and what the dense network answers to them.

    Args:
        dense: The dense network.
        images: The images.
    """
    return images, answers(dense, images.batches(_BATCH))


def feedback_table(rows: Sequence[Row]) -> Table:
    """A line for each network, cut and method; differences are to the allocation.

    Args:
        rows: What was measured, in the order of the lines.
    """
    lines = Table(
        *("network", "cut", "method", "untrained", "minus allocation, 95 %"),
        *("distilled", "minus allocation, 95 %", "n", "parameters", "seconds"),
    )
    cells: dict[tuple[str, float, str, float, int], dict[int, Row]] = defaultdict(dict)
    for row in rows:
        cells[row.setting][row.seed] = row
    for (network, cut, method, weight, images), own in cells.items():
        reference = {}
        if method != _ALLOCATION:
            reference = cells.get((network, cut, _ALLOCATION, 0.0, images), {})
        lines.add_row(
            network,
            f"{cut:.0%}",
            f"{method}, capacity {weight:g}" if weight else method,
            *_cell(own, reference, lambda row: row.accuracy),
            *_cell(own, reference, lambda row: row.distilled),
            str(len(own)),
            f"{np.mean([row.parameters for row in own.values()]):,.0f}",
            f"{np.median([row.seconds for row in own.values()]):.0f}",
        )
    return lines


def _cell(
    own: dict[int, Row], reference: dict[int, Row], value: Callable[[Row], float]
) -> tuple[str, str]:
    """Mean and spread of what was measured, and the paired difference to the reference."""
    mine, others = (
        {seed: value(row) for seed, row in rows.items() if not math.isnan(value(row))}
        for rows in (own, reference)
    )
    return spread(list(mine.values())) if mine else "", difference_to(mine, others)


def read(path: Path) -> list[Row]:
    """The rows of a CSV file; none where there is no file."""
    return [Row(**unflattened(row)) for row in read_rows(path)] if path.is_file() else []


if __name__ == "__main__":
    run_job(main)
