"""A search whose scores only take time: the real loop over workers that pretend.

For chaos, scaling and tests of the loop. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from fppmo_ray.distribution import (
    BoolArray,
    ChannelGroup,
    Finalist,
    LayerCost,
    OptimizerSettings,
    PruningSpace,
    Width,
)
from fppmo_ray.service.model_handle import ModelHandle
from fppmo_ray.service.pool.place import Place, here
from fppmo_ray.service.pool.ray_errors import ray_errors_said
from fppmo_ray.service.pool.resources import Demand
from fppmo_ray.service.pool.worker_pool import WorkerPool, worker_pool
from fppmo_ray.service.record.facts import Started
from fppmo_ray.service.record.run_directory import RunDirectory, open_run
from fppmo_ray.service.scoring import Scoring, score_proposals
from fppmo_ray.service.stopping import stop_on_signal
from fppmo_ray.service.watching.progress import watch

_GROUPS, _FILTERS = 4, 16


def _chain() -> PruningSpace:
    groups = tuple(ChannelGroup(name=f"conv{i}", num_filters=_FILTERS) for i in range(_GROUPS))
    costs = tuple(
        LayerCost(
            layer=f"conv{i}",
            macs_per_pair=9,
            out_width=Width(terms=((i, 1),)),
            in_width=Width(terms=((i - 1, 1),)) if i else Width(constant=3),
        )
        for i in range(_GROUPS)
    )
    return PruningSpace(groups, costs).with_limits(min_keep=0.1)


PRETEND_SPACE = _chain()
"""Four layers of 16 filters, one after the other."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How long pretended scores take, without steps; each step takes as long again."""

    mean_seconds: float = 0.1
    spread: float = 0.2
    """Standard deviation over the mean, in [0, 0.57]: uniformly distributed."""

    def __post_init__(self) -> None:
        if self.mean_seconds < 0:
            raise ValueError(f"mean_seconds must be >= 0 s, got {self.mean_seconds}")
        if not 0 <= self.spread <= 0.57:
            raise ValueError(f"spread must be in [0, 0.57], got {self.spread}")


@dataclass(frozen=True, kw_only=True)
class PretendScore:
    """What a worker pretends to have found."""

    val_loss: float
    val_accuracy: float
    seconds: float


class PretendWorker:
    """Scores a mask as a function of mask, seed and steps alone, in a time that is one as well.

    Its loss likes the filters with even numbers, and is noisy where steps are few.
    """

    def __init__(self, pace: Pace, slot: int) -> None:
        self._pace = pace
        self._slot = slot

    def __repr__(self) -> str:
        return f"PretendWorker({self._slot})"

    def ready(self) -> Place:
        """Where the worker runs."""
        return here(self._slot)

    def score(
        self, weights: object, keep: BoolArray, seed: Sequence[int], held_out: str, steps: int = 0
    ) -> PretendScore:
        """Sleep, then answer. Weights and split do not matter; steps take time and noise away."""
        del weights, held_out
        digest = hashlib.sha256(np.packbits(keep).tobytes() + repr(tuple(seed)).encode())
        deviation, noise = np.random.default_rng(list(digest.digest())).uniform(-1, 1, size=2)
        seconds = self._pace.mean_seconds * (1 + math.sqrt(3) * self._pace.spread * deviation)
        seconds *= 1 + steps
        time.sleep(seconds)
        loss = float(keep[1::2].mean() + 0.02 * noise / (1 + steps))
        return PretendScore(val_loss=loss, val_accuracy=math.exp(-2 - loss), seconds=seconds)


@contextmanager
def pretend_model(settings: OptimizerSettings) -> Iterator[ModelHandle]:
    """A real probability model over the pretended space."""
    importance = np.linspace(1.0, 2.0, PRETEND_SPACE.num_filters)
    model = ModelHandle(PRETEND_SPACE, importance, settings)
    try:
        yield model
    finally:
        model.close()


def pretend_search(
    run_dir: Path | str,
    settings: OptimizerSettings,
    *,
    workers: int = 2,
    pace: Pace | None = None,
    demand: Demand | None = None,
    resume: bool = False,
) -> list[Finalist]:
    """Search on the Ray that is initialised, and journal it like any search.

    Args:
        run_dir: As of ``search``.
        settings: Of the probability model.
        workers: Pretending workers.
        pace: How long their scores take. Not part of the search's identity.
        demand: What each worker asks of the cluster; by default nothing.
        resume: Go on with the search that ``run_dir`` holds.

    Returns:
        The finalists; none is rescored.
    """
    with (
        pretend_run(run_dir, settings, resume=resume) as run,
        ray_errors_said(),
        stop_on_signal(run, settings.num_proposals) as stop,
        pretend_model(settings) as model,
        worker_pool(
            PretendWorker,
            pace or Pace(),
            num_workers=workers,
            demand=demand or Demand(),
            stop=stop,
        ) as pool,
    ):
        return search_with(run, model, pool, settings)


@contextmanager
def pretend_run(
    run_dir: Path | str, settings: OptimizerSettings, *, resume: bool = False
) -> Iterator[RunDirectory]:
    """The run directory of a pretended search, as its one writer."""
    started = Started(
        search_id="pretend",
        identity={"settings": asdict(settings), "space": PRETEND_SPACE.fingerprint()},
        versions={"numpy": np.__version__},
        groups=[group.name for group in PRETEND_SPACE.groups],
        dense_macs=PRETEND_SPACE.dense_macs,
    )
    with open_run(run_dir, resume=resume) as run:
        run.start(started)
        yield run


def search_with(
    run: RunDirectory,
    model: ModelHandle,
    pool: WorkerPool,
    settings: OptimizerSettings,
    *,
    timeout: float | None = None,
) -> list[Finalist]:
    """Score all proposals with these parts; the finalists.

    Args:
        run: Where facts are recorded.
        model: Of ``pretend_model``.
        pool: Of ``pretend_pool``.
        settings: Of the model.
        timeout: Seconds after which a score is taken from its worker; None: learned.
    """
    deepest = max(settings.rungs, default=0)
    scoring = Scoring(round=0, weights=None, rung=deepest, timeout=timeout)
    with watch(run, settings, Console(quiet=True)) as progress:
        score_proposals(model, pool, run, scoring, progress)
    return model.finalists()
