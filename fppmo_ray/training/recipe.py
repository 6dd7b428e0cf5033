"""How a network is trained: the settings, the learning rate and the loss they stand for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import tyro
from torch import Tensor
from torch.nn import functional as F

Schedule = Literal["cosine", "one_cycle"]

_WARM_UP = 0.3  # share of the steps, and
_WARM_UP_FROM = 1 / 25  # share of the peak rate: torch's OneCycleLR, after Smith (1708.07120)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """SGD with Nesterov momentum, and everything else that decides a training run.

    Weight decay acts on all parameters, batch norm and biases too, as in the public recipes whose
    numbers we compare with.
    """

    # Jobs lay all settings out as flags, where "epochs" alone would not say of what.
    epochs: Annotated[int, tyro.conf.arg(name="fine-tune-epochs")] = 100
    """At least 0; a pruned CIFAR network gains up to 200 to 400 (2301.05219)."""
    batch_size: int = 128
    """He et al. 2016 (1512.03385), section 4.2."""
    learning_rate: float = 0.05
    """At the schedule's peak, > 0; fine-tuning wants nearly the rate of training (2301.05219)."""
    momentum: float = 0.9
    """In (0, 1)."""
    weight_decay: float = 5e-4
    """At least 0; Zagoruyko and Komodakis 2016 (1605.07146)."""
    schedule: Schedule = "cosine"
    """``cosine`` falls from the peak to 0 (1608.03983); ``one_cycle`` first rises to it."""
    label_smoothing: float = 0.0
    """In [0, 1)."""
    distillation_weight: float = 0.5
    """Share of the loss that is the distance to the answers of the dense network, the teacher, in
    [0, 1]. More accurate by ``jobs/experiments/recipes.py``, for a pass more per step. What has no
    teacher, such as the training of a baseline, takes 0."""
    distillation_temperature: float = 4.0
    """> 0; softens the answers of teacher and student (Hinton et al. 2015, 1503.02531)."""
    clip_norm: float | None = None
    """Longest gradient over all parameters, > 0; None does not clip."""

    def __post_init__(self) -> None:
        in_range = {
            "epochs must be at least 0": self.epochs >= 0,
            "batch_size must be at least 1": self.batch_size >= 1,
            "learning_rate must be finite and > 0": 0 < self.learning_rate < math.inf,
            "momentum must be in (0, 1)": 0 < self.momentum < 1,
            "weight_decay must be finite and >= 0": 0 <= self.weight_decay < math.inf,
            f"schedule must be one of {get_args(Schedule)}": self.schedule in get_args(Schedule),
            "label_smoothing must be in [0, 1)": 0 <= self.label_smoothing < 1,
            "distillation_weight must be in [0, 1]": 0 <= self.distillation_weight <= 1,
            "distillation_temperature must be > 0": self.distillation_temperature > 0,
            "clip_norm must be None or > 0": self.clip_norm is None or self.clip_norm > 0,
        }
        for rule, holds in in_range.items():
            if not holds:
                raise ValueError(f"{rule}, got {getattr(self, rule.split()[0])!r}")


def learning_rate_at(recipe: Recipe, progress: float) -> float:
    """The rate of a step.

    Args:
        recipe: Gives the peak and the schedule.
        progress: Share of all steps that are done, in [0, 1).
    """
    peak = recipe.learning_rate
    if recipe.schedule == "cosine":
        return peak * _half_cosine(progress)
    if progress < _WARM_UP:
        start = peak * _WARM_UP_FROM
        return peak + (start - peak) * _half_cosine(progress / _WARM_UP)
    return peak * _half_cosine((progress - _WARM_UP) / (1 - _WARM_UP))


def _half_cosine(progress: float) -> float:
    """From 1 at 0 to 0 at 1, flat at both ends."""
    return (1 + math.cos(math.pi * progress)) / 2


def training_loss(
    logits: Tensor, labels: Tensor, recipe: Recipe, teacher_logits: Tensor | None
) -> Tensor:
    """Cross-entropy and, with a teacher, the distance to its answers; a scalar.

    With weight w and temperature T (1503.02531, section 2):
    ``(1 - w) CE + w T^2 KL(softmax(teacher / T) || softmax(logits / T))``. The factor T^2 keeps
    the gradients' size independent of T.

    Args:
        logits: (n, num_classes).
        labels: (n,).
        recipe: Gives the label smoothing, w and T.
        teacher_logits: (n, num_classes), or None where w is 0.
    """
    loss = F.cross_entropy(logits.float(), labels, label_smoothing=recipe.label_smoothing)
    if teacher_logits is None:
        return loss
    weight, temperature = recipe.distillation_weight, recipe.distillation_temperature
    distance = F.kl_div(
        F.log_softmax(logits.float() / temperature, dim=1),
        F.log_softmax(teacher_logits.float() / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return (1 - weight) * loss + weight * temperature**2 * distance
