"""The workers that a search asks for, and the connection to the Ray that has them."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import ray
import tyro

from fppmo_ray.service.pool.cluster import (
    Demand,
    describe_cluster,
    explain_ray_errors,
    node_resources,
)
from fppmo_ray.service.pool.in_flight import TimeLimits
from fppmo_ray.service.setting_groups import require


@dataclass(frozen=True, kw_only=True)
class Resources:
    """The workers of a search. Of these settings, only threads and device type change scores."""

    workers: int = 2
    """Number of workers to ask the cluster for; they start as resources become free."""
    gpus: Annotated[float, tyro.conf.arg(name="gpus-per-worker")] = 0.0
    """Share of a GPU that each worker holds, at most 1. Workers that share a GPU compute in turns;
    where NVIDIA's MPS runs on the node (``nvidia-cuda-mps-control -d`` before Ray is started), they
    compute side by side. 0: scores run on CPUs."""
    cpus: Annotated[int, tyro.conf.arg(name="cpus-per-worker")] = 1
    """CPUs that each worker holds. torch uses as many threads, unless autotune finds fewer to be
    faster."""
    fine_tune_workers: int = 1
    """Number of processes (Ray Train) that share each training of the baseline, between stages and
    at the end, each with a whole GPU if workers hold any. 1 trains the networks side by side, each
    on one worker. The recipe's batch_size is that of all of them together, so the learning rate
    stays. With batches of thousands, scale it with them and warm up (1706.02677): schedule
    one_cycle. On GPUs, batch norms are synchronised where a process has fewer than 32 images."""
    accelerator_type: str | None = None
    """Kind of GPU that each worker needs, by Ray's name: ``A100``, ``H100``, ``L4``. None: any."""
    memory_gib: float = 0.0
    """Memory that each worker needs, in GiB; Ray starts workers on a node until its memory is given
    away. 0: memory does not count."""
    custom_resources: dict[str, float] = field(default_factory=dict)
    """Amounts of custom resources of the cluster's nodes that each worker needs, by name."""
    labels: dict[str, str] = field(default_factory=dict)
    """Ray's selector of the nodes for workers, by label: ``market-type spot``,
    ``region in(us-west4,us-east1)``, ``ray.io/node-group !head``."""
    score_timeout: float | None = None
    """Seconds after which a score, the trial score at the start included, is taken from its worker,
    which is replaced. None: 10 times the second longest score so far, at least 5 minutes; a day
    until the first one has ended."""
    call_timeout: float | None = None
    """Seconds after which any other call is taken from its worker: loading the data, importance, an
    epoch, an evaluation, the whole fine-tuning of a task of your own. None: learned for each kind
    of call like that of scores."""

    def __post_init__(self) -> None:
        require(self.workers >= 1, "workers", ">= 1", self.workers)
        if not 0 <= self.gpus <= 1:
            raise ValueError(
                f"gpus must be in [0, 1], got {self.gpus}: a worker computes on one GPU; ask for "
                "more workers, and set fine_tune_workers to train a network on several GPUs"
            )
        require(self.memory_gib >= 0, "memory_gib", ">= 0", self.memory_gib)
        for name, amount in self.custom_resources.items():
            require(amount > 0, f"custom_resources {name}", "> 0", amount)
        if self.accelerator_type is not None and not self.gpus:
            raise ValueError(
                f"accelerator_type {self.accelerator_type} needs workers with GPUs, got 0; give "
                "gpus (--gpus-per-worker) too"
            )
        for name in ("cpus", "fine_tune_workers"):
            require(getattr(self, name) >= 1, name, ">= 1", getattr(self, name))
        for name in ("score_timeout", "call_timeout"):
            timeout = getattr(self, name)
            require(timeout is None or timeout > 0, name, "> 0 s", timeout)

    @property
    def demand(self) -> Demand:
        """Resources that the cluster is asked for, for each worker."""
        return Demand(
            cpus=self.cpus,
            gpus=self.gpus,
            memory=round(self.memory_gib * 1024**3),
            custom=self.custom_resources,
            accelerator_type=self.accelerator_type,
            labels=self.labels,
        )

    @property
    def replica_demand(self) -> Demand:
        """Resources of each of several processes that train a network together."""
        return replace(self.demand, gpus=1.0 if self.gpus else 0.0)

    def time_limits(self) -> TimeLimits:
        """Return how long the calls of workers may run, for a pool of its own."""
        scores = ("try_compute", "score", "rescore")
        return TimeLimits(dict.fromkeys(scores, self.score_timeout), others=self.call_timeout)

    @property
    def device_type(self) -> str:
        """``cuda`` if workers hold GPUs, else ``cpu``."""
        return "cuda" if self.gpus > 0 else "cpu"


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
