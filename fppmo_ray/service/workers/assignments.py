"""What workers are given to do, and what they give back beside scores."""

from __future__ import annotations

from dataclasses import dataclass

from fppmo_ray.distribution import BoolArray
from fppmo_ray.service.weights import Arrays
from fppmo_ray.training import ComputeConfig, Metrics, Recipe


@dataclass(frozen=True, kw_only=True)
class Basis:
    """What all work of a round starts from; workers keep the weights they were given last."""

    round: int
    arrays: Arrays
    """The dense weights."""
    compute: ComputeConfig
    """How all passes are computed."""


@dataclass(frozen=True, kw_only=True)
class TrainingTask:
    """A network to train: the dense one (``keep`` None) or an extracted one."""

    name: str
    keep: BoolArray | None
    recipe: Recipe
    seed: int


@dataclass(frozen=True, kw_only=True, eq=False)
class AdaptationTask:
    """Dense weights to adapt to masks."""

    name: str
    masks: BoolArray
    """``(num_masks, num_filters)``; they take turns, a step each."""
    recipe: Recipe
    seed: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """How a network does by a task of the user's own."""

    score: float

    def figures(self) -> dict[str, float]:
        """By name, as results keep it."""
        return {"score": self.score}


@dataclass(frozen=True, kw_only=True)
class TaskMaskScore:
    """That of a mask, in the shape of ``fppmo_ray.pruning.score.Score``."""

    val_loss: float
    """Minus the task's score."""
    seconds: float
    val_accuracy: None = None


@dataclass(frozen=True, kw_only=True)
class TaskTuned:
    """How a task's own fine-tuning went: its loss, if it has one, is not known here."""

    seconds: float
    loss: None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a network gets right, and how large it is."""

    choose_val: Metrics | TaskScore
    test: Metrics | TaskScore
    parameters: int
    file_bytes: int
    """Of its state dict, saved."""
