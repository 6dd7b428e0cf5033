"""The settings of a search, and where it may run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal, get_args

from fppmo_ray.distribution import OptimizerSettings, RankBy
from fppmo_ray.distribution.limits import Resource
from fppmo_ray.pruning.importance import Criterion
from fppmo_ray.pruning.score import Fidelity
from fppmo_ray.service.pool.cluster import Demand
from fppmo_ray.training import ComputeConfig, DType, Recipe

_AT_LEAST_1 = (
    *("score_images", "score_recalibrate_images", "rescore_images", "recalibrate_images"),
    *("rescore_seeds", "latency_batch"),
)
_MIN_GENERATIONS = 2  # of a stage: with one alone, nothing is learned from
_WIDTH_MULTIPLES = {"cpu": 1, "cuda": 8}
_CHOICES = {
    "importance": get_args(Criterion),
    "dtype": ("auto", *get_args(DType)),
}


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """All settings that a search's numbers depend on; all of them are journaled."""

    macs_cut: float | tuple[float, ...] = 0.0
    """Share of the dense network's multiply-accumulates to remove, in (0, 1). Several, ascending,
    are as many budgets in one search (0.4,0.57,0.7): each gets an even share of the proposals, a
    network of its own in the end, and all of the feedback. 0 limits no MACs; then another cut must
    be given."""
    params_cut: float | None = None
    """Share of the parameters to remove, in (0, 1), beside each macs_cut."""
    latency_cut: float | None = None
    """Share to remove of the dense network's latency, as a worker measures it at the start: the
    network as it is written, in float32."""
    latency_batch: int = 1
    """Images per pass of which the latency is meant."""
    memory_cut: float | None = None
    """Share to remove of the most bytes that the activations of one image take in inference."""
    proposals: int = 640
    """Masks to score in all."""
    population: int = 16
    """Proposals per generation. Four per worker or more keep the workers busy."""
    lag: int = 1
    """Generations in flight beside the current one: 1 hides the generations' tails."""
    rule: str = "layer_es"
    """How feedback moves the distribution: layer_es, elite, random, or widths: layer_es on
    whole layers, which keep their most important filters. That is for fewer than 0.3 proposals per
    filter."""
    rank_by: RankBy = "val_loss"
    """The score that ranks the proposals of a generation."""
    capacity_weight: float = 1.0
    """How much the parameters that a mask leaves count when losses are compared: they are
    multiplied by (share of parameters left) ** -capacity_weight. So weighed, losses tell better
    what long fine-tuning comes to: see the README's tables. Of no account where accuracies rank."""
    importance: Criterion = "fpgm"
    """The criterion that starts the probabilities. FPGM's filters are worth more than L1's after
    fine-tuning, although not before: see the README's first table."""
    min_keep: float = 0.1
    """Smallest share of a group's filters that a mask may keep, in (0, 1]."""
    width_multiple: int | None = None
    """Legal widths are multiples of this. None: 8 where workers hold GPUs, whose fast products want
    that, and 1 on CPUs."""
    layer_limits: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Smallest and largest share of filters that these layers, or patterns such as ``layer1.*``,
    may keep, instead of min_keep and 1."""
    ignore: tuple[str, ...] = ()
    """Layers, or modules that hold them, whose filters must all stay; patterns such as
    ``layer1.*`` stand for several."""
    seed: int = 0
    """Of the masks, the scores and the training."""
    score_steps: int = 0
    """Fine-tuning steps inside a score. 0 only recalibrates: in ``jobs/experiments/fidelity.py`` no
    deeper score agreed better with long fine-tuning, and 50 steps cost 36 times as much."""
    recalibrate_images: int = 1000
    """Search-train images that re-estimate the batch-norm statistics of finalists, and of networks
    before they are fine-tuned or handed out."""
    score_images: int = 500
    """Search-val images that a score is read on (all of them where there are fewer). Proposals are
    many, so few images serve each: see "Fidelity of scores" in jobs/experiments/README.md."""
    score_recalibrate_images: int = 250
    """Search-train images that re-estimate the batch-norm statistics for these."""
    rescore_images: int = 2000
    """Choose-val images that a finalist's scores are read on."""
    rescore_seeds: int = 3
    """Fresh seeds with which every finalist is rescored on choose-val."""
    baseline_epochs: int = 0
    """Epochs of training for the dense network before it is pruned; 0 takes it as it is."""
    baseline_learning_rate: float = 0.1
    """Peak learning rate of these epochs."""
    stages: float | tuple[float, ...] = ()
    """Cuts before the last, ascending up to macs_cut (0.25,0.45,0.57): each is a search of its own
    with an even share of the proposals, in ``stage-1``, ``stage-2`` ... of the run directory. Its
    chosen network is fine-tuned, and the next stage prunes that."""
    stage_epochs: int = 5
    """Epochs of fine-tuning between two stages."""
    dtype: Literal["auto"] | DType = "auto"
    """Number format of the convolutions and products in all passes. ``auto`` takes bfloat16 where
    the workers' processors have units for it (AVX-512 BF16, AMX, CUDA capability 8.0), else
    float32. Give one to compute the same on machines of different processors."""
    autotune: bool = False
    """Whether to measure at the start how scores are computed fastest (dtype where it is ``auto``,
    folded batch norms, threads; on GPUs also memory layout, batch size, CUDA graphs). What is found
    is journaled, but may be another the next time: rounding and masks then differ."""
    recipe: Recipe = field(default_factory=Recipe)
    """How networks are trained: a few steps of it in scores, all its epochs for the chosen, the
    importance-only and the dense network in the end."""

    def __post_init__(self) -> None:
        for name in ("score_steps", "baseline_epochs", "stage_epochs"):
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
        self.optimizer_settings()  # refuses a wrong budget, rule or population at once
        in_stages(self)  # refuses stages that do not lead up to the budget

    def on(self, device_type: str) -> SearchSettings:
        """The settings with all that the workers' device decides: those that are journaled.

        Args:
            device_type: ``cuda`` or ``cpu``.
        """
        if self.width_multiple is not None:
            return self
        return replace(self, width_multiple=_WIDTH_MULTIPLES[device_type])

    @property
    def macs_cuts(self) -> tuple[float, ...]:
        """``macs_cut``, one for every budget, ascending."""
        return self.optimizer_settings().macs_cuts

    @property
    def further_cuts(self) -> dict[Resource, float]:
        """What is limited besides MACs."""
        return self.optimizer_settings().further_cuts

    def journaled(self) -> dict[str, Any]:
        """All settings as plain data, those of further cuts only where such are asked for.

        So searches without them are what they were before there were any.
        """
        unused = [f"{name}_cut" for name in get_args(Resource) if name not in self.further_cuts]
        if self.latency_cut is None:
            unused.append("latency_batch")
        return {name: value for name, value in asdict(self).items() if name not in unused}

    def only_macs_cut(self) -> float:
        """``macs_cut`` where there may be just one, and no other cut.

        Raises:
            ValueError: there are several, or others.
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
        """The configuration asked for; float32 where a worker decides on the dtype."""
        dtype: DType = "float32" if self.dtype == "auto" else self.dtype
        return ComputeConfig(dtype=dtype, threads=threads)

    def fidelity(self) -> Fidelity:
        """How much work a proposal's score is."""
        return Fidelity(
            steps=self.score_steps,
            recalibrate_images=self.score_recalibrate_images,
            score_images=self.score_images,
        )

    def rescore_fidelity(self) -> Fidelity:
        """How much work each score of a finalist is: they are few, and one of them is chosen."""
        return Fidelity(
            steps=self.score_steps,
            recalibrate_images=self.recalibrate_images,
            score_images=self.rescore_images,
        )


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the work runs. Of all this only threads and device type may change a score."""

    workers: int = 2
    """Scoring workers to ask the cluster for; they join as resources appear."""
    gpus_per_worker: float = 0.0
    """GPUs each worker holds; a fraction shares one. 0 scores on the CPU."""
    cpus_per_worker: int = 1
    """CPUs each worker holds, and torch's threads, unless fewer are measured to be faster."""
    fine_tune_workers: int = 1
    """Processes that share each training of the baseline, between stages and in the end (Ray
    Train), with a whole GPU each where workers hold any. 1 trains the networks side by side, one
    worker each."""
    score_timeout: float | None = None
    """Seconds after which a score is taken from its worker, which is replaced. None learns the
    limit: 10 times the longest score so far but one, at least 5 minutes; epochs, evaluations and
    all other work are limited that way in any case. The very first of a kind has no limit but is
    warned of after 10 minutes."""

    def __post_init__(self) -> None:
        _require(self.workers >= 1, "workers", ">= 1", self.workers)
        _require(self.gpus_per_worker >= 0, "gpus_per_worker", ">= 0", self.gpus_per_worker)
        if self.gpus_per_worker > 1:
            whole = self.gpus_per_worker == int(self.gpus_per_worker)
            _require(whole, "gpus_per_worker", "whole above 1", self.gpus_per_worker)
        for name in ("cpus_per_worker", "fine_tune_workers"):
            _require(getattr(self, name) >= 1, name, ">= 1", getattr(self, name))
        if self.score_timeout is not None:
            _require(self.score_timeout > 0, "score_timeout", "> 0 s", self.score_timeout)

    @property
    def demand(self) -> Demand:
        """What the cluster is asked for each worker."""
        return Demand(cpus=self.cpus_per_worker, gpus=self.gpus_per_worker)

    @property
    def device_type(self) -> str:
        """``cuda`` where workers hold GPUs, else ``cpu``."""
        return "cuda" if self.gpus_per_worker > 0 else "cpu"


def in_stages(settings: SearchSettings) -> list[SearchSettings]:
    """Return the settings of every stage, each that of a whole search; one stage without cuts.

    The proposals are divided by whole generations. A stage's cut is a share of the MACs of the
    network that the search begins with.

    Args:
        settings: The search; its ``macs_cut`` is the last stage's.

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
