"""The worker: an actor that holds the data on its device and does all heavy work."""

from __future__ import annotations

import copy
import io
import logging
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from fppmo_ray.distribution import BoolArray, Feedback, FloatArray, Proposal
from fppmo_ray.pruning import Criterion, Score, extract, importance
from fppmo_ray.pruning.calibration import FilterOrder, obs_order
from fppmo_ray.pruning.compute_trial import ComputeTrial
from fppmo_ray.pruning.importance import Ordering
from fppmo_ray.pruning.latency import (
    Latency,
    MeasuredLatency,
    measure_latencies,
    measure_latency_table,
    time_masks,
)
from fppmo_ray.service.journal.facts import DenseScored
from fppmo_ray.service.pool.worker_group import WorkerInfo, worker_info, worker_name
from fppmo_ray.service.problem import Problem
from fppmo_ray.service.user_functions import ProcessState, with_plain_errors
from fppmo_ray.service.worker_protocol import (
    Evaluation,
    TrainingReport,
    TrainingTask,
    WeightsSnapshot,
    digest,
    load_arrays,
    to_arrays,
)
from fppmo_ray.training import (
    WHOLE,
    ComputeConfig,
    DType,
    Shard,
    capture,
    keep_freed_memory,
    native_dtype,
    state_from_bytes,
    state_to_bytes,
)
from fppmo_ray.training.device import device_module, visible_gpu

logger = logging.getLogger(__name__)


