"""The settings of a search: a frozen record with a group for each concern."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Any, Literal, get_args

from fppmo_ray.distribution import OptimizerSettings
from fppmo_ray.distribution.allocation import GAMMAS
from fppmo_ray.distribution.limits import Resource
from fppmo_ray.distribution.settings import cuts_of
from fppmo_ray.pruning.score import Fidelity
from fppmo_ray.service.setting_groups import (
    Baseline,
    Calibration,
    Gradual,
    Numerics,
    Sampler,
    Scoring,
    Space,
    require,
)
from fppmo_ray.training import ComputeConfig, DType, Recipe

_FROM_ALLOCATION, _FROM_SHARES = 48, 160  # proposals, by the start of a search
_USUAL_GENERATIONS = 3
_MIN_GENERATIONS = 2  # per stage: in a single one, no mask is sampled after an update
_WIDTH_MULTIPLES: dict[str, int | Literal["wide"]] = {"cpu": 1, "cuda": "wide"}
_GROUPS = ("space", "sampler", "scoring", "calibration", "baseline", "gradual", "numerics")


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
    proposals: int | None = None
    """Number of masks to score in the whole search. 0 scores none and takes the allocation, which
    must be the start. None: 48 for every budget where the search starts at the allocation, which
    gain there as much as 160 (see "Where feedback pays" in jobs/experiments/README.md), and 160
    where it starts with equal shares; three generations in any case."""
    seed: int = 0
    """Random seed of masks, scores and training, >= 0."""
    space: Space = Space()
    """What a mask may remove."""
    sampler: Sampler = Sampler()
    """How masks are proposed."""
    scoring: Scoring = Scoring()
    """How masks are scored."""
    calibration: Calibration = Calibration()
    """The pass over unlabelled images, and what is computed from it."""
    fine_tune: Recipe = Recipe()
    """How networks are trained: score_steps of it in scores, and all of its epochs for the chosen,
    the importance-only and the dense network at the end."""
    baseline: Baseline = Baseline()
    """Training of the dense network before it is pruned."""
    gradual: Gradual = Gradual()
    """Whether and how the network is pruned in several stages."""
    numerics: Numerics = Numerics()
    """Number formats and kernels."""

    def __post_init__(self) -> None:
        require(self.latency_batch >= 1, "latency_batch", ">= 1", self.latency_batch)
        self._check_start()
        self.optimizer_settings()  # refuses a wrong budget, rule or population at once
        in_stages(self)  # refuses stages that do not lead up to the budget

    def _check_start(self) -> None:
        """Refuse stages that start at an allocation, and nothing to start from without scores."""
        for gamma in self.gammas() or (-1.0,):
            require(0 <= gamma < math.inf, "gamma", "finite and >= 0", self.sampler.gamma)
        if self.sampler.start == "allocation" and self.gradual.stages:
            raise ValueError(
                "start allocation does not go with stages, each of which starts where the one "
                "before it has ended; leave stages out, or start uniform"
            )
        if self.proposals == 0 and self.sampler.start == "uniform":
            raise ValueError(
                "proposals = 0 leaves the allocation alone, so start must be allocation, got "
                f"uniform; give it, and a task images, or at least {self.sampler.population} "
                "proposals"
            )

    def gammas(self) -> tuple[float, ...]:
        """Return the weights of the parameters to choose an allocation from."""
        gamma = self.sampler.gamma
        if gamma is None:
            return GAMMAS
        return gamma if isinstance(gamma, tuple) else (gamma,)

    @property
    def num_proposals(self) -> int:
        """Number of masks to score: ``proposals``, or what suits the start."""
        if self.proposals is not None:
            return self.proposals
        usual = _FROM_SHARES
        if self.sampler.start == "allocation":
            usual = _FROM_ALLOCATION * len(self.macs_cuts)
        return max(usual, _USUAL_GENERATIONS * self.sampler.population)

    def on(self, device_type: str, *, has_images: bool) -> SearchSettings:
        """Return the settings with a value for each that was left open, as they are journaled.

        Args:
            device_type: ``cuda`` or ``cpu``.
            has_images: Whether the task has images to calibrate the dense network on.
        """
        space, sampler, calibration = self.space, self.sampler, self.calibration
        has_curves = has_images and not self.gradual.stages
        start = sampler.start or ("allocation" if has_curves else "uniform")
        refits = has_images if calibration.refit is None else calibration.refit
        settled = replace(
            self,
            space=replace(space, multiple=space.multiple or _WIDTH_MULTIPLES[device_type]),
            sampler=replace(
                sampler,
                start=start,
                importance=sampler.importance or ("obs" if has_images else "fpgm"),
                rule=sampler.rule or ("local_es" if start == "allocation" else "layer_es"),
            ),
            calibration=replace(calibration, refit=refits),
            scoring=replace(self.scoring, capacity_weight=self._capacity_weight()),
        )
        return replace(settled, proposals=settled.num_proposals)

    def _capacity_weight(self) -> float:
        given = self.scoring.capacity_weight
        return float(self.fine_tune.epochs > 0) if given is None else given

    def flat(self) -> dict[str, Any]:
        """Return every setting by its own name, those of groups too; the recipe stays one value."""
        found: dict[str, Any] = {}
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name in _GROUPS:
                found |= {inner.name: getattr(value, inner.name) for inner in fields(value)}
            else:
                found[one.name] = value
        return found

    def changed(self, **changes: Any) -> SearchSettings:
        """Return the settings with some of them changed, each by its own name.

        ``changed(seed=1, score_steps=50)`` leaves all other settings of the search and of its
        scoring unchanged.

        Args:
            **changes: New values by the names that ``flat`` returns, or whole groups.

        Raises:
            ValueError: a name is unknown, or a value is wrong.
        """
        new = {one.name: changes.pop(one.name) for one in fields(self) if one.name in changes}
        for name in _GROUPS:
            group = new.get(name, getattr(self, name))
            inner = {
                one.name: changes.pop(one.name) for one in fields(group) if one.name in changes
            }
            new[name] = replace(group, **inner)
        if changes:
            raise ValueError(f"expected names of settings, got {', '.join(sorted(changes))}")
        return replace(self, **new)

    @property
    def macs_cuts(self) -> tuple[float, ...]:
        """The macs_cut of every budget, ascending."""
        return cuts_of(self.macs_cut)

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
        """Return the settings of the probability model.

        Raises:
            ValueError: they do not go together.
        """
        try:
            return OptimizerSettings(
                macs_cut=self.macs_cut,
                params_cut=self.params_cut,
                latency_cut=self.latency_cut,
                memory_cut=self.memory_cut,
                num_proposals=self.num_proposals,
                rule=self.sampler.rule or "layer_es",
                population_size=self.sampler.population,
                lag=self.sampler.lag,
                seed=self.seed,
                rank_by=self.scoring.rank_by,
                capacity_weight=(
                    self._capacity_weight() if self.scoring.rank_by == "val_loss" else 0.0
                ),
            )
        except ValueError as error:  # in the names that the user gave
            text = str(error).replace("num_proposals", "proposals")
            raise ValueError(text.replace("population_size", "population")) from error

    def plain_compute(self, *, threads: int) -> ComputeConfig:
        """Return the compute configuration of the settings, with float32 for the dtype ``auto``.

        Args:
            threads: CPUs that a worker holds.
        """
        dtype: DType = "float32" if self.numerics.dtype == "auto" else self.numerics.dtype
        return ComputeConfig(dtype=dtype, threads=threads)

    def fidelity(self) -> Fidelity:
        """Return the amount of work in a proposal's score."""
        return Fidelity(
            steps=self.scoring.score_steps,
            recalibrate_images=self.scoring.score_recalibrate_images,
            score_images=self.scoring.score_images,
        )

    def rescore_fidelity(self) -> Fidelity:
        """Return the amount of work in a finalist's score: more images, as they are few."""
        return Fidelity(
            steps=self.scoring.score_steps,
            recalibrate_images=self.scoring.recalibrate_images,
            score_images=self.scoring.rescore_images,
        )


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
        needed = _MIN_GENERATIONS * num_stages * settings.sampler.population
        raise ValueError(
            f"{num_stages} stages need at least {_MIN_GENERATIONS} generations each, got "
            f"{num_generations} in all; give --proposals {needed} or more, or fewer stages"
        )
    if not earlier:
        return [settings]
    ends = [num_generations * stage // num_stages for stage in range(num_stages + 1)]
    return [
        settings.changed(
            macs_cut=macs_cut,
            proposals=whole.ids(end - 1).stop - whole.ids(begin).start,
            stages=(),
        )
        for macs_cut, (begin, end) in zip(
            (*earlier, settings.macs_cut), pairwise(ends), strict=True
        )
    ]


def _earlier_cuts(settings: SearchSettings) -> tuple[float, ...]:
    stages = settings.gradual.stages
    cuts = stages if isinstance(stages, tuple) else (stages,)
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
