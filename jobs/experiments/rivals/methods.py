"""The methods of a comparison: each chooses the filters to keep, all at the same MACs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fine_tuning import classification_of

from fppmo_ray import Resources
from fppmo_ray.distribution import BoolArray, Budget, Feedback, FloatArray
from fppmo_ray.durable_files import write_whole
from fppmo_ray.pruning import importance
from fppmo_ray.pruning.importance import Ordering
from fppmo_ray.service.choices import Found
from fppmo_ray.service.dense_network import Context, dense_weights
from fppmo_ray.service.journal.facts import Fact, Rescored, pack_mask, unpack_mask
from fppmo_ray.service.journal.run_directory import open_run, read_journal
from fppmo_ray.service.journal.storage import stage_run_dir
from fppmo_ray.service.mask_search import find_mask, find_mask_in_stages, find_mask_with
from fppmo_ray.service.pool.worker_pool import WorkerPool
from fppmo_ray.service.problem import Problem, started_of
from fppmo_ray.service.search_id import search_id
from fppmo_ray.service.settings import SearchSettings
from fppmo_ray.service.worker_protocol import Arrays, Worker, to_arrays
from fppmo_ray.training import ComputeConfig
from fppmo_ray.versions import package_versions
from rivals.fastnas import fastnas_choice
from rivals.rankings import (
    batchnorm_scales,
    ranked_globally,
    taylor_scores,
    uniform,
    with_widths,
)
from rivals.searches import Draw, LeGR, RivalSearch, random_widths
from rivals.torch_pruning_masks import torch_pruning_mask

FPPMO, UNIFORM, FASTNAS = "fppmo", "uniform-l1", "fastnas"
_TAYLOR_BATCH, _TAYLOR_BATCHES = 125, 8
_RANDOM_FILTERS = 3  # stream of random numbers


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method, with its own number of scores if it was named as ``name@scores``."""

    name: str
    scores: int | None = None

    def __str__(self) -> str:
        return self.name if self.scores is None else f"{self.name}@{self.scores}"

    @property
    def is_search(self) -> bool:
        """Whether the method spends scores."""
        return self.name in SEARCHES

    @property
    def needs_fppmo(self) -> bool:
        """Whether the method is a control that shares something with FPPMO's network."""
        return self.name in CONTROLS and self.name != DENSE


def method_of(text: str) -> Method:
    """Return the method that a flag names.

    Raises:
        ValueError: there is none of that name, or it takes no number of scores.
    """
    name, at, scores = text.partition("@")
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    if not at:
        return Method(name=name)
    if name not in SEARCHES or not scores.isdecimal():
        raise ValueError(f"expected NAME@SCORES with a name of {', '.join(SEARCHES)}, got {text!r}")
    return Method(name=name, scores=int(scores))


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One seed of a comparison: what all its methods start from."""

    problem: Problem
    compute: ComputeConfig

    @property
    def settings(self) -> SearchSettings:
        """The settings of the problem, whose seed is the case's."""
        return self.problem.settings

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Digests of weights and data, and what else a search's journal is opened with."""
        return self.problem.identity()

    @property
    def budget(self) -> Budget:
        """That every method meets."""
        return Budget.from_cut(self.problem.space, self.settings.only_macs_cut())

    def importance(self, criterion: Ordering) -> FloatArray:
        """Return the importance of each filter by a criterion, scaled to mean 1 in every layer."""
        return importance(self.problem.network, self.problem.tracing, criterion)

    @property
    def trained(self) -> Arrays:
        """The dense weights."""
        return to_arrays(self.problem.network)


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """What a method chose, and its cost."""

    keep: BoolArray | None
    """``(num_filters,)``, True = kept; None for the dense network."""
    weights: Arrays
    """Dense weights that fine-tuning starts from, cut by ``keep``."""
    finalist: str | None = None
    """Name of the finalist that a search chose."""
    scores: int = 0
    rescores: int = 0
    """Scores on choose-val that picked the finalist."""
    score_seconds: float = 0.0
    """Seconds of all scores and rescores, on the workers."""


