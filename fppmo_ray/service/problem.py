"""The problem that workers are given: a network and its tracing, the data, and what a score is."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fppmo_ray.distribution import BoolArray
from fppmo_ray.pruning import Fidelity, Tracing, extract, trace
from fppmo_ray.service.budgets import budgets_of
from fppmo_ray.service.settings import Placement, SearchSettings
from fppmo_ray.service.weights import digest, digest_data, to_arrays
from fppmo_ray.training import (
    ComputeConfig,
    Dataset,
    Images,
    Recipe,
    Shard,
    Splits,
    example_batch,
    open_images,
    recalibrate_batchnorm,
    stratified_splits,
)

_RECALIBRATION_BATCH = 250
_HELD_OUT_SHARE = 0.06, 0.04  # search-val and choose-val: 3,000 and 2,000 of CIFAR-10's 50,000


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What every worker is given once: the architecture, its tracing and the data."""

    network: nn.Module
    tracing: Tracing
    dataset: Dataset
    splits: Splits
    fidelity: Fidelity
    """Of proposals' scores."""
    rescore_fidelity: Fidelity
    """Of finalists'; its images also recalibrate what is fine-tuned or handed out."""
    recipe: Recipe
    device_type: str
    threads: int
    """CPUs that a worker holds."""
    gpu_share: float
    compute: ComputeConfig
    """How passes are computed as far as it was asked for; where a measured choice begins."""
    fine_tune_workers: int = 1
    """Processes that share the training of the baseline, between stages and in the end."""

    @property
    def example_inputs(self) -> tuple[Tensor, ...]:
        """A batch of one image."""
        return (example_batch(self.dataset),)

    def subject(self) -> dict[str, Any]:
        """A digest of the data, and how many fine-tune together; see ``identity_of``."""
        count = self.fine_tune_workers
        return {
            "data": digest_data(self.dataset, self.splits),
            **({"fine_tune_workers": count} if count > 1 else {}),  # older journals had one
        }


def state_problem(
    network: nn.Module,
    dataset: Dataset,
    settings: SearchSettings,
    *,
    splits: Splits | None = None,
    placement: Placement | None = None,
) -> Problem:
    """Trace a network and check that it, the data and the settings fit together.

    Args:
        network: The trained network; left as it is.
        dataset: Images and classes.
        settings: What to search for, and how masks are scored.
        splits: Rows to train on, and two held-out sets; by default 90, 6 and 4 % of every class.
        placement: Where scores are computed; by default on one CPU.

    Raises:
        ValueError: they do not fit, or the budget is out of the space's reach.
    """
    placement = placement or Placement()
    splits = splits or _default_splits(dataset, settings.seed)
    network = copy.deepcopy(network).cpu()  # workers unpickle it on devices of their own
    _check_rows(splits, len(dataset.train))
    Shard(0, placement.fine_tune_workers).batch_size(settings.recipe.batch_size)
    tracing = prunable_tracing(network, (example_batch(dataset),), settings, placement)
    _check_outputs(network, dataset)
    return Problem(
        network=network,
        tracing=tracing,
        dataset=dataset,
        splits=splits,
        fidelity=settings.fidelity(),
        rescore_fidelity=settings.rescore_fidelity(),
        recipe=settings.recipe,
        device_type=placement.device_type,
        threads=placement.cpus_per_worker,
        gpu_share=placement.gpus_per_worker,
        compute=settings.plain_compute(threads=placement.cpus_per_worker),
        fine_tune_workers=placement.fine_tune_workers,
    )


def prunable_tracing(
    network: nn.Module,
    example_inputs: tuple[Tensor, ...],
    settings: SearchSettings,
    placement: Placement,
) -> Tracing:
    """Trace a network, with the limits of the settings on the widths.

    Raises:
        ValueError: the network cannot be pruned, or the budget is out of the space's reach.
    """
    tracing = trace(network, example_inputs, ignore=settings.ignore)
    multiple = settings.on(placement.device_type).width_multiple
    assert multiple is not None  # on a device it is known
    space = tracing.space.with_limits(
        min_keep=settings.min_keep,
        multiple=multiple,
        layers=settings.layer_limits,
    )
    budgets_of(space, settings)  # refuses what these limits cannot reach
    return replace(tracing, space=space)


