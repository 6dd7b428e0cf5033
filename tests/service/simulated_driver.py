"""A simulated search as a process of its own, like a job: to be killed, stopped and cut off."""

from __future__ import annotations

from pathlib import Path

import ray

from fppmo_ray.distribution import OptimizerSettings
from fppmo_ray.job import run_job
from fppmo_ray.testing.simulated_search import Pace, simulated_search

SETTINGS = OptimizerSettings(macs_cut=0.5, num_proposals=32, population_size=8)


def main(
    run_dir: Path, score_seconds: float = 0.1, address: str = "local", resume: bool = False
) -> None:
    """Search with two workers.

    Args:
        run_dir: As of any job.
        score_seconds: Mean duration of a score.
        address: Of the cluster; by default one of its own.
        resume: Go on.
    """
    here = {"num_cpus": 2, "include_dashboard": False} if address == "local" else {}
    ray.init(address=address, log_to_driver=False, **here)
    simulated_search(run_dir, SETTINGS, pace=Pace(mean_seconds=score_seconds), resume=resume)


if __name__ == "__main__":
    run_job(main)
