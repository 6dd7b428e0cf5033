"""The disturbances of ``chaos.py``: kills in a running search, at moments that a seed draws."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from fppmo_ray.distribution import Feedback, Proposal
from fppmo_ray.service.journal.run_directory import RunDirectory
from fppmo_ray.service.pool.worker_group import WorkerInfo
from fppmo_ray.service.search_loop import ModelHandle
from fppmo_ray.testing.simulated_search import Pace, SimulatedWorker

KINDS = "worker", "exit", "node", "model", "hang"
"""A worker is killed; it exits inside a score; its node is lost, and another joins; the model is
killed; a worker is suspended inside a score, so that it never answers."""


@dataclass(frozen=True)
class Kill:
    """A kill that is done once ``after`` proposals are scored."""

    after: int
    kind: str


def plan(seed: int, num_kills: int, proposals: int) -> list[Kill]:
    """Return kills at random moments of the first 70 % of a search, in order: some take a while.

    Args:
        seed: Seed of kinds and moments.
        num_kills: Number of kills; one of every kind at least, if there are as many.
        proposals: Proposals of the search.
    """
    rng = random.Random(seed)
    kinds = [*KINDS[:num_kills], *rng.choices(KINDS, k=max(0, num_kills - len(KINDS)))]
    rng.shuffle(kinds)
    moments = sorted(rng.randint(1, proposals * 7 // 10) for _ in kinds)
    return [Kill(after, kind) for after, kind in zip(moments, kinds, strict=True)]


class MortalWorker:
    """A simulated worker that obeys a warrant it finds in a folder: to exit, or to hang.

    No proposal makes two workers hang: that would be an error of its own.

    Args:
        pace: Duration of the scores.
        warrants: The folder.
        slot: Number of the worker in its group.
    """

    def __init__(self, pace: Pace, warrants: Path, slot: int) -> None:
        self._worker = SimulatedWorker(pace, slot)
        self._warrants = warrants

    def ready(self) -> WorkerInfo:
        """Return where the worker runs."""
        return self._worker.ready()

    def score(self, proposal: Proposal) -> Feedback:
        """Return the simulated score, unless the worker dies of it."""
        feedback = self._worker.score(proposal)
        if self._takes("exit"):
            os._exit(1)
        has_hung = self._warrants / f"hung-{proposal.proposal_id}"
        if not has_hung.exists() and self._takes("hang"):
            has_hung.touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        return feedback

    def _takes(self, warrant: str) -> bool:
        """Whether there is such an order, and no other worker took it first."""
        try:
            (self._warrants / warrant).unlink()
        except FileNotFoundError:
            return False
        return True


class Killer:
    """Does kills while a search runs in another thread.

    It must run in the main thread, since Ray starts nodes nowhere else.

    Args:
        seed: Seed of the choice of victims.
        cluster: The cluster whose nodes are lost.
        run: The search's record, which tells its progress and its workers.
        model: The search's probability model.
        warrants: Folder of the orders that workers obey.
    """

    def __init__(
        self, seed: int, cluster: Cluster, run: RunDirectory, model: ModelHandle, warrants: Path
    ) -> None:
        self.num_done = 0
        self._rng = random.Random(seed)
        self._cluster = cluster
        self._run = run
        self._warrants = warrants
        self._victims: set[int] = set()
        self._do: dict[str, Callable[[], None]] = {
            "worker": self._kill_worker,
            "exit": lambda: self._order("exit"),
            "node": self._replace_node,
            "model": model.close,
            "hang": lambda: self._order("hang"),
        }
        self._is_over: Callable[[], bool] = lambda: False

    def work_off(self, kills: Sequence[Kill], search: Future[Any]) -> None:
        """Do each kill when its moment has come, until the search is over.

        Args:
            kills: Kills in order.
            search: The running search.
        """
        self._is_over = search.done
        for kill in kills:
            while len(self._scored()) < kill.after and not self._is_over():
                time.sleep(0.01)
            if not self._is_over():
                self._do[kill.kind]()
                self.num_done += not self._is_over()

    def _scored(self) -> list[Feedback]:
        return [fact for fact in self._run.all(Feedback) if not fact.failed]

    def _kill_worker(self) -> None:
        """Kill a worker that has scored and was not killed before."""
        while not (living := self._living()) and not self._is_over():
            time.sleep(0.01)
        if living:
            victim = self._rng.choice(living)
            self._victims.add(victim)
            os.kill(victim, signal.SIGKILL)

    def _living(self) -> list[int]:
        named = {int(fact.worker.rpartition(":")[2]) for fact in self._scored()}
        return sorted(pid for pid in named - self._victims if _is_ray_worker(pid))

    def _order(self, what: str) -> None:
        warrant = self._warrants / what
        warrant.touch()
        while warrant.exists() and not self._is_over():
            time.sleep(0.01)

    def _replace_node(self) -> None:
        nodes = sorted(self._cluster.worker_nodes, key=lambda node: str(node.node_id))
        lost = self._rng.choice(nodes)
        num_cpus = lost.get_resource_and_label_spec().num_cpus
        self._cluster.remove_node(lost, allow_graceful=False)
        self._cluster.add_node(wait=False, num_cpus=num_cpus)


def _is_ray_worker(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::")
    except (FileNotFoundError, ProcessLookupError):
        return False
