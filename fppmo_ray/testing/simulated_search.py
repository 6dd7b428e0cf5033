"""Simulated searches: the real loop, journal and Ray actors around scores that only take time.

For chaos, scaling and tests of the loop. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from fppmo_ray.distribution import (
    ChannelGroup,
    Feedback,
    Finalist,
    LayerCost,
    OptimizerSettings,
    Proposal,
    PruningSpace,
    Width,
)
from fppmo_ray.service.journal.facts import Started
from fppmo_ray.service.journal.run_directory import Resume, RunDirectory, open_run
from fppmo_ray.service.pool.call import Call
from fppmo_ray.service.pool.cluster import Demand, explain_ray_errors
from fppmo_ray.service.pool.worker_group import WorkerInfo, worker_info
from fppmo_ray.service.pool.worker_pool import WorkerPool, worker_pool
from fppmo_ray.service.progress import watch
from fppmo_ray.service.search_loop import (
    ModelHandle,
    Proposer,
    count_scored,
    running_model,
    score_proposals,
)
from fppmo_ray.service.stopping import stop_on_signal

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


SIMULATED_SPACE = _chain()
"""Four layers of 16 filters, one after the other."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Duration of simulated scores."""

    mean_seconds: float = 0.1
    """Mean duration, >= 0."""
    spread: float = 0.2
    """Standard deviation over the mean, in [0, 0.57]; durations are uniformly distributed."""

    def __post_init__(self) -> None:
        if self.mean_seconds < 0:
            raise ValueError(f"mean_seconds must be >= 0 s, got {self.mean_seconds}")
        if not 0 <= self.spread <= 0.57:
            raise ValueError(f"spread must be in [0, 0.57], got {self.spread}")


class ScoresProposals(Protocol):
    """A worker that scores proposals without weights: a ``SimulatedWorker``, or a test's own."""

    def score(self, proposal: Proposal) -> Feedback:
        """Return the feedback of a proposal."""


class SimulatedWorker:
    """Scores a mask as a function of mask and seed alone, in a time that is one as well.

    Its loss is low for masks that keep filters with even numbers, and slightly noisy.

    Args:
        pace: Duration of the scores.
        slot: Number of the worker in its group.
    """

    def __init__(self, pace: Pace, slot: int) -> None:
        self._pace = pace
        self._slot = slot

    def __repr__(self) -> str:
        return f"SimulatedWorker({self._slot})"

    def ready(self) -> WorkerInfo:
        """Return where the worker runs."""
        return worker_info(self._slot)

    def score(self, proposal: Proposal) -> Feedback:
        """Sleep for the duration of the score, then return it."""
        seed = repr(tuple(proposal.score_seed)).encode()
        digest = hashlib.sha256(np.packbits(proposal.keep).tobytes() + seed)
        deviation, noise = np.random.default_rng(list(digest.digest())).uniform(-1, 1, size=2)
        seconds = self._pace.mean_seconds * (1 + math.sqrt(3) * self._pace.spread * deviation)
        time.sleep(seconds)
        loss = float(proposal.keep[1::2].mean() + 0.02 * noise)
        return Feedback(
            proposal_id=proposal.proposal_id,
            val_loss=loss,
            val_accuracy=math.exp(-2 - loss),
            seconds=seconds,
        )


def simulated_search(
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
        run_dir: Folder or URI of the journal, as for ``search``.
        settings: Settings of the probability model.
        workers: Number of simulated workers.
        pace: Duration of their scores. Not part of the search's identity.
        demand: Resources that each worker asks of the cluster; by default none.
        resume: Resume the search in ``run_dir``.

    Returns:
        The finalists; none is rescored.
    """
    with simulated_run(run_dir, settings, resume=resume) as run:

        def how_far() -> str:
            return f"{count_scored(run)} of {settings.num_proposals} proposals are scored"

        with (
            explain_ray_errors(),
            stop_on_signal(how_far) as stop,
            simulated_model(settings) as model,
            worker_pool(
                SimulatedWorker,
                pace or Pace(),
                num_workers=workers,
                demand=demand or Demand(),
                stop=stop,
            ) as pool,
        ):
            return search_with(run, model, pool, settings)


@contextmanager
def simulated_model(settings: OptimizerSettings) -> Iterator[ModelHandle]:
    """Yield a real probability-model actor over the simulated space."""
    importance = np.linspace(1.0, 2.0, SIMULATED_SPACE.num_filters)
    with running_model(SIMULATED_SPACE, importance, settings) as model:
        yield model


@contextmanager
def simulated_run(
    run_dir: Path | str, settings: OptimizerSettings, *, resume: Resume = False
) -> Iterator[RunDirectory]:
    """Yield the run directory of a simulated search, as its one writer.

    Args:
        run_dir: Folder or URI of the journal.
        settings: Settings of the search, which its identity consists of.
        resume: As for ``search``.
    """
    # With what status and report read of a search's settings.
    scoring = {"rank_by": settings.rank_by, "capacity_weight": settings.capacity_weight}
    as_of_search = {"proposals": settings.num_proposals, "scoring": scoring}
    as_of_search |= {"gradual": {"stages": []}}
    started = Started(
        search_id="simulated",
        identity={
            "settings": asdict(settings) | as_of_search,
            "space": SIMULATED_SPACE.fingerprint(),
        },
        versions={"numpy": np.__version__},
        groups=[group.name for group in SIMULATED_SPACE.groups],
        num_filters=SIMULATED_SPACE.num_filters,
        dense_macs=SIMULATED_SPACE.dense_macs,
    )
    with open_run(run_dir, resume=resume) as run:
        run.start(started)
        yield run


def search_with(
    run: RunDirectory,
    model: Proposer,
    pool: WorkerPool[ScoresProposals],
    settings: OptimizerSettings,
    *,
    timeout: float | None = None,
) -> list[Finalist]:
    """Score all proposals with these parts, and return the finalists.

    Args:
        run: Where facts are recorded.
        model: The probability model, or another proposer.
        pool: Workers with nothing unfinished.
        settings: Settings of the model.
        timeout: Seconds after which a score is taken from its worker; None: learned.
    """

    def score_call(proposal: Proposal) -> Call[ScoresProposals, Feedback]:
        name = f"proposal {proposal.proposal_id}"
        return Call(name, lambda worker: worker.score(proposal), timeout=timeout)

    merit = settings.merit(SIMULATED_SPACE)
    with watch(run, settings, merit) as progress:
        score_proposals(model, pool, run, score_call, progress)
    return model.finalists()