class Prunable(Protocol):
    """What problems have in common, whatever their networks are for."""

    @property
    def network(self) -> nn.Module:
        """The dense network, on the CPU."""

    @property
    def tracing(self) -> Tracing:
        """Of the network."""

    @property
    def device_type(self) -> str:
        """Of workers: ``cpu`` or ``cuda``."""

    @property
    def threads(self) -> int:
        """CPUs that a worker holds."""

    @property
    def gpu_share(self) -> float:
        """GPUs that a worker holds."""

    @property
    def compute(self) -> ComputeConfig:
        """How passes are computed as far as it was asked for."""

    @property
    def example_inputs(self) -> tuple[Tensor, ...]:
        """What the network's forward takes."""

    def subject(self) -> dict[str, Any]:
        """What tells it from another with the same network, for ``identity_of``."""


def identity_of(problem: Prunable, settings: SearchSettings) -> dict[str, Any]:
    """All that a search's numbers depend on: one that goes on must have the same."""
    return {
        "settings": settings.on(problem.device_type).journaled(),
        "device_type": problem.device_type,
        "threads": problem.threads,
        "versions": {name: version(name) for name in ("torch", "numpy")},
        "network": digest(to_arrays(problem.network)),
        "space": problem.tracing.space.fingerprint(),
        **problem.subject(),
    }


def open_split(problem: Problem, name: str, device: torch.device) -> Images:
    """The images of ``search_train``, ``search_val``, ``choose_val`` or ``test``."""
    dataset = problem.dataset
    source = dataset.test if name == "test" else dataset.train
    rows = np.arange(len(source.labels)) if name == "test" else getattr(problem.splits, name)
    return open_images(source, rows, dataset, device, decoding_threads=problem.threads)


def pruned_network(
    problem: Problem, dense: nn.Module, keep: BoolArray, search_train: Images
) -> nn.Module:
    """What a mask leaves of a dense network, recalibrated: where fine-tuning begins.

    Args:
        problem: Says how, and on how many images.
        dense: On the images' device; left as it is.
        keep: The mask.
        search_train: Of the problem.
    """
    network = extract(dense, problem.tracing, keep)
    count = min(problem.rescore_fidelity.recalibrate_images, len(search_train))
    # Drawn, since folders list their images by class; the same ones for every network.
    drawn = np.random.default_rng(0).permutation(len(search_train))[:count]
    recalibrate_batchnorm(network, search_train.batches(_RECALIBRATION_BATCH, drawn))
    return network


def _default_splits(dataset: Dataset, seed: int) -> Splits:
    search_val, choose_val = _HELD_OUT_SHARE
    return stratified_splits(
        dataset.train.labels, search_val=search_val, choose_val=choose_val, seed=seed
    )


def _check_rows(splits: Splits, num_images: int) -> None:
    for name in ("search_train", "search_val", "choose_val"):
        rows = getattr(splits, name)
        if rows.min() < 0 or rows.max() >= num_images:
            raise ValueError(
                f"rows of {name} must be in [0, {num_images - 1}], those of the training images, "
                f"got {rows.min()} to {rows.max()}"
            )


@torch.no_grad()
def _check_outputs(network: nn.Module, dataset: Dataset) -> None:
    was_training = network.training
    logits = network.eval()(example_batch(dataset))
    network.train(was_training)
    if not isinstance(logits, Tensor) or logits.shape != (1, dataset.num_classes):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"the network must return logits of shape (N, {dataset.num_classes}) for data set "
            f"{dataset.name}, got {got} for one image"
        )
