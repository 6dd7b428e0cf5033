"""The settings of a search, and the workers that it runs on."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal, get_args

from fppmo_ray.distribution import OptimizerSettings, RankBy
from fppmo_ray.distribution.allocation import GAMMAS
from fppmo_ray.distribution.limits import Resource
from fppmo_ray.pruning.importance import Ordering
from fppmo_ray.pruning.score import Fidelity
from fppmo_ray.service.pool.cluster import Demand
from fppmo_ray.service.pool.in_flight import TimeLimits
from fppmo_ray.training import ComputeConfig, DType, Recipe

_AT_LEAST_1 = (
    *("score_images", "score_recalibrate_images", "rescore_images", "recalibrate_images"),
    *("rescore_seeds", "latency_batch", "calibration_images"),
)
_MIN_GENERATIONS = 2  # per stage: in a single one, no mask is sampled after an update
_LONG_TRAINING = 6  # epochs, see gamma
_WIDTH_MULTIPLES = {"cpu": 1, "cuda": 8}
_CHOICES = {
    "importance": get_args(Ordering),
    "dtype": ("auto", *get_args(DType)),
    "score_by": ("labels", "divergence"),
    "start": ("uniform", "allocation"),
}


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """All settings that a search's numbers depend on; all of them are journaled."""

    macs_cut: float | tuple[float, ...] = 0.0
    """Share of the dense network's multiply-accumulates to remove, in (0, 1). Several ascending
    values (0.4,0.57,0.7) make as many budgets in one search: they share all feedback, and each gets
    an even share of the proposals and a network in the end. 0 limits no MACs; then another cut must
    be given."""
    params_cut: float | None = None
    """Share of the parameters to remove in addition to macs_cut, in (0, 1)."""
    latency_cut: float | None = None
    """Share of the dense network's latency to remove, in (0, 1). A worker measures latency at the
    start of the search, with the network as it is written and in float32."""
    latency_batch: int = 1
    """Batch size at which latency is measured."""
    memory_cut: float | None = None
    """Share to remove of the peak memory that one image's activations take in inference."""
    proposals: int = 640
    """Number of masks to score in the whole search. 0 scores none and takes the allocation, which
    must be the start."""
    population: int = 16
    """Proposals per generation. Four or more per worker keep the workers busy."""
    lag: int = 1
    """Generations that may be sampled before the feedback of the previous one is complete. 1 keeps
    workers busy while the last proposals of a generation are scored."""
    rule: str = "layer_es"
    """Update rule: layer_es, elite, random or widths. The rule widths is layer_es for the widths
    alone: layers keep their most important filters. Use it with fewer than 0.3 proposals per
    filter."""
    rank_by: RankBy = "val_loss"
    """The score that ranks the proposals of a generation."""
    capacity_weight: float = 1.0
    """How much the remaining parameters count when losses are compared. A mask that keeps more
    parameters at equal MACs recovers better in fine-tuning, so each loss is multiplied by
    (share of parameters left) ** -capacity_weight. Not used with rank_by=val_accuracy."""
    importance: Ordering = "fpgm"
    """Criterion of filter importance, from which the probabilities start. fpgm leads to better
    networks than l1 after fine-tuning, although not before it. obs is the order of least error
    when filters are removed one by one, which a worker calibrates without labels."""
    start: Literal["uniform", "allocation"] = "uniform"
    """Widths at which the search starts: the same share of every layer, or those that the error
    curves of a calibration give without scores. The mask of these widths is then always among the
    finalists, and its network in the closing table."""
    gamma: float | tuple[float, ...] | None = None
    """How much an allocation spares parameters, >= 0. Several: each is scored once, and every
    budget starts at the best. None: 0.3, 1 and 3 are scored where networks are fine-tuned for
    fewer than 6 epochs, else 3, since networks with more parameters recover better."""
    calibration_images: int = 1000
    """Number of search-train images that the dense network is calibrated on, for the importance
    obs, the start at the allocation and refits. All if there are fewer."""
    refit: bool = False
    """Whether the layers behind removed filters are refitted by least squares: in every score, and
    in the networks before fine-tuning. Every worker calibrates the dense network when it starts."""
    distill_steps: int = 0
    """Steps of distillation between pruning and fine-tuning: the chosen, the allocated and the
    importance-only network each learn, on the calibration images and without labels, to answer as
    the dense network does. 300 steps lift ResNet-20 at a cut of 57 % from 77 to 84 % with 500
    images. 0: none."""
    min_keep: float = 0.1
    """Smallest share of the filters of a group that a mask may keep, in (0, 1]."""
    width_multiple: int | None = None
    """Widths are multiples of this number. None: 8 if workers hold GPUs, whose matrix units are
    fastest then, else 1."""
    layer_limits: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Smallest and largest share of filters to keep, by the name of a layer or a pattern such as
    ``layer1.*``. Other layers have the limits min_keep and 1."""
    ignore: tuple[str, ...] = ()
    """Names of layers, or of modules that contain layers, that keep all filters. Patterns such as
    ``layer1.*`` are allowed."""
    seed: int = 0
    """Random seed of masks, scores and training, >= 0."""
    score_steps: int = 0
    """Fine-tuning steps inside a score. With 0 steps a score only recalibrates: in
    ``jobs/experiments/fidelity.py`` no deeper score agreed better with long fine-tuning, and 50
    steps cost 36 times as much."""
    recalibrate_images: int = 1000
    """Number of search-train images that re-estimate the batch-norm statistics of finalists, and of
    chosen networks before fine-tuning."""
    score_by: Literal["labels", "divergence"] = "labels"
    """What the loss of a score compares the network's answers with: the labels (cross-entropy), or
    the dense network's answers to the same images (Kullback-Leibler divergence at temperature 4).
    Accuracy is reported in both cases."""
    score_images: int = 500
    """Number of search-val images that a proposal is scored on; all if there are fewer. See
    "Fidelity of scores" in jobs/experiments/README.md."""
    score_recalibrate_images: int = 250
    """Number of search-train images that re-estimate the batch-norm statistics of a proposal."""
    rescore_images: int = 2000
    """Number of choose-val images that a finalist is scored on."""
    rescore_seeds: int = 3
    """Number of fresh seeds with which every finalist is rescored on choose-val."""
    baseline_epochs: int = 0
    """Epochs of training of the dense network before it is pruned; 0: it is trained already."""
    baseline_learning_rate: float = 0.1
    """Peak learning rate of the baseline_epochs."""
    stages: float | tuple[float, ...] = ()
    """Ascending cuts up to macs_cut (0.25,0.45,0.57) for gradual pruning. Each stage is a search
    with an even share of the proposals, in ``stage-1``, ``stage-2`` ... of the run directory. The
    next stage prunes the network that it has chosen, after fine-tuning."""
    stage_epochs: int = 5
    """Epochs of fine-tuning between two stages."""
    dtype: Literal["auto"] | DType = "auto"
    """Number format of convolutions and matrix products. ``auto`` is bfloat16 if the workers'
    processors have units for it (AVX-512 BF16, AMX, CUDA capability 8.0), else float32. Name a
    format to compute the same on machines with different processors."""
    autotune: bool = False
    """Whether to measure at the start how scores are computed fastest (dtype if it is ``auto``,
    folded batch norms, threads; on GPUs also memory layout, batch size, CUDA graphs). The result is
    journaled. Another search may get another result, and then differs in rounding and masks."""
    recipe: Recipe = field(default_factory=Recipe)
    """How networks are trained: score_steps of it in scores, and all of its epochs for the chosen,
    the importance-only and the dense network at the end."""

    def __post_init__(self) -> None:
        for name in ("score_steps", "distill_steps", "baseline_epochs", "stage_epochs"):
            _require(getattr(self, name) >= 0, name, ">= 0", getattr(self, name))
        for name in _AT_LEAST_1:
            _require(getattr(self, name) >= 1, name, ">= 1", getattr(self, name))
        _require(0 < self.min_keep <= 1, "min_keep", "in (0, 1]", self.min_keep)
        rate = self.baseline_learning_rate
        _require(rate > 0, "baseline_learning_rate", "> 0", rate)
        if self.width_multiple is not None:
            _require(self.width_multiple >= 1, "width_multiple", ">= 1", self.width_multiple)
        for name, known in _CHOICES.items():
            _require(getattr(self, name) in known, name, f"one of {known}", getattr(self, name))
        self._check_start()
        self.optimizer_settings()  # refuses a wrong budget, rule or population at once
        in_stages(self)  # refuses stages that do not lead up to the budget

    def _check_start(self) -> None:
        """Refuse stages that start at an allocation, and nothing to start from without scores."""
        for gamma in self.gammas() or (-1.0,):
            _require(0 <= gamma < math.inf, "gamma", "finite and >= 0", self.gamma)
        if self.start == "allocation" and self.stages:
            raise ValueError(
                "start allocation does not go with stages, each of which starts where the one "
                "before it has ended; leave stages out, or start uniform"
            )
        if self.proposals == 0 and self.start != "allocation":
            raise ValueError(
                "proposals = 0 leaves the allocation alone, so start must be allocation, got "
                f"{self.start}; give it, or at least {self.population} proposals"
            )

    def gammas(self) -> tuple[float, ...]:
        """Return the weights of the parameters to choose an allocation from."""
        if self.gamma is None:
            return GAMMAS if self.recipe.epochs < _LONG_TRAINING else GAMMAS[-1:]
        return self.gamma if isinstance(self.gamma, tuple) else (self.gamma,)

    def on(self, device_type: str) -> SearchSettings:
        """Return the settings with the defaults of a device type, as they are journaled.

        Args:
            device_type: ``cuda`` or ``cpu``.
        """
        if self.width_multiple is not None:
            return self
        return replace(self, width_multiple=_WIDTH_MULTIPLES[device_type])

    @property
    def macs_cuts(self) -> tuple[float, ...]:
        """The macs_cut of every budget, ascending."""
        return self.optimizer_settings().macs_cuts

    @property
    def further_cuts(self) -> dict[Resource, float]:
        """Cuts of resources other than MACs, by resource."""
        return self.optimizer_settings().further_cuts

    def journaled(self) -> dict[str, Any]:
        """Return all settings as plain data, without those of resources that are not cut.

        A search's identity therefore stays the same when a new resource can be cut.
        """
        unused = [f"{name}_cut" for name in get_args(Resource) if name not in self.further_cuts]
        if self.latency_cut is None:
            unused.append("latency_batch")
        return {name: value for name, value in asdict(self).items() if name not in unused}

    def only_macs_cut(self) -> float:
        """Return ``macs_cut`` of settings with a single budget and no other cut.

        Raises:
            ValueError: there are several budgets, or other cuts.
        """
        if self.further_cuts:
            listed = ", ".join(f"{name}_cut" for name in self.further_cuts)
            raise ValueError(
                f"masks are compared at equal MACs here, got {listed}; give macs_cut alone"
            )
        if len(self.macs_cuts) > 1:
            listed = ",".join(map(str, self.macs_cuts))
            raise ValueError(f"macs_cut must be a single one here, got {listed}; give one of them")
        return self.macs_cuts[0]

    def optimizer_settings(self) -> OptimizerSettings:
        """Return the settings of the probability model."""
        return OptimizerSettings(
            macs_cut=self.macs_cut,
            params_cut=self.params_cut,
            latency_cut=self.latency_cut,
            memory_cut=self.memory_cut,
            num_proposals=self.proposals,
            rule=self.rule,
            population_size=self.population,
            lag=self.lag,
            seed=self.seed,
            rank_by=self.rank_by,
            capacity_weight=self.capacity_weight if self.rank_by == "val_loss" else 0.0,
        )

    def plain_compute(self, *, threads: int) -> ComputeConfig:
        """Return the compute configuration of the settings, with float32 for the dtype ``auto``.

        Args:
            threads: CPUs that a worker holds.
        """
        dtype: DType = "float32" if self.dtype == "auto" else self.dtype
        return ComputeConfig(dtype=dtype, threads=threads)

    def fidelity(self) -> Fidelity:
        """Return the amount of work in a proposal's score."""
        return Fidelity(
            steps=self.score_steps,
            recalibrate_images=self.score_recalibrate_images,
            score_images=self.score_images,
        )

    def rescore_fidelity(self) -> Fidelity:
        """Return the amount of work in a finalist's score: more images, as they are few."""
        return Fidelity(
            steps=self.score_steps,
            recalibrate_images=self.recalibrate_images,
            score_images=self.rescore_images,
        )


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The workers of a search. Of these settings, only threads and device type change scores."""

    workers: int = 2
    """Number of workers to ask the cluster for; they start as resources become free."""
    gpus_per_worker: float = 0.0
    """GPUs that each worker holds; with a fraction, workers share a GPU. 0: scores run on CPUs."""
    cpus_per_worker: int = 1
    """CPUs that each worker holds. torch uses as many threads, unless autotune finds fewer to be
    faster."""
    fine_tune_workers: int = 1
    """Number of processes (Ray Train) that share each training of the baseline, between stages and
    at the end, each with a whole GPU if workers hold any. 1 trains the networks side by side, each
    on one worker."""
    score_timeout: float | None = None
    """Seconds after which a score, the trial score at the start included, is taken from its worker,
    which is replaced. None: 10 times the second longest score so far, at least 5 minutes; a day
    until the first one has ended."""
    call_timeout: float | None = None
    """Seconds after which any other call is taken from its worker: loading the data, importance, an
    epoch, an evaluation, the whole fine-tuning of a task of your own. None: learned for each kind
    of call like that of scores."""

    def __post_init__(self) -> None:
        _require(self.workers >= 1, "workers", ">= 1", self.workers)
        _require(self.gpus_per_worker >= 0, "gpus_per_worker", ">= 0", self.gpus_per_worker)
        if self.gpus_per_worker > 1:
            whole = self.gpus_per_worker == int(self.gpus_per_worker)
            _require(whole, "gpus_per_worker", "whole above 1", self.gpus_per_worker)
        for name in ("cpus_per_worker", "fine_tune_workers"):
            _require(getattr(self, name) >= 1, name, ">= 1", getattr(self, name))
        for name in ("score_timeout", "call_timeout"):
            timeout = getattr(self, name)
            _require(timeout is None or timeout > 0, name, "> 0 s", timeout)

    @property
    def demand(self) -> Demand:
        """Resources that the cluster is asked for, for each worker."""
        return Demand(cpus=self.cpus_per_worker, gpus=self.gpus_per_worker)

    @property
    def replica_demand(self) -> Demand:
        """Resources of each of several processes that train a network together."""
        return Demand(cpus=self.cpus_per_worker, gpus=1.0 if self.gpus_per_worker else 0.0)

    def time_limits(self) -> TimeLimits:
        """Return how long the calls of workers may run, for a pool of its own."""
        scores = ("try_compute", "score", "rescore")
        return TimeLimits(dict.fromkeys(scores, self.score_timeout), others=self.call_timeout)

    @property
    def device_type(self) -> str:
        """``cuda`` if workers hold GPUs, else ``cpu``."""
        return "cuda" if self.gpus_per_worker > 0 else "cpu"


def in_stages(settings: SearchSettings) -> list[SearchSettings]:
    """Return the settings of every stage, which is a whole search; a single one without stages.

    The proposals are divided by whole generations. The cut of a stage is a share of the MACs of the
    network that the first stage begins with.

    Args:
        settings: The settings of the search; their ``macs_cut`` is that of the last stage.

    Raises:
        ValueError: the cuts do not lead up to the search's, or the generations are too few.
    """
    earlier = _earlier_cuts(settings)
    whole = settings.optimizer_settings()
    num_stages, num_generations = len(earlier) + 1, whole.num_generations
    if earlier and num_generations < _MIN_GENERATIONS * num_stages:
        needed = _MIN_GENERATIONS * num_stages * settings.population
        raise ValueError(
            f"{num_stages} stages need at least {_MIN_GENERATIONS} generations each, got "
            f"{num_generations} in all; give --proposals {needed} or more, or fewer stages"
        )
    if not earlier:
        return [settings]
    ends = [num_generations * stage // num_stages for stage in range(num_stages + 1)]
    return [
        replace(
            settings,
            macs_cut=macs_cut,
            proposals=whole.ids(end - 1).stop - whole.ids(begin).start,
            stages=(),
        )
        for macs_cut, (begin, end) in zip(
            (*earlier, settings.macs_cut), pairwise(ends), strict=True
        )
    ]


def _earlier_cuts(settings: SearchSettings) -> tuple[float, ...]:
    cuts = settings.stages if isinstance(settings.stages, tuple) else (settings.stages,)
    if not cuts:
        return ()
    [*_, last] = settings.macs_cuts
    if len(settings.macs_cuts) > 1:
        raise ValueError(
            f"stages lead up to one macs_cut, got {len(settings.macs_cuts)}; give one of them, or "
            "no stages"
        )
    if settings.further_cuts:
        listed = ", ".join(f"{name}_cut" for name in settings.further_cuts)
        raise ValueError(
            f"stages lead up to a macs_cut alone, got {listed} beside it; leave stages out, or "
            "the other cuts"
        )
    earlier = cuts[:-1] if cuts[-1] == last else cuts
    if list(earlier) != sorted({*earlier}) or not all(0 < cut < last for cut in earlier):
        raise ValueError(
            f"stages must ascend within (0, {last}], up to macs_cut, got {','.join(map(str, cuts))}"
        )
    return earlier


def _require(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {got}")
