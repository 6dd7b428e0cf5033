"""What is left of the differences between masks after long fine-tuning, and does it lose accuracy?

    python jobs/experiments/long_training.py --data DIR --weights resnet20.pt --network resnet20 \
        --held-out-rows search_val_rows.npy --epochs 60 --output runs/long-resnet20.csv

Masks come from 1,000 unlabelled images; those of a search were scored by divergence, weighed by the
parameters left, as ``search`` does before fine-tuning. All pruned networks are refitted
and recalibrated, and all networks, the dense one too, are trained by the same recipe.
The held-out images show every epoch; the test images are read before the first epoch and after the
last. After every epoch a checkpoint is written, and the same command goes on where it was stopped.
"""

from __future__ import annotations

import copy
import itertools
import json
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from archive import flattened, read_rows, unflattened, write_rows
from finalists import Subject, with_answers
from intervals import difference_to, spread
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from untrained import accuracy_on, choose_images, open_subject
from untrained_methods import METHODS, Study

from fppmo_ray.distribution import BoolArray, Budget
from fppmo_ray.durable_files import write_whole
from fppmo_ray.job import run_job
from fppmo_ray.pruning import Tracing, trace
from fppmo_ray.pruning.calibration.features import last_feature_match
from fppmo_ray.training import (
    ComputeConfig,
    Images,
    Recipe,
    example_batch,
    lay_out,
    open_images,
    train_epoch,
)
from fppmo_ray.training.checkpoints import (
    read_checkpoint,
    restore,
    training_identity,
    write_checkpoint,
)
from fppmo_ray.training.feature_match import FeatureMatch

logger = logging.getLogger(__name__)

DENSE = "dense"
_REFERENCE = "l1 + refit"
_GAMMAS = (0.3, 1.0, 3.0)  # those of a search when these masks were found
_CAPACITY_WEIGHT = 1.0
_SCORED_ON, _CHOSEN_ON = 500, 2000


@dataclass(frozen=True, kw_only=True)
class Row:
    """One network, trained to the end."""

    network: str
    macs_cut: float
    method: str
    """``dense``, ``allocation``, a rule and a number of scores, or one of the methods of
    ``untrained_methods``."""
    recipe: str
    """What differs from the default recipe, besides the epochs."""
    epochs: int
    seed: int
    """Of the images, the search and the training."""
    parameters: int
    before: float
    """Accuracy on the test set before training, in %."""
    after: float
    """The same after the last epoch."""
    held_out: list[float]
    """Accuracy on the held-out images after every epoch, in %."""
    seconds: float
    """Of all epochs."""

    @property
    def setting(self) -> tuple[str, float, str, str, int]:
        """All but the seed and what was measured."""
        return self.network, self.macs_cut, self.method, self.recipe, self.epochs


