"""A worker that does as it is told, also what is wrong, and pools of such workers."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from fppmo_ray.service.pool.call import Call
from fppmo_ray.service.pool.worker_group import WorkerInfo, worker_info
from fppmo_ray.service.pool.worker_pool import WorkerPool

# The workers' processes cannot import test modules.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

MOST_SPARE = 3


class OddError(Exception):
    """Cannot be made again from its message, which is how exceptions are pickled."""

    def __init__(self, count: int, what: str) -> None:
        super().__init__(f"{count} {what}")


class Worker:
    """Does as it is told, and leaves a trace of every start in a folder."""

    def __init__(self, slot: int, trace: Path) -> None:
        self.begin(slot, trace)

    def begin(self, slot: int, trace: Path) -> None:
        """Be a new worker."""
        self.__dict__.clear()
        self.slot = slot
        self.trace = trace

    def ready(self) -> WorkerInfo:
        return worker_info(self.slot)

    def echo(self, value: int) -> int:
        return value

    def refuse(self, value: int) -> int:
        self._visits(f"refuse-{self.slot}")
        raise ValueError(f"{value} is not to my taste")

    def refuse_oddly(self) -> None:
        raise OddError(7, "apples")

    def refuse_on_first_worker(self, value: int) -> int:
        if self._visits("refuse-once") == 1:
            raise ValueError("not today")
        return value

    def die_once(self, value: int) -> int:
        if self._visits("die") == 1:
            os._exit(1)
        return value

    def always_die(self) -> None:
        os._exit(1)

    def hang_once(self, value: int) -> int:
        if self._visits("hang") == 1:
            time.sleep(60)
        return value

    def hang_the_second_time(self, value: int) -> int:
        if self._visits("hang-second") == 2:
            time.sleep(60)
        return value

    def suspend_once(self, value: int) -> int:
        if self._visits("suspend") == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        return value

    def nap(self, value: int) -> int:
        time.sleep(0.3)
        return value

    def behind_gate(self, value: int, method: str = "echo") -> object:
        """Leave a file, and go on once there is another one."""
        (self.trace / f"begun-{value}").touch()
        while not (self.trace / f"open-{value}").exists():
            time.sleep(0.01)
        return getattr(self, method)(value)

    def work_unless_broken(self, value: int) -> int:
        """The first process that is asked is broken for good."""
        if not hasattr(self, "is_broken"):
            self.is_broken = self._visits("broken") == 1
        time.sleep(0.01)
        if self.is_broken:
            raise ValueError("nothing works here any more")
        return value

    def task_name(self) -> str | None:
        name: str | None = ray.get_runtime_context().get_task_name()
        return name

    def process(self) -> int:
        time.sleep(0.02)
        return os.getpid()

    def hang(self) -> None:
        time.sleep(60)

    def _visits(self, name: str) -> int:
        with (self.trace / name).open("a") as file:
            file.write("x")
            return file.tell()


class SlotLast:
    """Returns its constructor arguments."""

    def __init__(self, trace: Path, slot: int) -> None:
        self.trace = trace
        self.slot = slot

    def ready(self) -> WorkerInfo:
        return worker_info(self.slot)

    def process(self) -> int:
        return os.getpid()

    def arguments(self) -> tuple[Path, int]:
        return self.trace, self.slot


@contextmanager
def pool_of(num_workers: int, trace: Path, spare: list[Any]) -> Iterator[WorkerPool[Worker]]:
    """A pool whose first workers are spare actors, where there are enough."""
    actor = ray.remote(num_cpus=0)(Worker)
    used = [spare.pop() for _ in range(num_workers)] if len(spare) >= num_workers else []

    def start(slot: int) -> Any:
        if not used:
            return actor.remote(slot, trace)
        used[-1].begin.remote(slot, trace)  # before ready(): calls keep their order
        return used.pop()

    pool: WorkerPool[Worker] = WorkerPool(start, num_workers)
    yield pool
    group = pool._group
    if not pool.num_unfinished:
        answers = {group.actor(slot).echo.remote(0): slot for slot in group.ready}
        for answer in ray.wait(list(answers), num_returns=len(answers), timeout=2)[0]:
            if len(spare) < MOST_SPARE:
                spare.append(group._actors.pop(answers[answer]))
    pool.close()


def run(pool: WorkerPool[Any], *calls: Call[Any, Any]) -> list[Call[Any, Any]]:
    for item in calls:
        pool.submit(item)
    ended = []
    while pool.num_unfinished:
        ended += pool.next_ended()
    return ended


def call(method: str, *arguments: object, timeout: float | None = None) -> Call[Any, Any]:
    return Call(method, lambda worker: getattr(worker, method)(*arguments), timeout=timeout)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def processes_of(pool: WorkerPool[Worker]) -> set[int]:
    """The processes of all workers, once they are ready."""
    while pool.num_ready < pool.num_workers:
        run(pool, call("process"))
    return {info.pid for info in pool._group.ready.values()}
