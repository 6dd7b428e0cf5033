"""A round: dense weights that are frozen while masks are scored, and their importance."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray

from fppmo_ray.distribution import FloatArray
from fppmo_ray.service.pool.work import Work
from fppmo_ray.service.pool.worker_pool import WorkerPool
from fppmo_ray.service.problem import Prunable
from fppmo_ray.service.record.facts import ImportanceMeasured, RoundStarted
from fppmo_ray.service.record.run_directory import RunDirectory
from fppmo_ray.service.settings import SearchSettings
from fppmo_ray.service.training_tasks import Training
from fppmo_ray.service.weights import Arrays, digest, to_arrays
from fppmo_ray.service.whole_trainings import train_whole
from fppmo_ray.service.workers.assignments import Basis, TrainingTask
from fppmo_ray.training import ComputeConfig, state_from_bytes


@dataclass(frozen=True)
class Context:
    """What every phase of a search works with."""

    problem: Prunable
    settings: SearchSettings
    run: RunDirectory
    pool: WorkerPool
    compute: ComputeConfig


@dataclass(frozen=True, kw_only=True)
class RoundWeights:
    """The frozen dense weights of a round, here and in the object store."""

    round: int
    arrays: Arrays
    reference: Any
    """To the workers' ``Basis``."""


def prepare_round(context: Context) -> RoundWeights:
    """Train the baseline if asked to, then freeze the dense weights and journal their digest.

    Raises:
        ValueError: the weights are not those of the journal.
    """
    given = put_weights(0, to_arrays(context.problem.network), context.compute)
    weights = _train_baseline(context, given) if context.settings.baseline_epochs else given
    freeze(weights, context.run)
    return weights


def freeze(weights: RoundWeights, run: RunDirectory) -> None:
    """Journal the digest of a round's weights, or check it against the one that is there.

    Raises:
        ValueError: the weights are not those of the journal.
    """
    sha256 = digest(weights.arrays)
    known = {fact.round: fact.weights_sha256 for fact in run.all(RoundStarted)}
    if weights.round not in known:
        run.record([RoundStarted(round=weights.round, weights_sha256=sha256)])
    elif known[weights.round] != sha256:
        raise ValueError(
            f"the dense weights of round {weights.round} are not those of the journal in "
            f"{run.location}; resume with the same network and package versions"
        )


def put_weights(round_: int, arrays: Arrays, compute: ComputeConfig) -> RoundWeights:
    """Weights with a copy in the object store, for the workers."""
    reference = ray.put(Basis(round=round_, arrays=arrays, compute=compute))
    return RoundWeights(round=round_, arrays=arrays, reference=reference)


def trained_arrays(state: bytes) -> Arrays:
    """The weights of a training state."""
    return {name: tensor.numpy() for name, tensor in state_from_bytes(state).network.items()}


def _train_baseline(context: Context, given: RoundWeights) -> RoundWeights:
    settings = context.settings
    # Without a teacher: the network itself, before training, would hold it back.
    recipe = replace(
        settings.recipe,
        epochs=settings.baseline_epochs,
        learning_rate=settings.baseline_learning_rate,
        distillation_weight=0.0,
    )
    task = TrainingTask(name="baseline", keep=None, recipe=recipe, seed=settings.seed)
    training = Training(task=task, weights=given.reference)
    states = train_whole([training], context.problem, context.pool, context.run)
    return put_weights(1, trained_arrays(states[task.name]), context.compute)


def measure_importance(context: Context, weights: RoundWeights) -> FloatArray:
    """Importance of every filter by the settings' criterion, measured once and kept.

    Raises:
        RuntimeError: the criterion does not fit the network.
    """
    run, criterion = context.run, context.settings.importance
    if known := run.all(ImportanceMeasured):
        return _from_bytes(run.read_artifact(known[0].artifact, known[0].sha256))
    work = Work(
        name=f"importance {criterion}",
        method="importance",
        arguments=(weights.reference, criterion, context.settings.seed),
    )
    importance: FloatArray
    [importance] = context.pool.run([work])
    artifact = "importance.npy"
    sha256 = run.write_artifact(artifact, _to_bytes(importance))
    fact = ImportanceMeasured(
        round=weights.round, criterion=criterion, artifact=artifact, sha256=sha256
    )
    run.record([fact])
    return importance


def _to_bytes(array: FloatArray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _from_bytes(content: bytes) -> FloatArray:
    array: FloatArray = np.load(io.BytesIO(content), allow_pickle=False)
    return array
