"""The cells of the fidelity job: which masks are measured at which depths, and in which order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any

from cells import Cell, Measurement, Record, find, folder_under_way
from fine_tuning import TuningTask, classification_of
from trained import fixed_key

from agreement.masks import Mask
from agreement.worker import Depth, FidelityWorker, fidelity_of
from fppmo_ray.service.journal.facts import pack_mask
from fppmo_ray.service.problem import Problem
from fppmo_ray.training import ComputeConfig

TRUTH = "truth"
_SCORE_STREAM = 2  # seeds [seed, repeat, 2]: never those of proposals or of rescored finalists
_PATIENCE_S = 24 * 3600.0  # limits are not learned: the first cells take seconds, the last minutes


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is measured; more masks, steps and seeds add to the cells that are there."""

    masks: int = 24
    """Number of masks, half of them near the searches' optimum; at least 2."""
    steps: tuple[int, ...] = (0, 50, 150, 500)
    """Fine-tuning steps of scores; 0 only recalibrates."""
    few_images_steps: tuple[int, ...] = (0,)
    """Fine-tuning steps of scores on as few images as a search's proposals have."""
    score_seeds: int = 3
    """Repeats of each score, which show its noise. All masks share a repeat's seed, as the
    proposals of a generation do."""
    truth_seeds: int = 1
    """Fine-tunings of each mask; a second one shows how well any score could agree."""

    def __post_init__(self) -> None:
        for name, least in (("masks", 2), ("score_seeds", 1), ("truth_seeds", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for count in (*self.steps, *self.few_images_steps):
            if count < 0:
                raise ValueError(f"fine-tuning steps of scores must be at least 0, got {count}")

    def depths(self) -> list[Depth]:
        """Return the depths of the scores, the shallowest first."""
        few = {Depth(steps=count, images="few") for count in self.few_images_steps}
        many = {Depth(steps=count) for count in self.steps}
        return sorted(few | many, key=lambda depth: (depth.steps, depth.images != "few"))


@dataclass(frozen=True, kw_only=True)
class Study:
    """Everything that is to be measured."""

    problem: Problem
    compute: ComputeConfig | None
    """The compute configuration of all passes; None until it is chosen."""
    masks: Sequence[Mask]
    plan: Plan
    seed: int
    score_timeout: float | None
    """Seconds after which a score is taken from its worker; None: a day."""
    work_dir: Path
    """Absolute folder for the checkpoints of fine-tunings."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A cell with its work, and its place in the tables."""

    measurement: Measurement[FidelityWorker]
    mask: Mask
    depth: Depth | None
    """None for the truth, a long fine-tuning."""
    repeat: int

    @property
    def cell(self) -> Cell:
        """The cell that is measured."""
        return self.measurement.cell

    @property
    def kind(self) -> str:
        """Name of the depth, or ``TRUTH``; tasks of a kind take about the same time."""
        return TRUTH if self.depth is None else str(self.depth)


def tasks(study: Study) -> list[Task]:
    """Return all tasks, in an order in which an early stop leaves the most useful cells.

    First one score of each mask at every depth, the cheapest first; then the truths, mask by mask;
    then the repeats that show the noise.

    Args:
        study: A study whose compute configuration is chosen.
    """
    assert study.compute is not None  # whoever asks for tasks has settled it
    fixed = {**fixed_key(study.problem), "compute": asdict(study.compute)}
    plan, in_turn = study.plan, _in_turn(study.masks)
    depths = plan.depths()

    def scores(repeat: int) -> Iterator[Task]:
        for depth in depths:
            for file, mask in in_turn:
                yield _score_task(study, fixed, file, mask, depth, repeat)

    def truths(repeat: int) -> Iterator[Task]:
        for file, mask in in_turn:
            yield _truth_task(study, fixed, file, mask, repeat)

    return [
        *scores(0),
        *truths(0),
        *(task for repeat in range(1, plan.score_seeds) for task in scores(repeat)),
        *(task for repeat in range(1, plan.truth_seeds) for task in truths(repeat)),
    ]


def done(folder: Path, todo: Sequence[Task]) -> dict[str, Record]:
    """Return the records of the tasks that are measured, by the name of the cell.

    Args:
        folder: Work folder of the cells.
        todo: Tasks, measured or not.
    """
    found = {task.cell.name: find(folder, task.cell) for task in todo}
    return {name: record for name, record in found.items() if record is not None}


def seconds_left(study: Study, todo: Sequence[Task], records: Mapping[str, Record]) -> float | None:
    """Estimate one worker's seconds for the missing cells; None while nothing is measured.

    A kind without any measurement is estimated by the number of images it passes.

    Args:
        study: The study.
        todo: All of its tasks.
        records: Measured cells by name.
    """
    timed = [(task, records[task.cell.name].seconds) for task in todo if task.cell.name in records]
    if not timed:
        return None
    per_image = sum(seconds for _, seconds in timed) / sum(_passes(study, t) for t, _ in timed)
    of_kind = {
        kind: fmean(seconds for task, seconds in timed if task.kind == kind)
        for kind in {task.kind for task, _ in timed}
    }
    return sum(
        of_kind.get(task.kind, per_image * _passes(study, task))
        for task in todo
        if task.cell.name not in records
    )


def _passes(study: Study, task: Task) -> int:
    """Images passed forward; one that is trained on counts thrice."""
    problem, recipe = study.problem, study.problem.settings.fine_tune
    if task.depth is None:
        return 3 * recipe.epochs * len(classification_of(problem).splits.search_train)
    fidelity = fidelity_of(problem, task.depth)
    trained = task.depth.steps * recipe.batch_size
    return 3 * trained + fidelity.recalibrate_images + fidelity.score_images


def _in_turn(masks: Sequence[Mask]) -> list[tuple[str, Mask]]:
    """The masks with their names in files; near and different masks take turns."""
    halves = [[mask for mask in masks if mask.is_near == is_near] for is_near in (False, True)]
    return [
        (f"{'near' if mask.is_near else 'different'}{number:02d}", mask)
        for number, pair in enumerate(zip_longest(*halves))
        for mask in pair
        if mask is not None
    ]


def _score_task(
    study: Study, fixed: Mapping[str, Any], file: str, mask: Mask, depth: Depth, repeat: int
) -> Task:
    recipe = asdict(study.problem.settings.fine_tune)
    del recipe["epochs"]  # plays no part in scores
    seed, compute = (study.seed, repeat, _SCORE_STREAM), study.compute
    assert compute is not None  # it was settled before there were tasks
    fidelity = fidelity_of(study.problem, depth)
    key = {
        **fixed,
        **_mask_key(study, mask),
        **asdict(depth),
        "kind": str(depth),
        "repeat": repeat,
        "score_images": fidelity.score_images,
        "recipe": recipe,
        "seed": seed,
    }
    if depth.images == "few":
        key["score_recalibrate_images"] = fidelity.recalibrate_images
    measurement = Measurement[FidelityWorker](
        cell=Cell(name=_cell_name(file, depth, repeat), key=key),
        ask=lambda worker: worker.score(compute, mask.keep, depth, seed),
        timeout=study.score_timeout or _PATIENCE_S,
    )
    return Task(measurement=measurement, mask=mask, depth=depth, repeat=repeat)


def _truth_task(study: Study, fixed: Mapping[str, Any], file: str, mask: Mask, repeat: int) -> Task:
    recipe, seed = study.problem.settings.fine_tune, study.seed + repeat
    key = {
        **fixed,
        **_mask_key(study, mask),
        "kind": TRUTH,
        "repeat": repeat,
        "recipe": asdict(recipe),
        "seed": seed,
    }
    assert study.compute is not None  # it was settled before there were tasks
    cell = Cell(name=f"{file}-{TRUTH}-{repeat}", key=key)
    tuning = TuningTask(
        keep=mask.keep,
        recipe=recipe,
        seed=seed,
        compute=study.compute,
        folder=folder_under_way(study.work_dir, cell),
    )
    measurement = Measurement[FidelityWorker](
        cell=cell, ask=lambda worker: worker.truth(tuning), timeout=_PATIENCE_S
    )
    return Task(measurement=measurement, mask=mask, depth=None, repeat=repeat)


def _mask_key(study: Study, mask: Mask) -> dict[str, Any]:
    space = study.problem.tracing.space
    return {
        "mask": mask.name,
        "keep": pack_mask(mask.keep),
        "is_near": mask.is_near,
        "parameters_left": space.parameters(mask.keep) / space.dense_parameters,
    }


def _cell_name(file: str, depth: Depth, repeat: int) -> str:
    few = "-few" if depth.images == "few" else ""
    return f"{file}-{depth.steps}steps{few}-{repeat}"
