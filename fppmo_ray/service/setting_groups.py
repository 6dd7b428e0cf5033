"""The groups of a search's settings, each for one concern.

A setting has one name: it is unique among all groups, and it is also the flag of jobs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

import tyro

from fppmo_ray.distribution import RankBy
from fppmo_ray.pruning.importance import Ordering
from fppmo_ray.training import DType

_CHOICES = {
    "importance": get_args(Ordering),
    "dtype": ("auto", *get_args(DType)),
    "score_by": ("labels", "divergence"),
    "start": ("uniform", "allocation"),
}


@dataclass(frozen=True, kw_only=True)
class Space:
    """What a mask may remove: layers that stay whole, and limits of the others' widths."""

    ignore: tuple[str, ...] = ()
    """Names of layers, or of modules that contain layers, that keep all filters. Patterns such as
    ``layer1.*`` are allowed."""
    min_keep: float = 0.1
    """Smallest share of the filters of a group that a mask may keep, in (0, 1]."""
    multiple: Annotated[int | Literal["wide"] | None, tyro.conf.arg(name="width-multiple")] = None
    """Widths are multiples of this number. wide: multiples of 8 in layers of at least 64 filters,
    whose products GPUs compute fastest then, and any width in narrower ones, where multiples of 8
    cost accuracy. None: wide if workers hold GPUs, else 1."""
    layer_limits: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Smallest and largest share of filters to keep, by the name of a layer or a pattern such as
    ``layer1.*``. Other layers have the limits min_keep and 1."""

    def __post_init__(self) -> None:
        require(0 < self.min_keep <= 1, "min_keep", "in (0, 1]", self.min_keep)
        if isinstance(self.multiple, int):
            require(self.multiple >= 1, "multiple", ">= 1", self.multiple)


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How masks are proposed: where the probabilities start, and how feedback moves them."""

    rule: str | None = None
    """Update rule: local_es, layer_es, widths, elite or random. None: local_es from the allocation,
    which it does not leave far behind, else layer_es. widths is layer_es for the widths alone:
    layers keep their most important filters."""
    population: int = 16
    """Proposals per generation. Four or more per worker keep the workers busy."""
    lag: int = 1
    """Generations that may be sampled before the feedback of the previous one is complete. 1 keeps
    workers busy while the last proposals of a generation are scored."""
    importance: Ordering | None = None
    """Criterion of filter importance, from which the probabilities start. obs is the order of least
    error when filters are removed one by one, which a worker calibrates without labels. None: obs,
    or fpgm for a task without images."""
    start: Literal["uniform", "allocation"] | None = None
    """Widths at which the search starts: the same share of every layer, or those that the error
    curves of a calibration give without scores. The mask of these widths is then always among the
    finalists, and its network in the closing table. None: the allocation, or equal shares for a
    task without images and for stages."""
    gamma: float | tuple[float, ...] | None = None
    """How much an allocation spares parameters, >= 0. Several: each is scored once, and every
    budget starts at the best. None: 0, 1 and 3. Before fine-tuning, capacity_weight makes the
    larger ones win more often, since networks with more parameters recover better."""

    def __post_init__(self) -> None:
        _require_choices(self)


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How a mask is scored, and how the finalists are rescored."""

    score_by: Literal["labels", "divergence"] = "divergence"
    """What the loss of a score compares the network's answers with: the dense network's answers to
    the same images (Kullback-Leibler divergence at temperature 4), which tell more of a network
    than a few labels do, or the labels (cross-entropy). Accuracy is reported in both cases."""
    rank_by: RankBy = "val_loss"
    """The score that ranks the proposals of a generation."""
    capacity_weight: float | None = None
    """How much the remaining parameters count when losses are compared. A mask that keeps more
    parameters at equal MACs recovers better in fine-tuning, so each loss is multiplied by
    (share of parameters left) ** -capacity_weight. Not used with rank_by=val_accuracy. None: 1, or
    0 where networks are not fine-tuned."""
    score_steps: int = 0
    """Fine-tuning steps inside a score: by labels, or, with score_by=divergence, by distillation
    on the calibration images. With 0 steps a score only recalibrates: in
    ``jobs/experiments/fidelity.py`` no deeper score agreed better with long fine-tuning, and 50
    steps cost 36 times as much."""
    score_images: int = 500
    """Number of search-val images that a proposal is scored on; all if there are fewer. See
    "Fidelity of scores" in jobs/experiments/README.md."""
    score_recalibrate_images: int = 250
    """Number of search-train images that re-estimate the batch-norm statistics of a proposal."""
    score_reconstruct_images: int = 100
    """Number of calibration images on which a proposal's layers are corrected for the errors before
    them, where calibration.refit is on and score_steps is 0; finalists and chosen networks get all
    calibration_images. With 100 images a score takes twice as long and orders masks as all images
    do, which the refit alone does not. 0: proposals are refitted alone."""
    rescore_images: int = 2000
    """Number of choose-val images that a finalist is scored on."""
    rescore_seeds: int = 3
    """Number of fresh seeds with which every finalist is rescored on choose-val."""
    recalibrate_images: int = 1000
    """Number of search-train images that re-estimate the batch-norm statistics of finalists, and of
    chosen networks before fine-tuning."""

    def __post_init__(self) -> None:
        _require_choices(self)
        for name in ("score_steps", "score_reconstruct_images"):
            require(getattr(self, name) >= 0, name, ">= 0", getattr(self, name))
        for name in (
            *("score_images", "score_recalibrate_images", "rescore_images", "recalibrate_images"),
            "rescore_seeds",
        ):
            require(getattr(self, name) >= 1, name, ">= 1", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """One pass of the dense network over unlabelled images, and what is computed from it."""

    calibration_images: int = 1000
    """Number of search-train images that the dense network is calibrated on, for the importance
    obs, the start at the allocation and refits. All if there are fewer."""
    refit: bool | None = None
    """Whether the layers behind removed filters are refitted by least squares, and all layers then
    corrected, one after the other, for the errors before them: in every score, and in the networks
    before fine-tuning. Every worker calibrates the dense network when it starts.
    None: yes, where the task has images."""
    distill_steps: int = 0
    """Steps of distillation between pruning and fine-tuning: the chosen, the allocated and the
    importance-only network each learn, on the calibration images and without labels, to answer as
    the dense network does. 300 steps lift ResNet-20 at a cut of 57 % from 81 to 85 % with
    1,000 images. 0: none."""

    def __post_init__(self) -> None:
        require(self.distill_steps >= 0, "distill_steps", ">= 0", self.distill_steps)
        require(self.calibration_images >= 1, "calibration_images", ">= 1", self.calibration_images)


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """Training of the dense network before it is pruned."""

    baseline_epochs: int = 0
    """Epochs of training of the dense network before it is pruned; 0: it is trained already."""
    baseline_learning_rate: float = 0.1
    """Peak learning rate of the baseline_epochs."""

    def __post_init__(self) -> None:
        require(self.baseline_epochs >= 0, "baseline_epochs", ">= 0", self.baseline_epochs)
        rate = self.baseline_learning_rate
        require(rate > 0, "baseline_learning_rate", "> 0", rate)


@dataclass(frozen=True, kw_only=True)
class Gradual:
    """Gradual pruning: several searches, with fine-tuning between them."""

    stages: float | tuple[float, ...] = ()
    """Ascending cuts up to macs_cut (0.25,0.45,0.57) for gradual pruning. Each stage is a search
    with an even share of the proposals, in ``stage-1``, ``stage-2`` ... of the run directory. The
    next stage prunes the network that it has chosen, after fine-tuning."""
    stage_epochs: int = 5
    """Epochs of fine-tuning between two stages."""

    def __post_init__(self) -> None:
        require(self.stage_epochs >= 0, "stage_epochs", ">= 0", self.stage_epochs)


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """Number formats and kernels of all passes."""

    dtype: Literal["auto"] | DType = "auto"
    """Number format of convolutions and matrix products. ``auto`` is bfloat16 if the workers'
    processors have units for it (AVX-512 BF16, AMX, CUDA capability 8.0), else float32. Name a
    format to compute the same on machines with different processors."""
    autotune: bool = False
    """Whether to measure at the start how scores and, apart from them, trainings are computed
    fastest (dtype if it is ``auto``, folded batch norms, threads; on GPUs also memory layout, batch
    size, CUDA graphs). The result is journaled. Another search may get another result, and then
    differs in rounding and masks."""

    def __post_init__(self) -> None:
        _require_choices(self)


def require(holds: bool, name: str, expected: str, got: object) -> None:
    """Raise ValueError unless a setting is as expected.

    Args:
        holds: Whether it is.
        name: Name of the setting.
        expected: What the setting must be, for the message.
        got: Its value.
    """
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {got}")


def _require_choices(group: object) -> None:
    for name, known in _CHOICES.items():
        if hasattr(group, name):
            got = getattr(group, name)
            require(got is None or got in known, name, f"one of {known}", got)