def main(
    data: Path,
    weights: Path,
    held_out_rows: Path,
    recipe: Recipe,
    *,
    output: Path,
    network: str = "resnet20",
    macs_cuts: tuple[float, ...] = (0.57,),
    seeds: tuple[int, ...] = (0, 1, 2),
    methods: tuple[str, ...] = ("local_es 160", "allocation", _REFERENCE, DENSE),
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    ignore: tuple[str, ...] = ("conv1",),
    min_keep: float = 0.1,
    threads: int = 1,
) -> None:
    """Prune, fine-tune for long, compare; print and keep the table.

    Args:
        data: Folder with CIFAR-10 as parquet files or in torchvision's layout.
        weights: The network's trained weights.
        held_out_rows: .npy file of training rows that nothing is trained on.
        recipe: Of all trainings.
        output: CSV file of all rows; rows that it holds already are not measured again. Checkpoints
            lie beside it.
        network: Which network is pruned, as in ``open_network``.
        macs_cuts: Shares of MACs to remove.
        seeds: Of images, searches and trainings.
        methods: ``dense``, ``allocation``, a rule with a number of scores, or some of
            ``untrained_methods.METHODS``.
        dtype: Number format of the passes in training.
        ignore: Layers that stay whole.
        min_keep: Smallest share of a group's filters that is kept.
        threads: Threads of torch.
    """
    torch.set_num_threads(threads)
    output.parent.mkdir(parents=True, exist_ok=True)
    dataset, dense, rows = open_subject(data, network, weights, held_out_rows)
    tracing = trace(dense, example_batch(dataset), ignore=ignore)
    space = tracing.space.with_limits(min_keep=min_keep)
    held_out = np.load(held_out_rows)
    parts = np.split(held_out[: _SCORED_ON + _CHOSEN_ON], [_SCORED_ON])
    scored, chosen = (
        with_answers(dense, open_images(dataset.train, part, dataset)) for part in parts
    )
    course = Course(
        teacher=dense,
        train=open_images(dataset.train, rows, dataset),
        held_out=open_images(dataset.train, held_out, dataset),
        test=open_images(dataset.test, None, dataset),
        recipe=recipe,
        compute=ComputeConfig(dtype=dtype),
        tracing=tracing,
        image=example_batch(dataset),
    )
    for seed, cut, method in itertools.product(seeds, macs_cuts, methods):
        name = _recipe_name(recipe)
        if any(
            (row.setting, row.seed) == ((network, cut, method, name, recipe.epochs), seed)
            for row in read(output)
        ):
            continue
        subject = Subject(
            study=Study(
                dense=dense,
                tracing=tracing,
                images=choose_images(dataset, rows, 1000, seed),
                trace_seconds=0.0,
                random_scores=0,
                seed=seed,
            ),
            budget=Budget.from_cut(space, cut),
            gammas=_GAMMAS,
            capacity_weight=_CAPACITY_WEIGHT,
            score_images=100,
            scored=scored,
            chosen=chosen,
        )
        folder = output.with_suffix("") / f"{method}-{cut:g}-{recipe.epochs}-{name}-s{seed}"
        keep = None if method == DENSE else _mask(subject, method, folder)
        start = copy.deepcopy(dense) if keep is None else subject.study.network(keep)
        before = accuracy_on(start, course.test)
        logger.info("%s, seed %d: %.2f %% before training", method, seed, before)
        trained, seen = course.train_from(start, keep, seed, folder)
        row = Row(
            network=network,
            macs_cut=cut,
            method=method,
            recipe=name,
            epochs=recipe.epochs,
            seed=seed,
            parameters=space.dense_parameters if keep is None else space.parameters(keep),
            before=before,
            after=accuracy_on(trained, course.test),
            held_out=[epoch["held_out"] for epoch in seen],
            seconds=round(sum(epoch["seconds"] for epoch in seen), 1),
        )
        logger.info("%s", row)
        # Another process may have added rows meanwhile.
        write_rows(output, [flattened(asdict(entry)) for entry in [*read(output), row]])
    Console(width=140).print(long_training_table(read(output)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Course:
    """What all trainings share."""

    teacher: nn.Module
    train: Images
    held_out: Images
    test: Images
    recipe: Recipe
    compute: ComputeConfig
    tracing: Tracing
    image: Tensor
    """One image, (1, 3, 32, 32)."""

    def train_from(
        self, network: nn.Module, keep: BoolArray | None, seed: int, folder: Path
    ) -> tuple[nn.Module, list[dict[str, float]]]:
        """Train from the checkpoint on, if there is one; return the network and all epochs.

        Args:
            network: The network before its first epoch.
            keep: The mask that it comes from; None: it is the dense network.
            seed: Of the training.
            folder: Folder of checkpoint and curve.
        """
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint, curve = folder / "checkpoint.pt", folder / "epochs.json"
        run = training_identity(self.recipe, self.compute, seed)
        state = read_checkpoint(checkpoint, run)
        seen: list[dict[str, float]] = []
        if state is not None:
            seen = json.loads(curve.read_bytes())[: state.epochs_done]
        teacher = copy.deepcopy(self.teacher) if self.recipe.distillation_weight else None
        matches: list[FeatureMatch] = []
        if teacher is not None:
            matches = last_feature_match(network, teacher, self.tracing, keep, self.image)
            lay_out(teacher, self.compute)
        while len(seen) < self.recipe.epochs:
            state, report = train_epoch(
                network,
                self.train,
                self.recipe,
                epoch=len(seen),
                seed=seed,
                state=state,
                compute=self.compute,
                teacher=teacher,
                matches=matches,
            )
            held_out = accuracy_on(network, self.held_out)
            seen.append(
                {"loss": report.loss, "seconds": report.seconds, "held_out": round(held_out, 2)}
            )
            logger.info("epoch %d of %d: %s", len(seen), self.recipe.epochs, seen[-1])
            write_whole(curve, json.dumps(seen).encode())
            write_checkpoint(checkpoint, state, run)
        if state is not None:
            restore(state, network)
        return network, seen


def _mask(subject: Subject, method: str, folder: Path) -> BoolArray:
    """Return the method's mask, which is found once and kept in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "mask.npy"
    if not path.exists():
        np.save(path, _found(subject, method))
    keep: BoolArray = np.load(path)
    return keep


def _found(subject: Subject, method: str) -> BoolArray:
    if method in METHODS:
        return METHODS[method](subject.study, subject.budget)
    finalists: dict[str, BoolArray] = {}
    for gamma in _GAMMAS:
        finalists[f"allocation {gamma:g}"] = METHODS[f"allocation, gamma {gamma:g}"](
            subject.study, subject.budget
        )
    best = _best(subject, finalists)
    if method == "allocation":
        return finalists[best]
    gamma = float(best.split()[1])
    own = {**replace(subject, gammas=(gamma,)).finalists(method), best: finalists[best]}
    return own[_best(subject, own)]


def _best(subject: Subject, finalists: dict[str, BoolArray]) -> str:
    costs = {name: subject.cost(subject.distance(keep), keep) for name, keep in finalists.items()}
    logger.info("finalists: %s", costs)
    return min(costs, key=costs.__getitem__)


def _recipe_name(recipe: Recipe) -> str:
    """Return what differs from the default recipe, or ``default``."""
    usual = asdict(Recipe(epochs=recipe.epochs))
    differing = {k: v for k, v in asdict(recipe).items() if v != usual[k]}
    return ", ".join(f"{name} {value}" for name, value in differing.items()) or "default"


def long_training_table(rows: Sequence[Row]) -> Table:
    """Return a line for each setting; differences are to uniform L1 with a refit.

    Args:
        rows: What was measured, in the order of the lines.
    """
    lines = Table(
        *("network", "cut", "method", "recipe", "epochs", "n", "parameters"),
        *("before", "after", f"minus {_REFERENCE}, 95 %", "hours"),
    )
    cells: dict[tuple[str, float, str, str, int], dict[int, Row]] = defaultdict(dict)
    for row in rows:
        cells[row.setting][row.seed] = row
    for (network, cut, method, recipe, epochs), own in cells.items():
        others = cells.get((network, cut, _REFERENCE, recipe, epochs), {})
        mine, theirs = ({seed: row.after for seed, row in part.items()} for part in (own, others))
        lines.add_row(
            *(network, f"{cut:.0%}", method, recipe, str(epochs), str(len(own))),
            f"{np.mean([row.parameters for row in own.values()]):,.0f}",
            spread([row.before for row in own.values()]),
            spread([row.after for row in own.values()]),
            "" if method == _REFERENCE else difference_to(mine, theirs),
            f"{np.median([row.seconds for row in own.values()]) / 3600:.1f}",
        )
    return lines


def read(path: Path) -> list[Row]:
    """Return the rows of a CSV file; none where there is no file."""
    return [Row(**unflattened(row)) for row in read_rows(path)] if path.is_file() else []


if __name__ == "__main__":
    run_job(main)
