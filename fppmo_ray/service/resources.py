"""The workers that a search runs on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated

import tyro

from fppmo_ray.service.pool.cluster import Demand
from fppmo_ray.service.pool.in_flight import TimeLimits
from fppmo_ray.service.setting_groups import require


@dataclass(frozen=True, kw_only=True)
class Resources:
    """The workers of a search. Of these settings, only threads and device type change scores."""

    workers: int = 2
    """Number of workers to ask the cluster for; they start as resources become free."""
    gpus: Annotated[float, tyro.conf.arg(name="gpus-per-worker")] = 0.0
    """Share of a GPU that each worker holds, at most 1. Workers that share a GPU compute in turns;
    where NVIDIA's MPS runs on the node (``nvidia-cuda-mps-control -d`` before Ray is started), they
    compute side by side. 0: scores run on CPUs."""
    cpus: Annotated[int, tyro.conf.arg(name="cpus-per-worker")] = 1
    """CPUs that each worker holds. torch uses as many threads, unless autotune finds fewer to be
    faster."""
    fine_tune_workers: int = 1
    """Number of processes (Ray Train) that share each training of the baseline, between stages and
    at the end, each with a whole GPU if workers hold any. 1 trains the networks side by side, each
    on one worker. The recipe's batch_size is that of all of them together, so the learning rate
    stays. With batches of thousands, scale it with them and warm up (1706.02677): schedule
    one_cycle. On GPUs, batch norms are synchronised where a process has fewer than 32 images."""
    accelerator_type: str | None = None
    """Kind of GPU that each worker needs, by Ray's name: ``A100``, ``H100``, ``L4``. None: any."""
    memory_gib: float = 0.0
    """Memory that each worker needs, in GiB; Ray starts workers on a node until its memory is given
    away. 0: memory does not count."""
    custom_resources: dict[str, float] = field(default_factory=dict)
    """Amounts of custom resources of the cluster's nodes that each worker needs, by name."""
    labels: dict[str, str] = field(default_factory=dict)
    """Ray's selector of the nodes for workers, by label: ``market-type spot``,
    ``region in(us-west4,us-east1)``, ``ray.io/node-group !head``."""
    score_timeout: float | None = None
    """Seconds after which a score, the trial score at the start included, is taken from its worker,
    which is replaced. None: 10 times the second longest score so far, at least 5 minutes; a day
    until the first one has ended."""
    call_timeout: float | None = None
    """Seconds after which any other call is taken from its worker: loading the data, importance, an
    epoch, an evaluation, the whole fine-tuning of a task of your own. None: learned for each kind
    of call like that of scores."""

    def __post_init__(self) -> None:
        require(self.workers >= 1, "workers", ">= 1", self.workers)
        if not 0 <= self.gpus <= 1:
            raise ValueError(
                f"gpus must be in [0, 1], got {self.gpus}: a worker computes on one GPU; ask for "
                "more workers, and set fine_tune_workers to train a network on several GPUs"
            )
        require(self.memory_gib >= 0, "memory_gib", ">= 0", self.memory_gib)
        for name, amount in self.custom_resources.items():
            require(amount > 0, f"custom_resources {name}", "> 0", amount)
        if self.accelerator_type is not None and not self.gpus:
            raise ValueError(
                f"accelerator_type {self.accelerator_type} needs workers with GPUs, got 0; give "
                "gpus (--gpus-per-worker) too"
            )
        for name in ("cpus", "fine_tune_workers"):
            require(getattr(self, name) >= 1, name, ">= 1", getattr(self, name))
        for name in ("score_timeout", "call_timeout"):
            timeout = getattr(self, name)
            require(timeout is None or timeout > 0, name, "> 0 s", timeout)

    @property
    def demand(self) -> Demand:
        """Resources that the cluster is asked for, for each worker."""
        return Demand(
            cpus=self.cpus,
            gpus=self.gpus,
            memory=round(self.memory_gib * 1024**3),
            custom=self.custom_resources,
            accelerator_type=self.accelerator_type,
            labels=self.labels,
        )

    @property
    def replica_demand(self) -> Demand:
        """Resources of each of several processes that train a network together."""
        return replace(self.demand, gpus=1.0 if self.gpus else 0.0)

    def time_limits(self) -> TimeLimits:
        """Return how long the calls of workers may run, for a pool of its own."""
        scores = ("try_compute", "score", "rescore")
        return TimeLimits(dict.fromkeys(scores, self.score_timeout), others=self.call_timeout)

    @property
    def device_type(self) -> str:
        """``cuda`` if workers hold GPUs, else ``cpu``."""
        return "cuda" if self.gpus > 0 else "cpu"
