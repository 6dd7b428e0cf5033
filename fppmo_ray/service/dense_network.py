"""The dense network of a search: what is said of it first, its weights, its filters' importance."""

from __future__ import annotations

import io
import logging
import math
from dataclasses import dataclass, replace

import numpy as np

from fppmo_ray.distribution import FloatArray
from fppmo_ray.pruning.calibration import FilterOrder
from fppmo_ray.pruning.importance import Ordering
from fppmo_ray.pruning.latency import Read
from fppmo_ray.service.ddp_training import train_whole
from fppmo_ray.service.journal.facts import (
    DenseScored,
    EpochFinished,
    ImportanceMeasured,
    WeightsFrozen,
)
from fppmo_ray.service.journal.run_directory import RunDirectory
from fppmo_ray.service.pool.call import Call
from fppmo_ray.service.pool.worker_pool import WorkerPool
from fppmo_ray.service.problem import Problem
from fppmo_ray.service.settings import SearchSettings
from fppmo_ray.service.trainings import Training
from fppmo_ray.service.worker_protocol import (
    Arrays,
    SharedWeights,
    TrainingTask,
    Worker,
    share_weights,
    to_arrays,
)
from fppmo_ray.training import ComputeConfig, state_from_bytes

logger = logging.getLogger(__name__)

BASELINE = "baseline"
"""Name of the dense network's training in the journal."""
_FEW = 200  # held-out images, below which a step in accuracy is half a point or more
_MATCH = 0.5  # smallest accuracy in another order of classes that cannot be chance
_GAIN = 2  # how many times better that order must be
_IMPORTANCE, _CURVES = "importance.npy", "error_curves.npy"


@dataclass(frozen=True, kw_only=True)
class Context:
    """What every phase of a search works with."""

    problem: Problem
    """Network, tracing and task."""
    run: RunDirectory
    """The record of the search."""
    pool: WorkerPool[Worker]
    """The workers, with nothing unfinished between two phases."""
    compute: ComputeConfig
    """How scores are computed, and everything but whole trainings."""
    training_compute: ComputeConfig | None = None
    """How whole trainings are computed; None: as scores."""
    read_clock: Read | None = None
    """Returns the milliseconds of a mask's network by the user's clock; None: a worker measures."""

    @property
    def settings(self) -> SearchSettings:
        """The settings of the search."""
        return self.problem.settings


def dense_weights(context: Context) -> SharedWeights:
    """Train the baseline if asked to, then freeze the dense weights and journal their digest.

    Raises:
        ValueError: the weights are not those of the journal.
        RuntimeError: training diverged.
    """
    weights = share_weights(to_arrays(context.problem.network), context.compute)
    if context.settings.baseline.baseline_epochs:
        weights = _train_baseline(context, weights)
    _freeze(weights.snapshot.sha256, context.run)
    return weights


def trained_arrays(state: bytes) -> Arrays:
    """Return the weights of a training state, as bytes, in numpy arrays."""
    return {name: tensor.numpy() for name, tensor in state_from_bytes(state).network.items()}


def measure_filters(context: Context, weights: SharedWeights) -> FilterOrder:
    """Return the importance of every filter and the error curves, measured once and kept.

    Args:
        context: The search. Its settings name the criterion.
        weights: The dense weights.

    Returns:
        The importance, and no error curves where the settings need none.

    Raises:
        ValueError: the kept files are gone or changed, and measured again they are others.
        RuntimeError: the criterion does not fit the network.
    """
    run, known = context.run, context.run.all(ImportanceMeasured)
    if known:
        try:
            return _read_filters(known[0], context)
        except ValueError as error:
            logger.warning("the importance is measured again: %s", error)
    order = _measured(context, weights)
    fact = _keep_filters(order, context)
    if known and fact != known[0]:
        raise ValueError(
            f"the importance that {run.location} needs is gone, and measured again it is another; "
            "resume on the kind of machine that began the search, or choose another run directory"
        )
    if not known:
        run.record([fact])
    return order


def _keep_filters(order: FilterOrder, context: Context) -> ImportanceMeasured:
    """Write the importance and the error curves as artifacts; return the fact that names them."""
    run = context.run
    fact = ImportanceMeasured(
        criterion=_criterion(context),
        artifact=_IMPORTANCE,
        sha256=run.write_artifact(_IMPORTANCE, _to_bytes(order.importance)),
    )
    if not order.error_curves:
        return fact
    content = _to_bytes(np.concatenate(order.error_curves))
    sha256 = run.write_artifact(_CURVES, content)
    return replace(fact, curves_artifact=_CURVES, curves_sha256=sha256)