@with_plain_errors
class PruningWorker:
    """Runs as a Ray actor on the CPUs or the GPU it was given; see ``Worker`` for its calls.

    Args:
        problem: Network, tracing, task and settings.
        slot: Number of the worker in its group.
    """

    def __init__(self, problem: Problem, slot: int) -> None:
        self._slot = slot
        self._problem = problem
        self._device = claim_device(problem)
        self._process = ProcessState()
        self._dense = copy.deepcopy(problem.network).to(self._device).eval()
        self._dense_sha256: str | None = None
        """Digest of the snapshot that the dense network holds; None: the problem's weights."""
        self._teacher: tuple[str, nn.Module] | None = None
        self._task = problem.task.open(
            problem.tracing, problem.settings, self._device, threads=problem.threads
        )

    def __repr__(self) -> str:
        """Return the name that the Ray dashboard shows."""
        return worker_name(self, self._slot, self._device.type)

    def ready(self) -> WorkerInfo:
        """See ``Worker.ready``."""
        self._task.load()
        if (
            self._problem.settings.calibration.refit
            and not self._problem.settings.baseline.baseline_epochs
        ):
            # Now, because the time of a score is limited.
            self._dense_sha256 = digest(to_arrays(self._dense))
            self._task.calibration(self._dense)
        return worker_info(self._slot)

    def score(self, weights: WeightsSnapshot, proposal: Proposal) -> Feedback:
        """See ``Worker.score``."""
        found = self._score(weights, proposal.keep, proposal.score_seed, "search_val")
        return feedback_of(
            proposal.proposal_id, found, steps=self._problem.settings.scoring.score_steps
        )

    def score_dense(self, weights: WeightsSnapshot) -> DenseScored | None:
        """See ``Worker.score_dense``."""
        return self._task.score_dense(self._with(weights))

    def rescore(
        self, weights: WeightsSnapshot, keep: BoolArray, seed: Sequence[int], split: str
    ) -> Score:
        """See ``Worker.rescore``."""
        return self._score(weights, keep, seed, split)

    def native_dtype(self) -> DType:
        """See ``Worker.native_dtype``."""
        return native_dtype(self._device)

    def try_compute(self, compute: ComputeConfig, keep: BoolArray) -> ComputeTrial:
        """See ``Worker.try_compute``."""
        self._begin(compute)
        return self._task.try_compute(self._dense, keep, compute)

    def try_training(self, compute: ComputeConfig, keep: BoolArray) -> ComputeTrial:
        """See ``Worker.try_training``."""
        self._begin(compute)
        return self._task.try_compute(self._dense, keep, compute, of="epoch")

    def importance(self, weights: WeightsSnapshot, criterion: Criterion, seed: int) -> FloatArray:
        """See ``Worker.importance``."""
        batches = self._task.importance_batches(seed) if criterion == "taylor" else None
        return importance(self._with(weights), self._problem.tracing, criterion, batches)

    def filter_order(self, weights: WeightsSnapshot, ordering: Ordering, seed: int) -> FilterOrder:
        """See ``Worker.filter_order``."""
        importance = None if ordering == "obs" else self.importance(weights, ordering, seed)
        dense = self._with(weights)
        calibration = self._task.calibration(dense)
        assert calibration is not None  # a task without images refuses the settings
        order = obs_order(dense, self._problem.tracing, calibration, importance=importance)
        return order if importance is None else replace(order, importance=importance)

    def untrained(
        self, weights: WeightsSnapshot, task: TrainingTask
    ) -> tuple[bytes, TrainingReport | None]:
        """See ``Worker.untrained``."""
        network = self._network(weights, task.keep, None)
        return state_to_bytes(capture(network, None, 0)), None

    def train_epoch(
        self,
        weights: WeightsSnapshot,
        task: TrainingTask,
        epoch: int,
        state: bytes | None,
        teacher: WeightsSnapshot,
        shard: Shard = WHOLE,
    ) -> tuple[bytes, TrainingReport | None]:
        """See ``Worker.train_epoch``."""
        network = self._network(weights, task.keep, state, for_epochs=True)
        compute = task.compute or weights.compute
        torch.set_num_threads(compute.threads)
        new_state, report = self._task.train_epoch(
            network,
            task,
            epoch,
            None if state is None else state_from_bytes(state),
            teacher=self._teacher_with(teacher) if task.recipe.distillation_weight else None,
            compute=compute,
            shard=shard,
        )
        return state_to_bytes(new_state), report

    def distill(
        self, weights: WeightsSnapshot, task: TrainingTask, teacher: WeightsSnapshot
    ) -> tuple[bytes, TrainingReport | None]:
        """See ``Worker.distill``."""
        assert task.keep is not None  # the dense network has nothing to learn from itself
        network, dense = self._network(weights, task.keep, None), self._teacher_with(teacher)
        begin = time.perf_counter()
        self._task.distill(network, dense, task.keep, steps=task.distill_steps, seed=task.seed)
        report = TrainingReport(loss=None, seconds=time.perf_counter() - begin)
        return state_to_bytes(capture(network, None, 0)), report

    def evaluate(
        self, weights: WeightsSnapshot, keep: BoolArray | None, state: bytes | None
    ) -> Evaluation:
        """See ``Worker.evaluate``."""
        network = self._network(weights, keep, state)  # counted before a task may change it
        parameters = sum(parameter.numel() for parameter in network.parameters())
        file_bytes = _saved_bytes(network)
        again = copy.deepcopy(network)
        tested = self._task.evaluate(again, "test", self._dense)
        return Evaluation(
            choose_val=self._task.evaluate(network, "choose_val", self._dense).figures,
            test=tested.figures,
            test_right=tested.right,
            parameters=parameters,
            file_bytes=file_bytes,
        )

    def latencies(
        self, weights: WeightsSnapshot, masks: Sequence[BoolArray | None]
    ) -> list[tuple[Latency, ...]]:
        """See ``Worker.latencies``."""
        inputs, batches = self._task.inputs(), self._task.latency_batches
        # Weights do not change the time, so nothing is refitted or reconstructed.
        dense, tracing = self._with(weights), self._problem.tracing
        everything = np.ones(tracing.space.num_filters, dtype=bool)
        networks = [
            extract(dense, tracing, everything if keep is None else keep).eval() for keep in masks
        ]
        return measure_latencies(networks, *inputs, batches=batches)

    def measure_latency_table(
        self, compute: ComputeConfig, batch: int, seed: int
    ) -> MeasuredLatency:
        """See ``Worker.measure_latency_table``."""
        self._begin(compute)
        tracing, inputs = self._problem.tracing, self._task.inputs()
        return measure_latency_table(self._dense, tracing, inputs, batch=batch, seed=seed)

    def time_masks(
        self, compute: ComputeConfig, masks: Sequence[BoolArray], batch: int
    ) -> list[int]:
        """See ``Worker.time_masks``."""
        self._begin(compute)
        tracing, inputs = self._problem.tracing, self._task.inputs()
        return time_masks(self._dense, tracing, inputs, masks, batch=batch)

    def _score(
        self, weights: WeightsSnapshot, keep: BoolArray, seed: Sequence[int], split: str
    ) -> Score:
        dense = self._with(weights)
        return self._task.score(dense, keep, seed=seed, split=split, compute=weights.compute)

    def _begin(self, compute: ComputeConfig) -> None:
        """Undo what earlier calls may have changed in the process, and set torch's threads."""
        self._process.restore()
        torch.set_num_threads(compute.threads)

    def _with(self, weights: WeightsSnapshot) -> nn.Module:
        """Return the dense network with a snapshot's weights, in a process as it began."""
        self._begin(weights.compute)
        if self._dense_sha256 != weights.sha256:
            # Another object: a task keeps what it has computed of the network that it was given.
            self._dense, self._dense_sha256 = self._copy_with(weights), weights.sha256
        return self._dense

    def _network(
        self,
        weights: WeightsSnapshot,
        keep: BoolArray | None,
        state: bytes | None,
        *,
        for_epochs: bool = False,
    ) -> nn.Module:
        """Return a network of the caller's own: in a training state, or before training."""
        dense, tracing = self._with(weights), self._problem.tracing
        if keep is not None and state is None:
            return self._task.pruned(dense, keep, for_epochs=for_epochs)
        network = copy.deepcopy(dense) if keep is None else extract(dense, tracing, keep)
        if state is not None:
            network.load_state_dict(state_from_bytes(state).network)
        return network

    def _teacher_with(self, weights: WeightsSnapshot) -> nn.Module:
        """Return a dense network with the teacher's weights, beside the one that is pruned."""
        if self._teacher is None or self._teacher[0] != weights.sha256:
            self._teacher = weights.sha256, self._copy_with(weights)
        return self._teacher[1]

    def _copy_with(self, weights: WeightsSnapshot) -> nn.Module:
        """Return a copy of the dense network with a snapshot's weights, in eval mode."""
        network = copy.deepcopy(self._dense)
        load_arrays(network, weights.arrays)
        return network.eval()


