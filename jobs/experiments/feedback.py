"""Where does feedback pay: what do scores add to the allocation, which needs none?

    python jobs/experiments/feedback.py --data DIR --weights resnet20.pt --network resnet20 \
        --held-out-rows search_val_rows.npy --output runs/feedback-resnet20.csv

All methods share the calibration on 1,000 unlabelled images, the OBS order, the refit and the
reconstruction, so masks differ in their widths alone (or, for LeGR and the filter search, in what
moves the order). A score is the divergence from the dense network's answers on 500 held-out images,
of a network that was reconstructed on 100 images; the finalists of a method are reconstructed on
all, and compared on 2,000 others. The test set is read for the chosen network alone: before
training, and after 300 steps of distillation on the 1,000 images. With ``--score-steps`` scores and
choice see networks that were distilled first. The same command goes on where it was stopped.
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
from finalists import ALLOCATION, Subject, with_answers
from intervals import difference_to, spread
from rich.console import Console
from rich.table import Table
from untrained import accuracy_on, choose_images, open_subject
from untrained_methods import Study

from fppmo_ray.distribution import Budget
from fppmo_ray.distribution.allocation import GAMMAS
from fppmo_ray.job import run_job
from fppmo_ray.pruning import trace
from fppmo_ray.training import example_batch, open_images

logger = logging.getLogger(__name__)

_SCORED_ON, _CHOSEN_ON = 500, 2000

Setting = tuple[str, float, str, float, int, int]


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
    score_steps: int
    """Steps of distillation that a score and the choice see; 0: networks are not trained."""
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
    def setting(self) -> Setting:
        """All but the seed and what was measured."""
        of_scores = self.capacity_weight, self.score_images, self.score_steps
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
    methods: tuple[str, ...] = (ALLOCATION, "widths 160", "random 160", "legr 160"),
    steps: int = 300,
    gammas: tuple[float, ...] = GAMMAS,
    capacity_weight: float = 0.0,
    score_images: int = 100,
    score_steps: int = 0,
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
        score_steps: Steps of distillation on all images that a score and the choice see.
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
        weight = 0.0 if method == ALLOCATION else capacity_weight
        if ((network, cut, method, weight, score_images, score_steps), seed) in done:
            continue
        study = studies[seed]
        subject = Subject(
            study=study,
            budget=Budget.from_cut(space, cut),
            gammas=gammas,
            capacity_weight=weight,
            score_images=score_images,
            score_steps=score_steps,
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
        row = Row(
            network=network,
            macs_cut=cut,
            method=method,
            capacity_weight=weight,
            score_images=score_images,
            score_steps=score_steps,
            seed=seed,
            chosen=name,
            divergence=distances[name],
            parameters=space.parameters(keep),
            accuracy=accuracy_on(study.reconstructed(keep), test),
            distilled=float("nan"),
            seconds=round(seconds, 1),
        )
        if steps:
            row = replace(row, distilled=accuracy_on(subject.distilled(keep, steps), test))
        logger.info("%s", row)
        known.append(row)
        output.parent.mkdir(parents=True, exist_ok=True)
        write_rows(output, [flattened(asdict(entry)) for entry in known])
    Console(width=140).print(feedback_table(known))


def feedback_table(rows: Sequence[Row]) -> Table:
    """A line for each network, cut and method; differences are to the allocation.

    Args:
        rows: What was measured, in the order of the lines.
    """
    lines = Table(
        *("network", "cut", "method", "untrained", "minus allocation, 95 %"),
        *("distilled", "minus allocation, 95 %", "n", "parameters", "seconds"),
    )
    cells: dict[Setting, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        cells[row.setting][row.seed] = row
    for (network, cut, method, weight, images, steps), own in cells.items():
        reference = cells.get((network, cut, ALLOCATION, 0.0, images, 0), {})
        if own is reference:
            reference = {}
        lines.add_row(
            network,
            f"{cut:.0%}",
            method
            + "".join(
                f", {name} {value:g}"
                for name, value in (("capacity", weight), ("score steps", steps))
                if value
            ),
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