def one_shot(case: Case, name: str) -> Choice:
    """Return the choice of a method without scores.

    Args:
        case: One seed of a comparison.
        name: One of ``ONE_SHOT``.
    """
    return Choice(keep=ONE_SHOT[name](case), weights=case.trained)


def _taylor(case: Case) -> BoolArray:
    on_cpu = classification_of(case.problem).open(
        case.problem.tracing, case.settings, torch.device("cpu"), threads=case.problem.threads
    )
    images = on_cpu.images("search_train")
    count = min(_TAYLOR_BATCH * _TAYLOR_BATCHES, len(images))
    chosen = np.sort(np.random.default_rng(case.settings.seed).permutation(len(images))[:count])
    network = case.problem.network.eval()
    batches = images.batches(_TAYLOR_BATCH, chosen)
    return case.budget.fill(taylor_scores(network, case.problem.tracing, batches))


def _bn_scale(case: Case) -> BoolArray:
    return case.budget.fill(batchnorm_scales(case.problem.network, case.problem.tracing))


def _torch_pruning(case: Case, *, global_pruning: bool) -> BoolArray:
    problem = case.problem
    return torch_pruning_mask(
        problem.network,
        problem.tracing,
        case.budget,
        problem.task.inputs()[0],
        global_pruning=global_pruning,
    )


ONE_SHOT: dict[str, Callable[[Case], BoolArray]] = {
    UNIFORM: lambda case: uniform(case.budget, case.importance("l1")),
    "fpgm": lambda case: uniform(case.budget, case.importance("fpgm")),
    "global-l1": lambda case: ranked_globally(case.budget, case.importance("l1")),
    "bn-scale": _bn_scale,
    "taylor": _taylor,
    "torch-pruning": partial(_torch_pruning, global_pruning=False),
    "torch-pruning-global": partial(_torch_pruning, global_pruning=True),
}


def search_choice(
    case: Case, name: str, pool: WorkerPool[Worker], run_dir: Path, resources: Resources
) -> Choice:
    """Return what a search chooses; it resumes where its journal ends.

    Args:
        case: The case, with the settings of this search.
        name: One of ``SEARCHES``.
        pool: Workers with nothing unfinished.
        run_dir: Run directory of the search.
        resources: The workers of stages, if there are any.
    """
    started = started_of(case.problem, search_id(run_dir), package_versions())
    with open_run(run_dir, resume="auto", started=started) as run:
        context = Context(problem=case.problem, run=run, pool=pool, compute=case.compute)
        if case.settings.gradual.stages:
            found = find_mask_in_stages(context, run_dir, resources, ())
            stages = (stage_run_dir(run_dir, 1 + stage) for stage in range(found.stages))
            return _choice(found, [fact for stage in stages for fact in read_journal(stage)])
        return _choice(SEARCHES[name](case, context), run.facts)


def _choice(found: Found, facts: Sequence[Fact]) -> Choice:
    scored = [fact for fact in facts if isinstance(fact, Feedback) and not fact.failed]
    rescored = [fact for fact in facts if isinstance(fact, Rescored)]
    seconds = [*(fact.seconds or 0.0 for fact in scored), *(fact.seconds for fact in rescored)]
    [choice] = found.choices
    return Choice(
        keep=choice.chosen.keep,
        weights=found.weights.snapshot.arrays,
        finalist=choice.chosen.name,
        scores=len(scored),
        rescores=len(rescored),
        score_seconds=sum(seconds),
    )


def _own_search(_: Case, context: Context) -> Found:
    return find_mask(context, listeners=())


