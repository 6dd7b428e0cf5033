"""Where a worker runs."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

import ray


@dataclass(frozen=True)
class Place:
    """What a worker's ``ready`` answers. As text it names the worker in the journal."""

    slot: int
    host: str
    pid: int
    node_id: str
    """Of Ray, in hex."""

    def __str__(self) -> str:
        return f"{self.slot}@{self.host}:{self.pid}"


def here(slot: int) -> Place:
    """The place of the worker that calls this."""
    node_id: str = ray.get_runtime_context().get_node_id()
    return Place(slot=slot, host=socket.gethostname(), pid=os.getpid(), node_id=node_id)


def worker_name(worker: object, slot: int, device_type: str) -> str:
    """What the Ray dashboard shows of a worker."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") if device_type == "cuda" else None
    return f"{type(worker).__name__}({slot}, {f'gpu={gpus}' if gpus else 'cpu'})"


def is_node_alive(node_id: str) -> bool:
    """Whether Ray still counts on this node."""
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return any(node["NodeID"] == node_id and node["Alive"] for node in nodes)
