"""Pruning in one call, in one process: no labels, no Ray, and training only if asked for.

``prune`` traces a network, calibrates it on a few images, orders its filters, finds the widths,
extracts the smaller network, refits the layers behind removed filters and recalibrates the batch
norms. With ``distill_steps`` it then distils the dense network on the same images.
``prune_with_report`` does the same and tells what was done.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from inspect import signature
from itertools import chain
from typing import Any, Literal, ParamSpec, TypeVar, get_args

import torch
from torch import Tensor, nn

from fppmo_ray.distribution.allocation import GAMMAS, allocation_masks
from fppmo_ray.distribution.budget import Budget
from fppmo_ray.distribution.limits import Resource
from fppmo_ray.distribution.logits import uniform_priority
from fppmo_ray.distribution.space import BoolArray
from fppmo_ray.pruning.calibration import (
    Calibration,
    Refit,
    calibrate,
    layer_targets,
    obs_order,
    reconstruct,
)
from fppmo_ray.pruning.calibration.divergence import Answers, answers, divergence
from fppmo_ray.pruning.calibration_images import CalibrationImages, calibration_batches
from fppmo_ray.pruning.copying import with_plain_weights
from fppmo_ray.pruning.distillation import distill_pruned
from fppmo_ray.pruning.equivalence import check_equivalence
from fppmo_ray.pruning.extract import Tracing, extract
from fppmo_ray.pruning.given_network import plain_network
from fppmo_ray.pruning.importance import Ordering
from fppmo_ray.pruning.importance import importance as importance_of
from fppmo_ray.pruning.latency import Clock, table_of_clock
from fppmo_ray.pruning.network_io import ExampleInputs
from fppmo_ray.pruning.trace import trace
from fppmo_ray.training import Transform, recalibrate_batchnorm
from fppmo_ray.training.inputs import Inputs

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger(__name__)

_SMALL_BATCH = 50  # twice as fast on CPUs as 250, and the patches that are used vary more often


@dataclass(frozen=True, kw_only=True, eq=False)
class PruneReport:
    """A pruned network, and what was done to get it."""

    network: nn.Module
    """The smaller network, in eval mode."""
    tracing: Tracing
    """Tracing of the dense network: with ``keep``, what ``save_network`` needs."""
    keep: BoolArray
    """The mask, ``(num_filters,)``, True = kept."""
    macs_cut: float
    """Share of the dense network's MACs that was removed."""
    params_cut: float
    """Share of the dense network's parameters that was removed."""
    gamma: float | None
    """Weight of the parameters in the allocation; None where all groups lose the same share."""
    divergence: float
    """Mean divergence from the dense network's answers on the given images."""
    num_images: int
    """Images that were used."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Time of every stage."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Dense:
    """The dense network, and the images that it is pruned with."""

    network: nn.Module
    tracing: Tracing
    batches: list[tuple[Tensor, Any]]
    """Images and labels, in batches that recalibrate."""

    @cached_property
    def small(self) -> list[Tensor]:
        """The images in small batches."""
        parts = (torch.split(batch, _SMALL_BATCH) for batch, _ in self.batches)
        return list(chain.from_iterable(parts))

    @cached_property
    def images(self) -> Tensor:
        """All images, (N, ...)."""
        return torch.cat(self.small)

    @property
    def num_images(self) -> int:
        """N."""
        return sum(map(len, self.small))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Candidate:
    """A mask's network, and how far its answers are from the dense network's."""

    network: nn.Module
    keep: BoolArray
    gamma: float | None
    divergence: float


def prune_with_report(
    network: nn.Module,
    example_inputs: ExampleInputs,
    images: CalibrationImages,
    *,
    transform: Transform | None = None,
    num_images: int = 1000,
    macs_cut: float = 0.5,
    further_cuts: Mapping[Resource, float] | None = None,
    latency: Clock | None = None,
    importance: Ordering = "obs",
    gamma: float | Sequence[float] = GAMMAS,
    refit: bool = True,
    distill_steps: int = 0,
    augment: Callable[[Tensor], Tensor] | None = None,
    min_keep: float = 0.1,
    width_multiple: int | Literal["wide"] = 1,
    ignore: Sequence[str] = (),
) -> PruneReport:
    """Return a smaller network that answers as the given one does, and what was done to get it.

    No labels are needed.

    Args:
        network: A trained network with convolutions; left as it is.
        example_inputs: What its forward takes, with a batch axis, e.g. ``(1, 3, 32, 32)``. Only
            the shape matters.
        images: Inputs, of which labels are not needed: a tensor (N, C, H, W), normalised as the
            network expects, or a DataLoader, list or generator of batches of such tensors, or of
            (images, labels), which must all fit in memory; or a folder of images, arrays, a torch
            data set or a Hugging Face data set. A hundred inputs give a result, a thousand a better
            one.
        transform: How images that are no tensors yet become the network's input.
        num_images: How many are drawn at random from data that is no tensor and no list of batches.
        macs_cut: Share of the multiply-accumulates to remove, in (0, 1); 0 beside further cuts.
        further_cuts: Shares of other resources to remove, such as ``{"params": 0.3}`` or
            ``{"memory": 0.2}``; ``{"latency": 0.4}`` needs ``latency``.
        latency: (network) -> milliseconds: the clock of a latency cut, on a phone, say. It is given
            extracted networks, in eval mode on the CPU, a hundred times or so.
        importance: What orders the filters. ``obs`` orders them by the second-order error of
            removing them one by one, and finds the widths from these errors. ``l1``, ``l2``,
            ``fpgm``, ``bn_scale`` and ``taylor`` remove the same share of every group; ``taylor``
            needs labels.
        gamma: With ``obs``, how much the widths spare parameters: 1 to 3 suits ResNets, and 0
            networks with wide layers that are hardly needed, such as VGG. Several: the network
            that diverges least from the dense network's answers on the images is returned.
        refit: Whether the layers behind removed filters are refitted by least squares, and all
            layers then corrected, one after the other, for the errors before them.
        distill_steps: Steps of 100 images in which the smaller network is trained to answer as the
            dense one does on these images, without labels. 300 steps take ResNet-20 a minute on one
            core, and lift it from 81 to 85 % at a cut of 57 % with 1,000 augmented images.
        augment: Changes batches (n, C, H, W) of these steps at random, as in training: by flips and
            shifts, for example. None: the images are used as they are.
        min_keep: Smallest share of a group's filters that is kept, in (0, 1].
        width_multiple: Kept widths are multiples of this. ``wide`` suits GPUs: multiples of 8 in
            layers of at least 64 filters, any width in narrower ones.
        ignore: Names of layers, or of modules that hold them, whose filters must all stay; ``*``
            and ``?`` as in file names.

    Returns:
        The report, whose network is on the device of ``network``.

    Raises:
        ValueError: an argument is out of range, the images do not fit the network, it has nothing
            that can be pruned, or the smaller network is not exact.
    """
    network = plain_network(network)
    gammas = _checked_gammas(gamma)
    if distill_steps < 0:
        raise ValueError(f"distill_steps must be >= 0, got {distill_steps}")
    _check_importance(importance)
    clock = _Clock()
    with clock.stage("trace"):
        tracing = trace(network, example_inputs, ignore=ignore)
        network = with_plain_weights(network)
        space = tracing.space.with_limits(min_keep=min_keep, multiple=width_multiple)
        if latency is not None:
            if "latency" not in (further_cuts or {}):
                raise ValueError(
                    "latency times networks for a cut of it; give further_cuts={'latency': 0.3} too"
                )
            space = replace(space, latency=table_of_clock(latency, network, tracing, space))
        budget = Budget.from_cut(space, macs_cut, further_cuts)
        batches = calibration_batches(images, network, example_inputs, transform, num_images)
    dense = _Dense(network=network, tracing=tracing, batches=batches)
    calibration: Calibration | None = None
    if refit or importance == "obs":
        with clock.stage("calibrate"):
            calibration = calibrate(network, tracing, dense.small, num_images=dense.num_images)
    with clock.stage("order"):
        masks = _masks(dense, budget, calibration, importance, gammas)
    with clock.stage("compare"):
        targets = answers(network, dense.small)
    best = _best_network(dense, masks, calibration if refit else None, targets, clock)
    with clock.stage("check"):
        check_equivalence(network, tracing, example_inputs, keep=best.keep)
    if distill_steps:
        best = _distilled(best, dense, targets, distill_steps, augment, clock)
    report = PruneReport(
        network=best.network,
        tracing=tracing,
        keep=best.keep,
        macs_cut=1 - space.macs(best.keep) / space.dense_macs,
        params_cut=1 - space.parameters(best.keep) / space.dense_parameters,
        gamma=best.gamma,
        divergence=best.divergence,
        num_images=dense.num_images,
        seconds=clock.seconds,
    )
    logger.info(
        "removed %.1f %% of the MACs and %.1f %% of the parameters by %s on %d images in %.1f s; "
        "divergence from the dense network %.4f",
        100 * report.macs_cut,
        100 * report.params_cut,
        importance,
        report.num_images,
        sum(clock.seconds.values()),
        report.divergence,
    )
    return report


def _with_parameters_of(other: Callable[P, object]) -> Callable[[Callable[..., T]], Callable[P, T]]:
    """Return a decorator that gives a function the parameters of another one."""

    def decorate(function: Any) -> Any:
        returned = signature(function).return_annotation
        function.__signature__ = signature(other).replace(return_annotation=returned)
        return function

    return decorate


@_with_parameters_of(prune_with_report)
def prune(*args: Any, **kwargs: Any) -> nn.Module:
    """Return a smaller network that answers as the given one does, without labels.

    The parameters and errors are those of ``prune_with_report``, whose network this returns, in
    eval mode.
    """
    return prune_with_report(*args, **kwargs).network


def _masks(
    dense: _Dense,
    budget: Budget,
    calibration: Calibration | None,
    ordering: Ordering,
    gammas: Sequence[float],
) -> list[tuple[float | None, BoolArray]]:
    """Return the different masks to try, each with its first gamma; None where widths are equal."""
    if ordering != "obs":
        labelled = dense.batches if ordering == "taylor" else None
        if labelled and not all(isinstance(labels, Tensor) for _, labels in labelled):
            raise ValueError(
                "importance = 'taylor' needs labels: give batches of (images, labels), or take "
                "'obs', which needs none"
            )
        values = importance_of(dense.network, dense.tracing, ordering, labelled)
        return [(None, budget.fill(uniform_priority(budget.space, values)))]
    assert calibration is not None
    order = obs_order(dense.network, dense.tracing, calibration)
    curves, values = order.error_curves, order.importance
    masks: dict[bytes, tuple[float | None, BoolArray]] = {}
    for gamma in gammas:
        [keep] = allocation_masks([budget], curves, values, gamma=gamma)
        masks.setdefault(keep.tobytes(), (gamma, keep))
    return list(masks.values())


def _best_network(
    dense: _Dense,
    masks: Sequence[tuple[float | None, BoolArray]],
    calibration: Calibration | None,
    targets: Answers,
    clock: _Clock,
) -> _Candidate:
    """Extract and mend the network of every mask; return the one that diverges least.

    Args:
        dense: The dense network and the images.
        masks: Masks with their gammas.
        calibration: What layers are refitted by; None: neither refit nor reconstruct them.
        targets: The dense network's answers.
        clock: Takes the times.
    """
    refit = Refit(dense.network, dense.tracing, calibration) if calibration else None
    with clock.stage("reconstruct"):
        layers = layer_targets(dense.network, dense.tracing, [dense.images]) if refit else None
    found: list[_Candidate] = []
    for gamma, keep in masks:
        with clock.stage("extract and refit"):
            smaller = extract(dense.network, dense.tracing, keep).eval()
            if refit is not None:
                refit(smaller, keep)
        with clock.stage("recalibrate"):
            recalibrate_batchnorm(smaller, dense.batches)
        if layers is not None:
            with clock.stage("reconstruct"):
                reconstruct(smaller, dense.tracing, keep, layers)
        with clock.stage("compare"):
            distance = divergence(smaller, dense.small, targets)
        found.append(_Candidate(network=smaller, keep=keep, gamma=gamma, divergence=distance))
    return min(found, key=lambda candidate: candidate.divergence)


def _distilled(
    pruned: _Candidate,
    dense: _Dense,
    targets: Answers,
    steps: int,
    augment: Callable[[Tensor], Tensor] | None,
    clock: _Clock,
) -> _Candidate:
    """Train the pruned network, in place, to answer as the dense one does on the images."""
    with clock.stage("distill"):
        places = (pruned.network, dense.network, dense.tracing, pruned.keep)
        few = Inputs((dense.images,))
        distill_pruned(*places, few, steps=steps, seed=0, augment=augment)
    with clock.stage("compare"):
        return replace(pruned, divergence=divergence(pruned.network, dense.small, targets))


def _checked_gammas(gamma: float | Sequence[float]) -> list[float]:
    gammas = [float(value) for value in (gamma if isinstance(gamma, Sequence) else [gamma])]
    if not gammas:
        raise ValueError("gamma must be one number >= 0 or several, got none; 0, 1, 3 by default")
    return gammas


def _check_importance(ordering: str) -> None:
    names = get_args(Ordering)
    if ordering not in names:
        raise ValueError(f"importance must be one of {', '.join(names)}, got {ordering!r}")


class _Clock:
    """Seconds of every stage, added up by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of a block."""
        begin = time.perf_counter()
        yield
        elapsed = time.perf_counter() - begin
        self.seconds[name] = self.seconds.get(name, 0.0) + elapsed
