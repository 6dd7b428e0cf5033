"""What a study of a trained network starts from: network, data and compute configuration."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cells import Cell, Measured, find, keep

from fppmo_ray import Placement, SearchSettings, load_dataset
from fppmo_ray.distribution import BoolArray
from fppmo_ray.service.compute_choice import decide
from fppmo_ray.service.pool.worker_pool import WorkerPool
from fppmo_ray.service.problem import Problem, state_problem
from fppmo_ray.service.weights import digest, digest_data, to_arrays
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

    def problem(self, settings: SearchSettings, placement: Placement) -> Problem:
        """Return the problem that workers get.

        Args:
            settings: Settings of the search.
            placement: The workers.
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
        return state_problem(dense, dataset, settings, splits=splits, placement=placement)


def fixed_key(problem: Problem) -> dict[str, Any]:
    """Return the settings that the figures of all cells depend on."""
    return {
        "network": digest(to_arrays(problem.network)),
        "space": problem.tracing.space.fingerprint(),
        "data": digest_data(problem.dataset, problem.splits),
        "device_type": problem.device_type,
        "recalibrate_images": problem.rescore_fidelity.recalibrate_images,
    }


def known_compute(problem: Problem, settings: SearchSettings, folder: Path) -> ComputeConfig | None:
    """Return the compute configuration of the cells that are there; None if there are none.

    Args:
        problem: The network and its data.
        settings: The settings that ask for a data type.
        folder: Work folder of the cells.
    """
    record = find(folder, _compute_cell(problem, settings))
    return None if record is None else ComputeConfig(**record.figures["compute"])


def choose_compute(
    problem: Problem, settings: SearchSettings, folder: Path, pool: WorkerPool, mask: BoolArray
) -> ComputeConfig:
    """Return the compute configuration that a search would choose, and keep it for all cells.

    Args:
        problem: The network and its data.
        settings: The settings that ask for a data type.
        folder: Work folder of the cells.
        pool: A pool without unfinished work, of workers with ``try_compute``.
        mask: The mask that is scored in trials.
    """
    begin = time.perf_counter()
    choice = decide(problem, settings, pool, mask)
    measured = Measured(figures=asdict(choice), seconds=time.perf_counter() - begin)
    keep(folder, _compute_cell(problem, settings), measured)
    logger.info("compute  %s", choice.why)
    return ComputeConfig(**choice.compute)


def _compute_cell(problem: Problem, settings: SearchSettings) -> Cell:
    asked = {"dtype": settings.dtype, "autotune": settings.autotune, "threads": problem.threads}
    return Cell(name="compute", key={**fixed_key(problem), **asked})
