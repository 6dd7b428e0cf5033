"""Training settings, with the learning-rate schedule and the loss that they define."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import tyro
from torch import Tensor
from torch.nn import functional as F

Schedule = Literal["cosine", "one_cycle"]
"""Shape of the learning rate over the training steps."""

# The one-cycle schedule of torch's OneCycleLR, after Smith (1708.07120):
_WARM_UP = 0.3  # share of the steps in which the rate rises
_WARM_UP_FROM = 1 / 25  # share of the peak rate at the first step

_SHORT, _LONG = (1.0, 0.02), (6.0, 0.05)  # epochs, and the peak rate that suits them
_FEATURES_UP_TO, _NO_FEATURES_FROM, _FEATURE_WEIGHT = 6.0, 60.0, 10.0  # epochs, epochs, weight


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of a training run with SGD and Nesterov momentum.

    Weight decay acts on all parameters, batch norm and biases included, as in the public recipes
    whose accuracies we compare with.
    """

    # Jobs turn all settings into flags, and --epochs alone would be ambiguous.
    epochs: Annotated[int, tyro.conf.arg(name="fine-tune-epochs")] = 100
    """Passes over search-train, >= 0. A pruned CIFAR network gains accuracy up to 200 to 400 epochs
    (2301.05219)."""
    batch_size: int = 128
    """Images per step, >= 1; He et al. 2016 (1512.03385), section 4.2."""
    learning_rate: float | None = None
    """Peak learning rate, > 0. None: it follows the length of the training, from 0.02 up to one
    epoch to 0.05 from six epochs on; see ``peak_rate``."""
    momentum: float = 0.9
    """Nesterov momentum, in (0, 1)."""
    weight_decay: float = 5e-4
    """Weight decay, >= 0; Zagoruyko and Komodakis 2016 (1605.07146)."""
    schedule: Schedule = "cosine"
    """``cosine`` falls from the peak to 0 (1608.03983); ``one_cycle`` rises to the peak first."""
    label_smoothing: float = 0.0
    """Probability that the training target spreads over all classes, in [0, 1)."""
    distillation_weight: float = 0.5
    """Weight of the distance to the dense network's answers (the teacher) in the loss, in [0, 1].
    ``jobs/experiments/recipes.py`` measured better accuracy with it; it costs the teacher's forward
    pass in every step. Set 0 where there is no teacher, as in training a baseline."""
    distillation_temperature: float = 4.0
    """Temperature > 0 that softens the answers of teacher and student (Hinton et al. 2015,
    1503.02531)."""
    feature_weight: float | None = None
    """Weight, >= 0, of the distance to the dense network's last feature map, which is added to the
    loss where there is a teacher. None: it follows the length of the training, from 10 up to six
    epochs to 0 from sixty on; see ``feature_weight_of``."""
    clip_norm: float | None = None
    """Largest norm of the gradient over all parameters, > 0; None does not clip."""

    def __post_init__(self) -> None:
        in_range = {
            "epochs must be at least 0": self.epochs >= 0,
            "batch_size must be at least 1": self.batch_size >= 1,
            "learning_rate must be finite and > 0": self.learning_rate is None
            or 0 < self.learning_rate < math.inf,
            "momentum must be in (0, 1)": 0 < self.momentum < 1,
            "weight_decay must be finite and >= 0": 0 <= self.weight_decay < math.inf,
            f"schedule must be one of {get_args(Schedule)}": self.schedule in get_args(Schedule),
            "label_smoothing must be in [0, 1)": 0 <= self.label_smoothing < 1,
            "distillation_weight must be in [0, 1]": 0 <= self.distillation_weight <= 1,
            "feature_weight must be finite and >= 0": self.feature_weight is None
            or 0 <= self.feature_weight < math.inf,
            "distillation_temperature must be > 0": self.distillation_temperature > 0,
            "clip_norm must be None or > 0": self.clip_norm is None or self.clip_norm > 0,
        }
        for rule, holds in in_range.items():
            if not holds:
                raise ValueError(f"{rule}, got {getattr(self, rule.split()[0])!r}")


