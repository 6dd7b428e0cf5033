"""What pruned networks are for: the protocols of a task, on the driver and on a worker."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fppmo_ray.distribution import BoolArray
from fppmo_ray.pruning import Score, Tracing
from fppmo_ray.pruning.calibration import Calibration
from fppmo_ray.pruning.compute_trial import ComputeTrial, Timed
from fppmo_ray.service.journal.facts import DenseScored
from fppmo_ray.service.resources import Resources
from fppmo_ray.service.settings import SearchSettings
from fppmo_ray.service.worker_protocol import Tested, TrainingReport, TrainingTask
from fppmo_ray.training import ComputeConfig, Interface, Shard, TrainingState

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

    def pruned(self, dense: nn.Module, keep: BoolArray) -> nn.Module:
        """Return the network that a mask leaves, mended as far as that goes without training.

        Args:
            dense: The dense network.
            keep: The mask, ``(num_filters,)``.
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
