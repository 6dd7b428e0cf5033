"""The worker of the searches job: a whole search in one process, some scores per call."""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from cells import Measured
from fine_tuning import Tuner

from fppmo_ray.distribution import (
    BoolArray,
    Feedback,
    MaskOptimizer,
    Proposal,
    UpdateRule,
)
from fppmo_ray.durable_files import write_whole
from fppmo_ray.pruning import Fidelity, Score, importance, score
from fppmo_ray.pruning.compute_trial import ComputeTrial
from fppmo_ray.service.pool.worker_group import WorkerInfo, worker_info
from fppmo_ray.service.problem import Problem
from fppmo_ray.service.settings import SearchSettings
from fppmo_ray.training import ComputeConfig, DType, native_dtype

_SCORES_A_CALL = 80  # what ends a job costs it so many at most
_LOOK_STREAM = 3  # seeds [seed, repeat, 3]: never those of proposals or of rescored finalists


@dataclass(frozen=True, kw_only=True, eq=False)
class SearchTask:
    """A search to run."""

    settings: SearchSettings
    rule: UpdateRule
    compute: ComputeConfig
    folder: Path
    """Folder of its scores, which all workers must see."""


class SearchWorker:
    """A Ray actor that runs searches on its CPUs or its GPU.

    Args:
        problem: The network and its data.
        slot: Number of the worker in the pool.
    """

    def __init__(self, problem: Problem, slot: int) -> None:
        self._slot = slot
        self._problem = problem
        self._tuner = Tuner(problem)
        self._dense = copy.deepcopy(problem.network).to(self._tuner.device).eval()

    def ready(self) -> WorkerInfo:
        """Put the images on the device, then tell where the worker runs."""
        self._tuner.open()
        return worker_info(self._slot)

    def native_dtype(self) -> DType:
        """Return the fastest dtype that this worker's processor has units for."""
        return native_dtype(self._tuner.device)

    def try_compute(self, compute: ComputeConfig, keep: BoolArray) -> ComputeTrial:
        """Measure how long a score of a mask takes with a compute configuration.

        Args:
            compute: How the passes are computed.
            keep: ``(num_filters,)``, True = kept.
        """
        torch.set_num_threads(compute.threads)
        return self._tuner.classification.try_compute(self._dense, keep, compute)

    def measure(self, task: SearchTask) -> Measured | None:
        """Score some more proposals; after the last, evaluate what the search found.

        Args:
            task: The search.

        Returns:
            None while more proposals are to come.
        """
        torch.set_num_threads(task.compute.threads)
        task.folder.mkdir(parents=True, exist_ok=True)
        file = task.folder / "scores.json"
        scores: list[list[float]] = json.loads(file.read_bytes()) if file.is_file() else []
        optimizer = self._optimizer(task)
        known = {int(proposal_id): values for proposal_id, *values in scores}
        waiting = _replayed(optimizer, known)
        left = _SCORES_A_CALL
        while waiting and left:
            now = waiting[:left]
            scored = [self._score(task, proposal) for proposal in now]
            ids = [proposal.proposal_id for proposal in now]
            new = {i: [*_figures(item), item.seconds] for i, item in zip(ids, scored, strict=True)}
            scores += [[i, *values] for i, values in new.items()]
            _tell(optimizer, new)
            left -= len(now)
            waiting = waiting[len(now) :] or optimizer.ask()
        write_whole(file, json.dumps(scores).encode())
        if not optimizer.finished:
            return None
        figures = {
            "found": self._found(task, optimizer),
            "generations": _generation_means(scores, task.settings.sampler.population),
            "scores": len(scores),
        }
        return Measured(figures=figures, seconds=sum(seconds for *_, seconds in scores))

    def _optimizer(self, task: SearchTask) -> MaskOptimizer:
        settings = replace(task.settings.optimizer_settings(), rule=task.rule)
        tracing = self._problem.tracing
        return MaskOptimizer(
            tracing.space,
            importance(self._dense, tracing, task.settings.sampler.importance or "fpgm"),
            settings,
        )

    def _score(self, task: SearchTask, proposal: Proposal) -> Score:
        fidelity, seed = task.settings.fidelity(), proposal.score_seed
        return self._score_at(task.compute, proposal.keep, "search_val", fidelity, seed)

    def _found(self, task: SearchTask, optimizer: MaskOptimizer) -> dict[str, dict[str, Any]]:
        """Every finalist's figures on choose-val; none is chosen."""
        return {item.name: self._look(task, item.keep) for item in optimizer.finalists(0)}

    def _look(self, task: SearchTask, keep: BoolArray) -> dict[str, Any]:
        settings = task.settings
        looks = [
            self._score_at(
                *(task.compute, keep, "choose_val", settings.rescore_fidelity()),
                (settings.seed, repeat, _LOOK_STREAM),
            )
            for repeat in range(settings.scoring.rescore_seeds)
        ]
        widths = self._problem.tracing.space.widths(keep).tolist()
        losses, accuracies = zip(*map(_figures, looks), strict=True)
        return {"loss": fmean(losses), "accuracy": fmean(accuracies), "widths": widths}

    def _score_at(
        self,
        compute: ComputeConfig,
        keep: BoolArray,
        split: str,
        fidelity: Fidelity,
        seed: tuple[int, ...],
    ) -> Score:
        """Return the score of a mask at a fidelity, which may be another than the problem's."""
        candidate = self._tuner.classification.candidate(
            self._dense, keep, seed=seed, split=split, compute=compute
        )
        return score(replace(candidate, fidelity=fidelity))


def _figures(scored: Score) -> tuple[float, float]:
    """Return the loss and the accuracy of a score."""
    assert scored.val_accuracy is not None  # images are classified
    return scored.val_loss, scored.val_accuracy


def _replayed(optimizer: MaskOptimizer, known: dict[int, list[float]]) -> list[Proposal]:
    """Tell the optimizer the known scores; return the proposals that it asks for beyond them."""
    waiting: list[Proposal] = []
    while asked := optimizer.ask():
        ids = {proposal.proposal_id for proposal in asked}
        _tell(optimizer, {i: known[i] for i in ids & known.keys()})
        waiting += [proposal for proposal in asked if proposal.proposal_id not in known]
    return waiting


def _tell(optimizer: MaskOptimizer, scores: dict[int, list[float]]) -> None:
    for proposal_id, (loss, accuracy, _) in sorted(scores.items()):
        optimizer.tell(Feedback(proposal_id=proposal_id, val_loss=loss, val_accuracy=accuracy))


def _generation_means(scores: Sequence[Sequence[float]], population: int) -> list[float]:
    """Mean loss of every generation's proposals."""
    losses = defaultdict(list)
    for proposal_id, loss, *_ in scores:
        losses[int(proposal_id) // population].append(loss)
    return [round(fmean(losses[generation]), 4) for generation in sorted(losses)]