def peak_rate(recipe: Recipe, epochs: float | None = None) -> float:
    """Return the peak learning rate: the recipe's own, or else the one that suits the length.

    Long fine-tuning needs nearly the rate of training (2301.05219), and short fine-tuning cannot
    recover from it: ResNet-20 pruned by 57 % and fine-tuned for one epoch gains 0.4 to 1.3 points
    with 0.02 instead of 0.05. The rate is 0.02 up to one epoch and 0.05 from six epochs on; between
    them its logarithm grows in proportion to that of the epochs.

    Args:
        recipe: Gives the rate, or None.
        epochs: Length of the training, >= 0; None: the recipe's epochs.
    """
    if recipe.learning_rate is not None:
        return recipe.learning_rate
    (short, low), (long, high) = _SHORT, _LONG
    length = min(max(recipe.epochs if epochs is None else epochs, short), long)
    share = math.log(length / short) / math.log(long / short)
    return float(low * (high / low) ** share)


def feature_weight_of(recipe: Recipe, epochs: float | None = None) -> float:
    """Return the weight of the features: the recipe's own, or else the one that suits the length.

    The dense network's features lead a short training, and hold a long one back. ResNet-20 pruned
    by 57 %, with a weight of 10 instead of 0: +0.9 points on held-out images after one epoch, +0.3
    after six, none after sixty, where test accuracy fell from 87.7 to 86.7 % (one seed each). The
    weight is 10 up to six epochs and 0 from sixty on; between them, where nothing was measured, it
    falls in proportion to the logarithm of the epochs.

    Args:
        recipe: Gives the weight, or None.
        epochs: Length of the training, >= 0; None: the recipe's epochs.
    """
    if recipe.feature_weight is not None:
        return recipe.feature_weight
    length = max(recipe.epochs if epochs is None else epochs, _FEATURES_UP_TO)
    share = math.log(length / _FEATURES_UP_TO) / math.log(_NO_FEATURES_FROM / _FEATURES_UP_TO)
    return _FEATURE_WEIGHT * max(0.0, 1 - share)


def learning_rate_at(recipe: Recipe, progress: float) -> float:
    """Return the learning rate of a step.

    Args:
        recipe: Gives the peak rate and the schedule.
        progress: Share of all steps that are done, in [0, 1).
    """
    peak = peak_rate(recipe)
    if recipe.schedule == "cosine":
        return peak * _half_cosine(progress)
    # one_cycle: half a cosine up to the peak, then half a cosine down to 0
    if progress < _WARM_UP:
        start = peak * _WARM_UP_FROM
        return peak + (start - peak) * _half_cosine(progress / _WARM_UP)
    return peak * _half_cosine((progress - _WARM_UP) / (1 - _WARM_UP))


def _half_cosine(progress: float) -> float:
    """Fall from 1 at progress 0 to 0 at progress 1, flat at both ends."""
    return (1 + math.cos(math.pi * progress)) / 2


def training_loss(
    logits: Tensor, labels: Tensor, recipe: Recipe, teacher_logits: Tensor | None
) -> Tensor:
    """Return the cross-entropy, combined with the distance to a teacher's answers; a scalar.

    With weight w and temperature T (1503.02531, section 2): ``(1 - w) CE + w T^2 KL(softmax(teacher
    / T) || softmax(logits / T))``. The factor T^2 keeps the size of the gradients independent of T.

    Args:
        logits: The network's answers, (n, num_classes).
        labels: Class labels, (n,).
        recipe: Gives the label smoothing, w and T.
        teacher_logits: The teacher's answers, (n, num_classes), or None where w is 0.
    """
    # CE, of the smoothed labels
    loss = F.cross_entropy(logits.float(), labels, label_smoothing=recipe.label_smoothing)
    if teacher_logits is None:
        return loss
    weight, temperature = recipe.distillation_weight, recipe.distillation_temperature
    # KL(softmax(teacher / T) || softmax(logits / T)), the mean over the batch
    distance = F.kl_div(
        F.log_softmax(logits.float() / temperature, dim=1),
        F.log_softmax(teacher_logits.float() / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return (1 - weight) * loss + weight * temperature**2 * distance
