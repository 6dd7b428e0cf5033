"""The typed calls between the driver and a worker, and the values that travel with them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import ray
import torch
from torch import nn

from fppmo_ray.distribution import BoolArray, Feedback, FloatArray, Proposal
from fppmo_ray.pruning import Criterion, Score
from fppmo_ray.pruning.calibration import FilterOrder
from fppmo_ray.pruning.compute_trial import ComputeTrial
from fppmo_ray.pruning.importance import Ordering
from fppmo_ray.pruning.latency import Latency, MeasuredLatency
from fppmo_ray.service.journal.facts import DenseScored
from fppmo_ray.service.pool.worker_group import WorkerInfo
from fppmo_ray.training import WHOLE, ComputeConfig, DType, Recipe, Shard

Arrays = dict[str, np.ndarray]


def to_arrays(network: nn.Module) -> Arrays:
    """Return the state dict as numpy arrays, which Ray hands to workers without a copy."""
    return {name: tensor.detach().cpu().numpy() for name, tensor in network.state_dict().items()}


def load_arrays(network: nn.Module, arrays: Arrays) -> None:
    """Copy arrays into the network, in place.

    Args:
        network: The network.
        arrays: Its state dict; may be read-only, as arrays from Ray are.
    """
    network.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()})


def digest(arrays: Arrays) -> str:
    """Return the SHA-256 of names, shapes, types and bytes."""
    sha = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        sha.update(f"{name}{array.shape}{array.dtype}".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


@dataclass(frozen=True, kw_only=True)
class WeightsSnapshot:
    """Dense weights that work starts from; a worker keeps the snapshot it was given last."""

    sha256: str
    """Digest of the arrays."""
    arrays: Arrays
    """The state dict of the dense network."""
    compute: ComputeConfig
    """How all passes are computed."""


@dataclass(frozen=True, kw_only=True)
class SharedWeights:
    """A snapshot on the driver, with the copy that workers read."""

    snapshot: WeightsSnapshot
    """The weights on the driver."""
    shared: WeightsSnapshot
    """Argument for workers' calls: at run time a reference to the copy in Ray's object store, which
    Ray resolves on the worker."""


def share_weights(arrays: Arrays, compute: ComputeConfig) -> SharedWeights:
    """Put weights into Ray's object store once, for all workers.

    Args:
        arrays: State dict of the dense network.
        compute: How passes with these weights are computed.
    """
    snapshot = WeightsSnapshot(sha256=digest(arrays), arrays=arrays, compute=compute)
    return SharedWeights(snapshot=snapshot, shared=cast(WeightsSnapshot, ray.put(snapshot)))


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingTask:
    """A network to train: the dense one (``keep`` None) or an extracted one."""

    name: str
    """Name of the training in journal, log and checkpoints."""
    keep: BoolArray | None
    """The mask, ``(num_filters,)``, True = kept; None: the dense network."""
    recipe: Recipe
    """How it is trained, and for how many epochs."""
    seed: int
    """Random seed, >= 0."""
    distill_steps: int = 0
    """Steps of distillation on the calibration images, which are then the only epoch; 0: the
    recipe's epochs."""
    compute: ComputeConfig | None = None
    """How its passes are computed; None: as scores of the same weights."""


@dataclass(frozen=True, kw_only=True)
class TrainingReport:
    """How one epoch went."""

    loss: float | None
    """Mean training loss; None where a user's own function trains."""
    seconds: float
    """Time that the epoch took."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Tested:
    """A network's figures on a split."""

    figures: dict[str, float]
    """Figures by name: ``accuracy`` and ``loss``, or a task's own ``score``."""
    right: BoolArray | None = None
    """Whether each image is classified correctly, ``(num_images,)``; None: none is."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """The figures of a network at the end of a search, and its size."""

    choose_val: dict[str, float]
    """Figures on choose-val by name: ``accuracy`` and ``loss``, or a task's own ``score``."""
    test: dict[str, float]
    """The same figures on the test split."""
    test_right: BoolArray | None = None
    """Whether each test image is classified correctly; None: nothing is classified."""
    parameters: int
    """Number of parameters."""
    file_bytes: int
    """Size of the saved state dict."""


