"""What a study of a trained network starts from: network, data and compute configuration."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cells import Cell, Measured, find, keep

from fppmo_ray import Resources, SearchSettings, load_dataset
from fppmo_ray.distribution import BoolArray
from fppmo_ray.service.compute_choice import decide
from fppmo_ray.service.image_task import image_classification
from fppmo_ray.service.pool.worker_pool import WorkerPool
from fppmo_ray.service.problem import Problem, build_problem
from fppmo_ray.service.worker_protocol import digest, to_arrays
from fppmo_ray.training import ComputeConfig, build_network, load_weights, splits_from_files

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained network and its data."""

    data: Path
    """Folder with CIFAR-10 as parquet files or in torchvision's layout."""
    weights: Path
    """The network's trained weights."""
    search_val_rows: Path
    """.npy file of training rows that the weights have never seen."""
    choose_val_rows: Path | None = None
    """.npy file of further such rows; by default 40 % of the search-val rows."""
    network: str = "resnet56"
    """Which network is pruned: resnet20, 32, 44, 56 or 110 (``_b``: projection shortcuts), or
    vgg16_bn."""

    def problem(self, settings: SearchSettings, resources: Resources) -> Problem:
        """Return the problem that workers get.

        Args:
            settings: Settings of the search.
            resources: The workers.
        """
        dataset = load_dataset("cifar10", self.data)
        dense = build_network(self.network, dataset.num_classes)
        load_weights(dense, self.weights)
        splits = splits_from_files(
            dataset.train.labels,
            search_val=self.search_val_rows,
            choose_val=self.choose_val_rows,
            seed=settings.seed,
        )
        task = image_classification(dataset, splits)
        # Studies of settings compare searches that start with equal shares.
        return build_problem(dense, task, settings, resources=resources, calibrates=False)


def fixed_key(problem: Problem) -> dict[str, Any]:
    """Return the settings that the figures of all cells depend on."""
    return {
        "network": digest(to_arrays(problem.network)),
        "space": problem.tracing.space.fingerprint(),
        **problem.task.identity(),  # the digest of the data
        "device_type": problem.device_type,
        "recalibrate_images": problem.settings.scoring.recalibrate_images,
    }


def known_compute(problem: Problem, folder: Path) -> ComputeConfig | None:
    """Return the compute configuration that the cells in a folder were begun with.

    Args:
        problem: Its settings say what is asked for.
        folder: Folder of the cells.
    """
    record = find(folder, _compute_cell(problem))
    return None if record is None else ComputeConfig(**record.figures["compute"])


def choose_compute(
    problem: Problem, folder: Path, pool: WorkerPool[Any], mask: BoolArray
) -> ComputeConfig:
    """Return the compute configuration that a search would choose, and keep it as a cell.

    Args:
        problem: Its settings say what is asked for.
        folder: Folder of the cells.
        pool: Idle workers with the methods ``native_dtype`` and ``try_compute``.
        mask: The mask that is scored in measurements, ``(num_filters,)``.
    """
    begin = time.perf_counter()
    choice = decide(problem, pool, mask)
    measured = Measured(figures=asdict(choice), seconds=time.perf_counter() - begin)
    keep(folder, _compute_cell(problem), measured)
    logger.info("compute  %s", choice.why)
    return ComputeConfig(**choice.compute)


def _compute_cell(problem: Problem) -> Cell:
    settings = problem.settings
    asked = {
        "dtype": settings.numerics.dtype,
        "autotune": settings.numerics.autotune,
        "threads": problem.threads,
    }
    return Cell(name="compute", key={**fixed_key(problem), **asked})