def feedback_of(proposal_id: int, score: Score, *, steps: int) -> Feedback:
    """Return a score as feedback; a failure if its figures are not finite.

    Args:
        proposal_id: The proposal that was scored.
        score: The figures.
        steps: Fine-tuning steps inside the score.
    """
    if score.error is not None:
        return Feedback(proposal_id=proposal_id, error=score.error, steps=steps)
    return Feedback(
        proposal_id=proposal_id,
        val_loss=score.val_loss,
        val_accuracy=score.val_accuracy,
        steps=steps,
        seconds=score.seconds,
    )


def claim_device(problem: Problem) -> torch.device:
    """Fix this process's threads and memory share, before anything is computed.

    Args:
        problem: Says which device was promised, and how much of it.

    Raises:
        RuntimeError: a GPU was promised and torch sees none.
    """
    torch.set_num_threads(problem.threads)
    if problem.device_type == "cpu":
        keep_freed_memory()
        cpu = torch.device("cpu")
        if problem.compute.dtype == "bfloat16" and native_dtype(cpu) == "float32":
            logger.warning(
                "this processor has no units for bfloat16 and computes it several times slower "
                "than float32; use dtype float32 or auto"
            )
        return cpu
    gpu = visible_gpu()
    if gpu is None:
        raise RuntimeError(
            "this worker holds a GPU of the cluster but torch sees no CUDA device; "
            "install a CUDA build of torch on the node, or set --gpus-per-worker to 0"
        )
    if problem.gpu_share < 1:
        device_module(gpu).set_per_process_memory_fraction(problem.gpu_share)
    return gpu


def _saved_bytes(network: nn.Module) -> int:
    """Return the size of a network's state dict, saved."""
    buffer = io.BytesIO()
    torch.save({name: tensor.cpu() for name, tensor in network.state_dict().items()}, buffer)
    return buffer.tell()