def _measured(context: Context, weights: SharedWeights) -> FilterOrder:
    """Let a worker measure the importance, and the error curves where they are needed."""
    criterion, seed = _criterion(context), context.settings.seed
    name = f"importance {criterion}"
    if criterion == "obs" or context.settings.sampler.start == "allocation":
        calibrate: Call[Worker, FilterOrder] = Call(
            name, lambda worker: worker.filter_order(weights.shared, criterion, seed)
        )
        [order] = context.pool.run([calibrate])
        return order
    call: Call[Worker, FloatArray] = Call(
        name, lambda worker: worker.importance(weights.shared, criterion, seed)
    )
    [importance] = context.pool.run([call])
    return FilterOrder(importance=importance, error_curves=())


def _criterion(context: Context) -> Ordering:
    criterion = context.settings.sampler.importance
    assert criterion is not None  # settled with the task's images
    return criterion


def _read_filters(fact: ImportanceMeasured, context: Context) -> FilterOrder:
    run = context.run
    importance = _from_bytes(run.read_artifact(fact.artifact, fact.sha256))
    curves: list[FloatArray] = []
    if fact.curves_artifact is not None and fact.curves_sha256 is not None:
        joined = _from_bytes(run.read_artifact(fact.curves_artifact, fact.curves_sha256))
        # A group's curve has an entry for every number of kept filters, from 0 on.
        ends = np.cumsum(context.problem.space.dense_widths + 1)
        curves = np.split(joined, ends[:-1])
    return FilterOrder(importance=importance, error_curves=tuple(curves))


def _freeze(sha256: str, run: RunDirectory) -> None:
    """Journal the digest of the weights, or check it against the one that is there."""
    known = run.all(WeightsFrozen)
    if not known:
        run.record([WeightsFrozen(sha256=sha256)])
    elif known[0].sha256 != sha256:
        raise ValueError(
            f"the dense weights are not those of the journal in {run.location}; resume with the "
            "same network and package versions"
        )


def _train_baseline(context: Context, given: SharedWeights) -> SharedWeights:
    settings = context.settings
    # Without a teacher: the network before training would hold it back.
    recipe = replace(
        settings.fine_tune,
        epochs=settings.baseline.baseline_epochs,
        learning_rate=settings.baseline.baseline_learning_rate,
        distillation_weight=0.0,
    )
    task = TrainingTask(
        name=BASELINE,
        keep=None,
        recipe=recipe,
        seed=settings.seed,
        compute=context.training_compute,
    )
    training = Training(task=task, weights=given, teacher=given)
    states = train_whole([training], context.problem, context.pool, context.run)
    return share_weights(trained_arrays(states[task.name]), context.compute)


def _to_bytes(array: FloatArray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _from_bytes(content: bytes) -> FloatArray:
    array: FloatArray = np.load(io.BytesIO(content), allow_pickle=False)
    return array


def log_data(context: Context) -> None:
    """Log how images become inputs, how many there are, and what the classes are called."""
    for line in context.problem.task.first_lines():
        logger.info(line)


def score_dense(context: Context, weights: SharedWeights) -> None:
    """Evaluate the dense network on search-val once, journal it, log it, and warn of bad signs.

    Args:
        context: The search.
        weights: The dense weights.
    """
    known = context.run.all(DenseScored)
    if not known:
        call: Call[Worker, DenseScored | None] = Call(
            "score of the dense network", lambda worker: worker.score_dense(weights.shared)
        )
        [found] = context.pool.run([call])
        if found is None:
            return
        context.run.record([found])
        known = [found]
    epochs = context.settings.baseline.baseline_epochs
    state = f"after {epochs} epochs of training" if epochs else "as given"
    logger.info("dense network %s: %s", state, known[0])
    for warning in _warnings(known[0], context):
        logger.warning(warning)


def _warnings(score: DenseScored, context: Context) -> list[str]:
    found = []
    if score.num_images < _FEW:
        found.append(
            f"masks are ranked on {score.num_images} held-out images, where one image is "
            f"{100 / score.num_images:.2g} points of accuracy; hold out {_FEW} or more (splits=...)"
        )
    reordered = score.reordered_accuracy
    if reordered >= max(_MATCH, _GAIN * score.accuracy):
        return [
            *found,
            f"the network's outputs are in another order than the labels: reordered, it would have "
            f"{100 * reordered:.1f} %; give class_names in the order of the network's outputs",
        ]
    if score.is_chance:
        found.append(
            "the dense network is no better than chance, and no mask will be: check mean, std, "
            "colour order and size of the images, the order of the classes, and the weights"
        )
        losses = [
            fact.train_loss
            for fact in context.run.all(EpochFinished)
            if fact.task == BASELINE and fact.train_loss is not None
        ]
        if losses:
            found.append(
                f"the dense network's training ended at a loss of {losses[-1]:.3f}, where guessing "
                f"has ln {score.num_classes} = {math.log(score.num_classes):.3f}: it diverged or "
                "was too short; lower baseline_learning_rate, or raise baseline_epochs"
            )
    return found