def _rival_search(case: Case, context: Context, *, draw_of: Callable[[Case], Draw]) -> Found:
    importance_only = uniform(
        case.budget, case.importance(case.settings.sampler.importance or "fpgm")
    )
    search = RivalSearch(
        draw_of(case), case.budget, case.settings.optimizer_settings(), importance_only
    )
    weights = dense_weights(context)
    return find_mask_with(search, context, weights, listeners=())


def _legr(case: Case) -> Draw:
    settings = case.settings
    return LeGR(case.budget, case.importance("l2"), settings.num_proposals, settings.seed)


def _random_widths(case: Case) -> Draw:
    return random_widths(case.budget, case.importance("l1"), case.settings.seed)


_DRAWS: dict[str, Callable[[Case], Draw]] = {"legr": _legr, "random-widths": _random_widths}
_WEIGHED = {f"{name}-weighed": draw for name, draw in _DRAWS.items()}
"""Rivals that judge as FPPMO does, by weighed losses: what is left is how masks are proposed."""
SEARCHES: dict[str, Callable[[Case, Context], Found]] = {
    FPPMO: _own_search,
    "random": _own_search,
    **{name: partial(_rival_search, draw_of=draw) for name, draw in (_DRAWS | _WEIGHED).items()},
}


def foreign_choice(case: Case, memory: Path) -> Choice:
    """Return the choice of FastNAS, kept in a file, since its search cannot be resumed.

    Args:
        case: One seed of a comparison.
        memory: The file.
    """
    space = case.problem.tracing.space
    if not memory.is_file():
        found = fastnas_choice(
            case.problem,
            case.budget,
            score_images=case.settings.scoring.rescore_images,
            compute=case.compute,
            seed=case.settings.seed,
        )
        known = {"scores": found.scores, "seconds": found.seconds, "mask": pack_mask(found.keep)}
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_whole(memory, json.dumps(known).encode())
    known = json.loads(memory.read_bytes())
    return Choice(
        keep=unpack_mask(known["mask"], space.num_filters),
        weights=case.trained,
        scores=known["scores"],
        score_seconds=known["seconds"],
    )


def settings_of(method: Method, settings: SearchSettings) -> SearchSettings:
    """Return the settings of a method's search.

    Rivals prune in one shot and judge by losses as they are, as published, unless their name ends
    in ``-weighed``. So ``--rule``, ``--capacity-weight`` and ``--stages`` do not change them.

    Args:
        method: A search, or a control that needs FPPMO's.
        settings: The settings of the flags.
    """
    if method.is_search and method.name != FPPMO:
        weight = settings.scoring.capacity_weight if method.name in _WEIGHED else 0.0
        settings = settings.changed(rule="random", capacity_weight=weight, stages=())
    return replace(settings, proposals=method.scores or settings.proposals)


def control(case: Case, name: str, chosen: BoolArray, untrained: Arrays) -> Choice:
    """Return a network that shares only its mask or its widths with FPPMO's.

    Args:
        case: Its seed also draws random filters.
        name: One of ``CONTROLS``, but not the dense network.
        chosen: FPPMO's mask.
        untrained: Fresh dense weights.
    """
    if name == SCRATCH:
        return Choice(keep=chosen, weights=untrained)
    space = case.problem.tracing.space
    if name == "chosen-widths-l1":
        order = case.importance("l1")
    else:
        order = np.random.default_rng([case.settings.seed, _RANDOM_FILTERS]).random(
            space.num_filters
        )
    return Choice(keep=with_widths(space, space.widths(chosen), order), weights=case.trained)


DENSE, SCRATCH = "dense", "scratch"
CONTROLS = (DENSE, SCRATCH, "chosen-widths-l1", "chosen-widths-random")
FIRST_GROUP = (UNIFORM, "fpgm", "global-l1", "bn-scale", "random", "legr", FPPMO)
SECOND_GROUP = (
    *("taylor", "random-widths", *_WEIGHED),
    *("torch-pruning", "torch-pruning-global", FASTNAS),
)
METHODS = (*FIRST_GROUP, *SECOND_GROUP, *CONTROLS)
