"""Connect to Ray, and show on the driver's stderr what users' functions print in workers."""

from __future__ import annotations

import logging
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import ray

from fppmo_ray.service.pool.cluster import describe_cluster, explain_ray_errors, node_resources
from fppmo_ray.service.resources import Resources

logger = logging.getLogger(__name__)

_RAY_HANDLER = "ray_print_logs"
_ACTORS_OF_RAY = ("TrainController", "RayTrainWorker")  # they log how Ray Train sets itself up
_MAX_KINDS = 200  # different lines that are shown of all workers of a search
_NUMBER = re.compile(r"0x[0-9a-fA-F]+|\d+")
_NATIVE_LINE = re.compile(
    r"(\[rank\d+\]:)?\[[IWEF]\d{3,} "  # torch's C++ log: [W1126 14:41:58.123456 NNPACK.cpp:64] ...
    r"|\[[\d-]+ [\d:,]+ [A-Z] \d+ \d+\] "  # Ray's C++ log: [2026-11-26 14:41:58,123 E 12 34] ...
    r"|\*\*\* SIG|PC: @ |\s+@ +0x"  # a stack that Ray prints when its process is ended by a signal
)


@contextmanager
def connection(resources: Resources) -> Iterator[None]:
    """Join the cluster that ``RAY_ADDRESS`` names, or start Ray here for as long as it is needed.

    A Ray that is already initialised is used as it is and left running. One that is started here
    listens on the loopback interface only.

    Args:
        resources: The workers, whose resources are compared with the cluster's.

    Raises:
        ValueError: workers do not fit on this machine, and Ray was started here.
        RuntimeError: in place of Ray's own errors, which any call may raise on a lost cluster.
    """
    connects = not ray.is_initialized()
    # By default ray.init joins the Ray that was last started on this machine, which may belong to
    # another search and end with it.
    address = os.environ.get("RAY_ADDRESS") or "local"
    if connects:
        with _on_loopback() if address == "local" else nullcontext():
            ray.init(address=address, log_to_driver=True, configure_logging=False)
        _show_worker_output(_line_filter())
    try:
        with explain_ray_errors():
            _check_resources(resources, is_alone=connects and address == "local")
            yield
    finally:
        if connects:
            ray.shutdown()


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Let a Ray that is started in this block listen on the loopback interface only.

    Its servers bind to the address of its node. ``ray.init`` replaces a loopback address that it is
    given by that of the network, except where a Ray cannot have other nodes, as on macOS.
    """
    try:
        from ray._private import ray_constants
    except ImportError:  # in another version of Ray: it listens where it wants
        yield
        return
    before = getattr(ray_constants, "ENABLE_RAY_CLUSTER", None)
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _show_worker_output(lines_to_show: Callable[[Mapping[str, Any]], list[str]]) -> None:
    """Replace Ray's printer of the workers' output, which repeats lines and colours them.

    Ray 2.60 has no public way to do that: ``log_to_driver=True`` subscribes to the output of this
    job's processes and hands each batch of lines to the handlers of a dispatcher. ``ray.shutdown``
    removes the handler of this name.

    Args:
        lines_to_show: Returns the lines of a batch from Ray that are to be shown.
    """
    try:
        from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher
    except ImportError:  # in another version of Ray: its own printer stays
        return

    def show(batch: Mapping[str, Any]) -> None:
        for line in lines_to_show(batch):
            print(line, file=sys.stderr, flush=True)

    dispatcher.remove_handler(_RAY_HANDLER)
    dispatcher.add_handler(_RAY_HANDLER, show)


def _line_filter() -> Callable[[Mapping[str, Any]], list[str]]:
    """Return a function that selects lines of a batch: each kind once, none of Ray's or torch's.

    Lines that differ only in numbers are of the same kind. Ray's log files on the node have all
    lines.
    """
    seen: set[str] = set()

    def lines_to_show(batch: Mapping[str, Any]) -> list[str]:
        name = batch.get("actor_name") or "worker"
        is_process = str(batch["pid"]).isdigit()  # neither the raylet nor the autoscaler
        if not is_process or name.startswith(_ACTORS_OF_RAY):
            return []
        found = []
        for line in batch["lines"]:
            kind = _NUMBER.sub("#", line).strip()
            if not kind or kind in seen or _NATIVE_LINE.match(line) or len(seen) > _MAX_KINDS:
                continue
            seen.add(kind)
            if len(seen) > _MAX_KINDS:
                line = "workers print many different lines; the others are only in Ray's logs"
            found.append(f"{name}: {line}")
        return found

    return lines_to_show


def _check_resources(resources: Resources, *, is_alone: bool) -> None:
    """Warn about GPUs that no worker uses, and about workers that the cluster has no room for.

    Args:
        resources: The workers.
        is_alone: Whether no other node will ever join.

    Raises:
        ValueError: there is no room and will never be.
    """
    nodes = node_resources()
    gpus = sum(node.get("GPU", 0.0) for node in nodes)
    if gpus and not resources.gpus:
        logger.warning(
            "the cluster has %g GPUs and the workers use none; --gpus-per-worker gives them some",
            gpus,
        )
    if not any(resources.demand.count_on(node) >= 1 for node in nodes):
        _no_room(
            f"no node has room for a worker: each asks for {resources.demand}",
            "a larger node",
            "lower --cpus-per-worker or --gpus-per-worker",
            is_alone=is_alone,
        )
    replicas, each = resources.fine_tune_workers, resources.replica_demand
    room = sum(each.count_on(node) for node in nodes)
    if room < replicas > 1:
        _no_room(
            f"there is room for {room} of {replicas} workers that fine-tune together: each asks "
            f"for {each}",
            "further nodes",
            "lower --fine-tune-workers or --cpus-per-worker",
            is_alone=is_alone,
        )


def _no_room(lack: str, missing: str, way_out: str, *, is_alone: bool) -> None:
    """Refuse workers without room, or warn about them where nodes may join.

    Args:
        lack: The workers that have no room.
        missing: The nodes that would have room for them.
        way_out: Settings to change.
        is_alone: Whether no other node will ever join.
    """
    lack = f"{lack}; {describe_cluster()}"
    if is_alone:
        raise ValueError(
            f"{lack}; {way_out}, or set RAY_ADDRESS to a cluster, since this Ray has no other nodes"
        )
    logger.warning("%s; the search waits for %s to join; if none will, %s", lack, missing, way_out)


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a run's numbers depend on.

    Of a package that is imported without being installed, from a copy of its source, the version is
    ``not installed``.
    """
    versions = {"python": platform.python_version()}
    for name in ("fppmo-ray", "ray", "torch", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions
