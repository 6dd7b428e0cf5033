"""Reaching Ray, and saying what runs there."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import ray

from fppmo_ray.service.pool.ray_errors import ray_errors_said
from fppmo_ray.service.pool.resources import describe_cluster, node_resources
from fppmo_ray.service.settings import Placement

logger = logging.getLogger(__name__)


@contextmanager
def connection(placement: Placement) -> Iterator[None]:
    """Join the cluster that ``RAY_ADDRESS`` names, or start Ray here for as long as it is needed.

    A Ray that is already initialised is used and left running.

    Raises:
        RuntimeError: in place of Ray's own errors, which a lost cluster raises anywhere.
    """
    started_here = not ray.is_initialized()
    if started_here:
        # Not ray.init's own default: it joins the last Ray that was started on this machine, which
        # may be another search's, and ends with it.
        address = os.environ.get("RAY_ADDRESS") or "local"
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    try:
        with ray_errors_said():
            _check_resources(placement)
            yield
    finally:
        if started_here:
            ray.shutdown()


def _check_resources(placement: Placement) -> None:
    nodes = node_resources()
    gpus = sum(node.get("GPU", 0.0) for node in nodes)
    if gpus and not placement.gpus_per_worker:
        logger.warning(
            "the cluster has %g GPUs and the workers use none; give them some by gpus_per_worker",
            gpus,
        )
    if not any(placement.demand.fits(node) for node in nodes):
        logger.warning(
            "no node has room for a worker: each asks for %s; %s; the search waits for a larger "
            "node to join; if none will, lower cpus_per_worker or gpus_per_worker",
            placement.demand,
            describe_cluster(),
        )


def package_versions() -> dict[str, str]:
    """Versions that a run's numbers depend on."""
    packages = ("fppmo-ray", "ray", "torch", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}
