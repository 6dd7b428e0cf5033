"""The problem that workers are given: a network and its tracing, a task, and the settings."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

from torch import nn

from fppmo_ray.distribution import Budget, PruningSpace
from fppmo_ray.pruning import Tracing, trace
from fppmo_ray.pruning.copying import copy_network, with_plain_weights
from fppmo_ray.pruning.network_io import opened
from fppmo_ray.service.journal.facts import Started
from fppmo_ray.service.pool.cluster import Demand
from fppmo_ray.service.resources import Resources
from fppmo_ray.service.settings import SearchSettings
from fppmo_ray.service.task import Task
from fppmo_ray.service.worker_protocol import digest, to_arrays
from fppmo_ray.training import ComputeConfig


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What every worker is given once."""

    network: nn.Module
    """The dense network, on the CPU."""
    tracing: Tracing
    """Its tracing, whose space has the limits of the settings."""
    task: Task
    """What the network is for."""
    settings: SearchSettings
    """The settings, as the task reads them and with all that the device type decides."""
    device_type: str
    """``cpu`` or ``cuda``."""
    threads: int
    """CPUs that a worker holds."""
    gpu_share: float
    """GPUs that a worker holds."""
    fine_tune_workers: int = 1
    """Processes that share each training of the baseline, between stages and in the end."""

    demand: Demand = field(default_factory=Demand)
    """Resources of a worker."""
    replica_demand: Demand = field(default_factory=Demand)
    """Resources of each process of a training that several share."""

    @property
    def space(self) -> PruningSpace:
        """The space of masks."""
        return self.tracing.space

    @property
    def compute(self) -> ComputeConfig:
        """How passes are computed, as far as the settings say so."""
        return self.settings.plain_compute(threads=self.threads)

    def identity(self) -> dict[str, Any]:
        """Return all that a search's numbers depend on: a driver that resumes must have the same.

        A changed package version is allowed for packages that no number depends on.
        """
        return {
            "settings": self.settings.journaled(),
            "device_type": self.device_type,
            "threads": self.threads,
            "fine_tune_workers": self.fine_tune_workers,
            "versions": {name: version(name) for name in ("torch", "numpy")},
            "network": digest(to_arrays(self.network)),
            "space": self.space.fingerprint(),
            **self.task.identity(),
        }


def build_problem(
    network: nn.Module,
    task: Task,
    settings: SearchSettings,
    *,
    resources: Resources | None = None,
    calibrates: bool = True,
) -> Problem:
    """Trace a network and check that it, the task and the settings fit together.

    Args:
        network: The trained network; it stays unchanged.
        task: What the network is for.
        settings: What to search for, and how masks are scored.
        resources: Where scores are computed; by default on one CPU.
        calibrates: Whether settings that are left open may ask for a calibration of the dense
            network on the task's images.

    Raises:
        ValueError: they do not fit, the network cannot be pruned, or the budget cannot be reached.
    """
    resources = resources or Resources()
    settings = task.checked_settings(settings, resources)
    settings = settings.on(resources.device_type, has_images=calibrates and task.has_images)
    network = copy_network(opened(network)).cpu()  # workers unpickle it on devices of their own
    tracing = _limited_tracing(network, task, settings)
    network = with_plain_weights(network)
    task.check_network(network)
    return Problem(
        network=network,
        tracing=tracing,
        task=task,
        settings=settings,
        device_type=resources.device_type,
        threads=resources.cpus,
        gpu_share=resources.gpus,
        fine_tune_workers=resources.fine_tune_workers,
        demand=resources.demand,
        replica_demand=resources.replica_demand,
    )


def started_of(problem: Problem, search_id: str, versions: dict[str, str]) -> Started:
    """Return the first fact of a search's journal.

    Args:
        problem: The search.
        search_id: Its identifier.
        versions: Versions of the packages in use.
    """
    space = problem.space
    return Started(
        search_id=search_id,
        identity=problem.identity(),
        versions=versions,
        groups=[group.name for group in space.groups],
        num_filters=space.num_filters,
        dense_macs=space.dense_macs,
        dense_parameters=space.dense_parameters if space.tensor_sizes else 0,
        images=problem.task.num_images(),
        at=time.time(),
    )


def budgets_of(space: PruningSpace, settings: SearchSettings) -> list[Budget]:
    """Return the budget of every macs_cut, without a latency limit until latency is measured.

    Args:
        space: The space of masks.
        settings: The cuts.

    Raises:
        ValueError: a cut cannot be reached under the space's limits.
    """
    cuts = settings.further_cuts
    if space.latency is None:
        cuts.pop("latency", None)
    return [
        Budget.from_cut(space, macs_cut, cuts)
        if macs_cut or cuts
        else Budget(space, space.dense_macs)
        for macs_cut in settings.macs_cuts
    ]


def _limited_tracing(network: nn.Module, task: Task, settings: SearchSettings) -> Tracing:
    """Trace a network, and put the limits of the settings on the widths."""
    tracing = trace(network, task.inputs(), ignore=settings.space.ignore)
    assert settings.space.multiple is not None  # the device type has decided it
    space = tracing.space.with_limits(
        min_keep=settings.space.min_keep,
        multiple=None if settings.space.multiple == "wide" else settings.space.multiple,
        layers=settings.space.layer_limits,
    )
    budgets_of(space, settings)  # refuses what these limits cannot reach
    return replace(tracing, space=space)
