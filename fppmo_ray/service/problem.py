"""The problem that workers are given: a network and its tracing, a task, and the settings.

``Task`` and ``TaskOnWorker`` are the protocols of a task, on the driver and on a worker.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fppmo_ray.distribution import BoolArray, Budget, PruningSpace
from fppmo_ray.pruning import Score, Tracing, trace
from fppmo_ray.pruning.calibration import Calibration
from fppmo_ray.pruning.compute_trial import ComputeTrial, Timed
from fppmo_ray.pruning.copying import copy_network, with_plain_weights
from fppmo_ray.pruning.network_io import opened
from fppmo_ray.service.journal.facts import DenseScored, Started
from fppmo_ray.service.pool.cluster import Demand
from fppmo_ray.service.resources import Resources
from fppmo_ray.service.settings import SearchSettings
from fppmo_ray.service.worker_protocol import (
    Tested,
    TrainingReport,
    TrainingTask,
    digest,
    to_arrays,
)
from fppmo_ray.training import ComputeConfig, Interface, Shard, TrainingState


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
    clock: str | None = None
    """Name of the user's clock of latencies; None: a worker measures them."""

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
            **({} if self.clock is None else {"latency": self.clock}),
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
        multiple=settings.space.multiple,
        layers=settings.space.layer_limits,
    )
    budgets_of(space, settings)  # refuses what these limits cannot reach
    return replace(tracing, space=space)


Batches = Iterable[tuple[Tensor, Tensor]]


class TaskOnWorker(Protocol):
    """A task in a worker's process, with its data on the worker's device.

    The dense network that a method is given is in eval mode, with the right weights, and must stay
    unchanged.
    """

    latency_batches: Sequence[int]
    """Images per pass at which the latency of the final networks is measured."""

    def load(self) -> None:
        """Load what every score needs, so that the first score is not slower than others."""

    def inputs(self) -> tuple[Tensor, ...]:
        """Return the forward's inputs for one image, on the device."""

    def score(
        self,
        dense: nn.Module,
        keep: BoolArray,
        *,
        seed: Sequence[int],
        split: str,
        compute: ComputeConfig,
    ) -> Score:
        """Score the network that a mask leaves.

        Args:
            dense: The dense network.
            keep: The mask, ``(num_filters,)``.
            seed: Seed of everything random in the score.
            split: ``search_val`` for a proposal, ``choose_val`` for a finalist.
            compute: How passes are computed.
        """

    def score_dense(self, dense: nn.Module) -> DenseScored | None:
        """Evaluate the dense network on search-val; None: the task has no accuracy.

        Args:
            dense: The dense network.
        """

    def try_compute(
        self, dense: nn.Module, keep: BoolArray, compute: ComputeConfig, *, of: Timed = "score"
    ) -> ComputeTrial:
        """Measure a score, or an epoch of fine-tuning, with a compute configuration.

        Args:
            dense: The dense network.
            keep: The mask to score or train, ``(num_filters,)``.
            compute: The configuration to try.
            of: What is measured.
        """

    def pruned(self, dense: nn.Module, keep: BoolArray, *, for_epochs: bool = False) -> nn.Module:
        """Return the network that a mask leaves, mended as far as that goes without training.

        Args:
            dense: The dense network.
            keep: The mask, ``(num_filters,)``.
            for_epochs: Whether epochs of training follow: they start from refitted layers, and end
                no better from reconstructed ones.
        """

    def importance_batches(self, seed: int) -> Batches | None:
        """Return labelled batches for criteria that look at gradients; None: there are no labels.

        Args:
            seed: Seed of the images that are drawn.
        """

    def calibration(self, dense: nn.Module) -> Calibration | None:
        """Return the calibration of a dense network; None: the task has no images to look at.

        Args:
            dense: The dense network. Its calibration is computed once, so another network object
                must be given after a change of its weights.
        """

    def train_epoch(
        self,
        network: nn.Module,
        task: TrainingTask,
        epoch: int,
        state: TrainingState | None,
        *,
        teacher: nn.Module | None,
        compute: ComputeConfig,
        shard: Shard,
    ) -> tuple[TrainingState, TrainingReport]:
        """Train a network for one epoch, in place; return the new training state and a report.

        Args:
            network: The network, in the state before the epoch.
            task: Its recipe and seed.
            epoch: Epoch, counted from 0.
            state: Training state before the epoch; None before the first.
            teacher: Dense network to distil from, if the recipe distils.
            compute: How passes are computed.
            shard: Which part of every batch this process takes.
        """

    def distill(
        self, network: nn.Module, dense: nn.Module, keep: BoolArray, *, steps: int, seed: int
    ) -> None:
        """Train a pruned network, in place, to answer as the dense one on the calibration images.

        Args:
            network: What the mask leaves, refitted and recalibrated.
            dense: The dense network.
            keep: The mask, ``(num_filters,)``.
            steps: Number of steps.
            seed: Random seed.
        """

    def evaluate(self, network: nn.Module, split: str, dense: nn.Module) -> Tested:
        """Return figures of a network.

        Args:
            network: A network of the caller's own, which may be changed.
            split: ``choose_val`` or ``test``.
            dense: The dense network.
        """


class Task(Protocol):
    """What networks are for: how they are scored, trained and tested.

    ``ImageClassification`` is the built-in task; ``FunctionTask`` makes one of plain functions.
    """

    @property
    def measure(self) -> str | None:
        """The name and unit of the figure in tables: ``PSNR, dB``; None: accuracy."""

    @property
    def follows_compute(self) -> bool:
        """Whether passes follow the compute configuration; False: the task computes by itself."""

    @property
    def shares_training(self) -> bool:
        """Whether several processes can train one network together."""

    @property
    def has_images(self) -> bool:
        """Whether there are images to calibrate a dense network on; their labels are not used."""

    def inputs(self) -> tuple[Tensor, ...]:
        """Return the arguments of the network's forward, with a batch axis, on the CPU."""

    def num_images(self) -> dict[str, int]:
        """Return how many images there are to ``train``, ``score``, ``choose`` and ``test`` on.

        Empty where only the task's functions know.
        """

    def first_lines(self) -> list[str]:
        """Return what users should see of the data before a search, in sentences."""

    def interface(self) -> Interface:
        """Return what networks of the task expect and answer, as far as it is known."""

    def identity(self) -> dict[str, Any]:
        """Return what distinguishes this task from others, as plain data for the journal."""

    def functions(self) -> tuple[Callable[..., Any] | None, ...]:
        """Return the user's functions, which have to travel to the workers."""

    def checked_settings(self, settings: SearchSettings, resources: Resources) -> SearchSettings:
        """Return the settings as this task reads them.

        Args:
            settings: The user's settings.
            resources: Where the search runs.

        Raises:
            ValueError: a setting or the resources does not fit the task.
        """

    def check_network(self, network: nn.Module) -> None:
        """Refuse a network that cannot do the task.

        Args:
            network: The dense network on the CPU.

        Raises:
            ValueError: it does not fit; says why.
        """

    def open(
        self, tracing: Tracing, settings: SearchSettings, device: torch.device, *, threads: int
    ) -> TaskOnWorker:
        """Return the task with its data on a worker's device.

        Args:
            tracing: Tracing of the dense network.
            settings: The settings, as ``checked_settings`` returned them.
            device: The worker's device.
            threads: CPUs that the worker holds.
        """
