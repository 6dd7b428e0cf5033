"""The ways to prune without training that are compared: masks, and how networks are mended."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import torch
from rivals.rankings import with_random_widths
from rivals.torch_pruning_masks import (
    NEED_SLOPES,
    OwnCriterion,
    Slopes,
    slopes_of,
    torch_pruning_mask,
)
from torch import nn

from fppmo_ray.distribution import BoolArray, Budget, IntArray
from fppmo_ray.distribution.allocation import GAMMAS, allocation_masks
from fppmo_ray.distribution.logits import uniform_priority
from fppmo_ray.pruning import Criterion, Tracing, extract, importance
from fppmo_ray.pruning.calibration import (
    Calibration,
    FilterOrder,
    LayerTargets,
    Refit,
    calibrate,
    layer_targets,
    obs_order,
    reconstruct,
)
from fppmo_ray.pruning.calibration.divergence import Answers, answers, divergence
from fppmo_ray.training import Images, recalibrate_batchnorm

_BATCH = 50  # small batches stay in the cache of a CPU: they are twice as fast as those of 250
_RECALIBRATION_BATCH = 250
_SCORED_ON, _RECALIBRATED_ON = 500, 250  # images of a random mask's score
REFIT = " + refit"
"""Ends the names of methods whose masks are refitted, where they come without it too."""
RECONSTRUCTED = ", reconstructed"
"""Ends the names of methods whose networks are refitted, recalibrated and reconstructed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pruned:
    """What a method made of the dense network."""

    network: nn.Module
    keep: BoolArray
    divergence: float
    seconds: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Study:
    """A dense network, the unlabelled images that all methods get, and what is found once."""

    dense: nn.Module
    tracing: Tracing
    images: Images
    trace_seconds: float
    random_scores: int
    seed: int
    _known_targets: dict[int, tuple[LayerTargets, float]] = field(default_factory=dict)
    """By number of images: the dense network's outputs, and the seconds that they took."""

    def prune(self, method: str, budget: Budget) -> Pruned:
        """Prune by a method, and say how long it took.

        Args:
            method: One of ``METHODS`` or ``BY_NAME_ONLY``.
            budget: What the mask must meet.
        """
        choose_mask = (METHODS | BY_NAME_ONLY)[method]
        reconstructed = method.endswith(RECONSTRUCTED)
        calibrated = reconstructed or method.endswith(REFIT) or not method.startswith(_PLAIN)
        shared = self.trace_seconds + (self._calibrated[1] if calibrated else 0.0)
        if "order" in choose_mask.__name__:
            shared += self._ordered[1]
        if reconstructed:
            shared += self._targets[1]
        began = time.perf_counter()
        keep = choose_mask(self, budget)
        network = extract(self.dense, self.tracing, keep)
        if calibrated:
            self._refit(network, keep)
        recalibrate_batchnorm(network, self.images.batches(_RECALIBRATION_BATCH))
        if reconstructed:
            reconstruct(network, self.tracing, keep, self._targets[0])
        seconds = time.perf_counter() - began + shared
        distance = divergence(network, self.images.batches(_BATCH), self._answers)
        return Pruned(network=network, keep=keep, divergence=distance, seconds=seconds)

    def network(
        self, keep: BoolArray, positions: IntArray | None = None, *, batch: int = _BATCH
    ) -> nn.Module:
        """The network that a mask leaves, refitted and recalibrated.

        Args:
            keep: The mask, ``(num_filters,)``.
            positions: Positions of the images that recalibrate it; None: all.
            batch: Images per pass of the recalibration.
        """
        network = extract(self.dense, self.tracing, keep)
        self._refit(network, keep)
        recalibrate_batchnorm(network, self.images.batches(batch, positions))
        return network

    def reconstructed(self, keep: BoolArray, num_images: int | None = None) -> nn.Module:
        """The network that ``prune`` hands out: refitted, recalibrated and reconstructed.

        Args:
            keep: The mask, ``(num_filters,)``.
            num_images: As many images reconstruct it, and recalibrate it before; None: all.
        """
        count = len(self.images) if num_images is None else num_images
        network = self.network(keep, np.arange(count))
        reconstruct(network, self.tracing, keep, self._targets_of(count)[0])
        return network

    @property
    def order(self) -> FilterOrder:
        """The OBS order."""
        return self._ordered[0]

    def score(self, keep: BoolArray) -> float:
        """Divergence on 500 of the images after refit and recalibration on 250."""
        some = np.arange(len(self.images))[-_RECALIBRATED_ON:]
        network = self.network(keep, some, batch=_RECALIBRATION_BATCH)
        num_batches = min(_SCORED_ON // _BATCH, len(self._answers))
        scored = np.arange(min(num_batches * _BATCH, len(self.images)))
        batches = self.images.batches(_BATCH, scored)
        return divergence(network, batches, self._answers[:num_batches])

    @cached_property
    def _calibrated(self) -> tuple[Calibration, float]:
        began = time.perf_counter()
        batches = self.images.batches(_BATCH)
        found = calibrate(self.dense, self.tracing, batches, num_images=len(self.images))
        return found, time.perf_counter() - began

    @cached_property
    def _ordered(self) -> tuple[FilterOrder, float]:
        calibration = self._calibrated[0]
        began = time.perf_counter()
        found = obs_order(self.dense, self.tracing, calibration)
        return found, time.perf_counter() - began

    @property
    def _targets(self) -> tuple[LayerTargets, float]:
        return self._targets_of(len(self.images))

    def _targets_of(self, count: int) -> tuple[LayerTargets, float]:
        if count not in self._known_targets:
            began = time.perf_counter()
            batches = self.images.batches(_BATCH, np.arange(count))
            inputs = torch.cat([images for images, _ in batches])
            found = layer_targets(self.dense, self.tracing, [inputs])
            assert found is not None  # a study has enough images and memory
            self._known_targets[count] = found, time.perf_counter() - began
        return self._known_targets[count]

    @cached_property
    def slopes(self) -> Slopes:
        """Gradients of all images, by their labels, which rivals may use."""
        return slopes_of(self.dense, self.images.batches(_BATCH))

    @cached_property
    def _answers(self) -> Answers:
        return answers(self.dense, self.images.batches(_BATCH))

    @cached_property
    def _refit(self) -> Refit:
        return Refit(self.dense, self.tracing, self._calibrated[0])


Method = Callable[[Study, Budget], BoolArray]
Multiple = int | Literal["wide"]


def _uniform(criterion: Criterion) -> Method:
    """Every group loses the same share, its least important filters first."""

    def uniform(study: Study, budget: Budget) -> BoolArray:
        values = importance(study.dense, study.tracing, criterion)
        return budget.fill(uniform_priority(budget.space, values))

    return uniform


def _torch_pruning(criterion: OwnCriterion = "magnitude", *, global_pruning: bool = True) -> Method:
    """Torch-Pruning's own pruner, with one threshold for all layers or one ratio for each."""

    def torch_pruning(study: Study, budget: Budget) -> BoolArray:
        return torch_pruning_mask(
            study.dense,
            study.tracing,
            budget,
            next(study.images.batches(1))[0],
            global_pruning=global_pruning,
            criterion=criterion,
            slopes=study.slopes if criterion in NEED_SLOPES else None,
        )

    return torch_pruning


def _uniform_on_obs_order(study: Study, budget: Budget) -> BoolArray:
    return budget.fill(uniform_priority(budget.space, study.order.importance))


def _allocation(gamma: float, multiple: Multiple = 1) -> Method:
    """Widths from the error curves, with a weight of parameters, in multiples of a number."""

    def allocation_on_obs_order(study: Study, budget: Budget) -> BoolArray:
        order, budget = study.order, _in_multiples(budget, multiple)
        [keep] = allocation_masks([budget], order.error_curves, order.importance, gamma=gamma)
        return keep

    return allocation_on_obs_order


def _in_multiples(budget: Budget, multiple: Multiple) -> Budget:
    """Return a budget whose widths are multiples of a number; wide: of 8 in wide layers."""
    limited = budget.space.with_limits(multiple=multiple).groups
    groups = tuple(
        replace(group, multiple=other.multiple)
        for group, other in zip(budget.space.groups, limited, strict=True)
    )
    space = replace(budget.space, groups=groups)
    if space.min_macs > budget.max_macs:
        raise ValueError(
            f"widths in multiples cost {space.min_macs:,} MACs at least, got a budget of "
            f"{budget.max_macs:,}; name a smaller cut for them"
        )
    return replace(budget, space=space)


def _random_widths_on_obs_order(study: Study, budget: Budget) -> BoolArray:
    """The best of many random widths, by scores on the images."""
    rng = np.random.default_rng(study.seed)
    masks = [
        with_random_widths(budget, study.order.importance, rng) for _ in range(study.random_scores)
    ]
    return min(masks, key=study.score)


METHODS: dict[str, Method] = {
    "l1": _uniform("l1"),
    "fpgm": _uniform("fpgm"),
    "torch-pruning": _torch_pruning(),
    "obs, uniform widths": _uniform_on_obs_order,
    "obs, random widths": _random_widths_on_obs_order,
    "allocation, gamma 0": _allocation(0.0),
    "allocation, gamma 0.3": _allocation(0.3),
    "allocation, gamma 1": _allocation(1.0),
    "allocation, gamma 3": _allocation(3.0),
}
"""From a study and a budget to the mask. Masks of plain criteria are refitted only by name."""
_PLAIN = ("l1", "fpgm", "torch-pruning")
METHODS |= {name + REFIT: METHODS[name] for name in _PLAIN}
METHODS |= {
    name + RECONSTRUCTED: METHODS[name]
    for name in (*_PLAIN, "obs, uniform widths", *(n for n in METHODS if "gamma" in n))
}
_MULTIPLES: dict[str, Multiple] = {"multiples of 8 in wide layers": "wide", "multiples of 8": 8}
IN_MULTIPLES: dict[str, Method] = {
    f"allocation, gamma {gamma:g}, {name}{RECONSTRUCTED}": _allocation(gamma, multiple)
    for name, multiple in _MULTIPLES.items()
    for gamma in GAMMAS
}
"""Widths that suit GPUs: measured by name only, since deep cuts are out of their reach."""
TORCH_PRUNING: dict[str, Method] = {
    f"torch-pruning {criterion}{one_ratio}{mended}": _torch_pruning(
        criterion, global_pruning=not one_ratio
    )
    for criterion in get_args(OwnCriterion)
    for one_ratio in ("", ", one ratio")
    for mended in ("", RECONSTRUCTED)
}
"""Torch-Pruning's other importances: measured by name only."""
BY_NAME_ONLY = IN_MULTIPLES | TORCH_PRUNING
