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


def is_node_alive(node_id: str) -> bool:
    """Whether Ray still counts on this node."""
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return any(node["NodeID"] == node_id and node["Alive"] for node in nodes)
