"""The first lines of a search: what the data is, and how the dense network does on it."""

from __future__ import annotations

import logging
import math

import numpy as np

from fppmo_ray.distribution import IntArray
from fppmo_ray.service.dense_weights import BASELINE, Context
from fppmo_ray.service.journal.facts import DenseScored, EpochFinished
from fppmo_ray.service.pool.call import Call
from fppmo_ray.service.worker_protocol import SharedWeights, Worker

logger = logging.getLogger(__name__)

_Z = 1.96  # of the normal distribution, for intervals of 95 %
_FEW = 200  # held-out images, below which a step in accuracy is half a point or more
_MATCH = 0.5  # smallest accuracy in another order of classes that cannot be chance
_GAIN = 2  # how many times better that order must be


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


def dense_scored(predicted: IntArray, labels: IntArray, num_classes: int) -> DenseScored:
    """Return how well predictions of a network agree with the labels.

    Args:
        predicted: Predicted class of every held-out image, ``(n,)``.
        labels: Its label, ``(n,)``.
        num_classes: Number of classes.
    """
    num_images = len(labels)
    chance = float(np.bincount(labels).max() / num_images)
    accuracy = float((predicted == labels).mean())
    centre, half = _interval(accuracy, num_images)
    return DenseScored(
        accuracy=accuracy,
        half_interval=half,
        num_images=num_images,
        num_classes=num_classes,
        chance=chance,
        is_chance=centre - half <= chance,
        reordered_accuracy=_reordered_accuracy(predicted, labels, num_classes),
    )


def _interval(share: float, count: int) -> tuple[float, float]:
    """Return centre and half width of Wilson's 95 % interval of a share."""
    scale = 1 + _Z**2 / count
    centre = (share + _Z**2 / (2 * count)) / scale
    half = _Z * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2)) / scale
    return centre, half


def _reordered_accuracy(predicted: IntArray, labels: IntArray, num_classes: int) -> float:
    """Return the accuracy if every class were the output that it is most often taken for."""
    counts = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(counts, (labels, predicted), 1)
    right, rows, columns = 0, set[int](), set[int]()
    # One to one: the most frequent pairs of a class and an output come first.
    for place in np.argsort(-counts, axis=None, kind="stable")[: np.count_nonzero(counts)]:
        row, column = divmod(int(place), num_classes)
        if row not in rows and column not in columns:
            rows.add(row)
            columns.add(column)
            right += int(counts[row, column])
    return right / len(labels)


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