class Worker(Protocol):
    """The calls that a worker answers. Each is idempotent, since it may be repeated elsewhere."""

    def ready(self) -> WorkerInfo:
        """Load the data, then tell where the worker runs."""

    def score(self, weights: WeightsSnapshot, proposal: Proposal) -> Feedback:
        """Score a proposal on search-val.

        Args:
            weights: The dense weights that are pruned.
            proposal: The mask and its seed.
        """

    def score_dense(self, weights: WeightsSnapshot) -> DenseScored | None:
        """Evaluate the dense network on search-val; None where the task has no such figure.

        Args:
            weights: The dense weights.
        """

    def rescore(
        self, weights: WeightsSnapshot, keep: BoolArray, seed: Sequence[int], split: str
    ) -> Score:
        """Score a finalist once more.

        Args:
            weights: The dense weights that are pruned.
            keep: The mask, ``(num_filters,)``.
            seed: Seed that no proposal has.
            split: ``choose_val``, or ``search_val`` to repeat the score of a proposal.
        """

    def try_compute(self, compute: ComputeConfig, keep: BoolArray) -> ComputeTrial:
        """Measure a score with a compute configuration.

        Args:
            compute: The configuration to try.
            keep: The mask to score, ``(num_filters,)``.
        """

    def try_training(self, compute: ComputeConfig, keep: BoolArray) -> ComputeTrial:
        """Measure an epoch of fine-tuning with a compute configuration.

        Args:
            compute: The configuration to try.
            keep: The mask of the network to train, ``(num_filters,)``.
        """

    def native_dtype(self) -> DType:
        """Return the fastest number format that this worker's processor has units for."""

    def importance(self, weights: WeightsSnapshot, criterion: Criterion, seed: int) -> FloatArray:
        """Return the importance of every filter, ``(num_filters,)``.

        Args:
            weights: The dense weights.
            criterion: Name of the criterion.
            seed: Seed of the images that are drawn, where the criterion looks at any.
        """

    def filter_order(self, weights: WeightsSnapshot, ordering: Ordering, seed: int) -> FilterOrder:
        """Calibrate the dense network; return its filters' importance and the error curves.

        Args:
            weights: The dense weights.
            ordering: ``obs``, or the criterion in whose order the error curves are measured.
            seed: Seed of the images that are drawn, where the criterion looks at any.
        """

    def untrained(
        self, weights: WeightsSnapshot, task: TrainingTask
    ) -> tuple[bytes, TrainingReport | None]:
        """Return the training state of a network before its first epoch, and no report.

        Args:
            weights: The dense weights that the network is cut from.
            task: The network.
        """

    def train_epoch(
        self,
        weights: WeightsSnapshot,
        task: TrainingTask,
        epoch: int,
        state: bytes | None,
        teacher: WeightsSnapshot,
        shard: Shard = WHOLE,
    ) -> tuple[bytes, TrainingReport | None]:
        """Train a network for one epoch; return the new training state and a report.

        Args:
            weights: The dense weights that the network is cut from.
            task: The network and its recipe.
            epoch: Epoch, counted from 0.
            state: Training state before the epoch; None: the network before training.
            teacher: The dense weights to distil from, if the recipe distils.
            shard: Which part of every batch this process takes.
        """

    def distill(
        self, weights: WeightsSnapshot, task: TrainingTask, teacher: WeightsSnapshot
    ) -> tuple[bytes, TrainingReport | None]:
        """Distil a pruned network on the calibration images; return the state to train on from.

        Args:
            weights: The dense weights that the network is cut from.
            task: The network and the number of steps.
            teacher: The dense weights to distil from.
        """

    def evaluate(
        self, weights: WeightsSnapshot, keep: BoolArray | None, state: bytes | None
    ) -> Evaluation:
        """Evaluate a network on choose-val and test.

        Args:
            weights: The dense weights that the network is cut from.
            keep: The mask; None: the dense network.
            state: Training state of the network; None: before training.
        """

    def latencies(
        self, weights: WeightsSnapshot, masks: Sequence[BoolArray | None]
    ) -> list[tuple[Latency, ...]]:
        """Return the forward time of each network, measured one after the other.

        Args:
            weights: The dense weights that the networks are cut from.
            masks: A mask for each network; None: the dense one.
        """

    def measure_latency_table(
        self, compute: ComputeConfig, batch: int, seed: int
    ) -> MeasuredLatency:
        """Measure the latency over all widths; see ``fppmo_ray.pruning.latency``.

        Args:
            compute: Configuration that says how many threads the network is timed with.
            batch: Images per pass.
            seed: Seed of the widths that are measured.
        """

    def time_masks(
        self, compute: ComputeConfig, masks: Sequence[BoolArray], batch: int
    ) -> list[int]:
        """Return the nanoseconds of masks' networks, measured like the table.

        Args:
            compute: Configuration that says how many threads the networks are timed with.
            masks: The masks, each ``(num_filters,)``.
            batch: Images per pass.
        """
