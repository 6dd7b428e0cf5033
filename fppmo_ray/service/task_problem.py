"""The problem that workers are given where the task is the user's own."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fppmo_ray.pruning import Tracing
from fppmo_ray.service.problem import prunable_tracing
from fppmo_ray.service.settings import Placement, SearchSettings
from fppmo_ray.service.task import Task
from fppmo_ray.training import ComputeConfig


@dataclass(frozen=True, kw_only=True)
class TaskProblem:
    """What every worker is given once: the architecture, its tracing and the task."""

    network: nn.Module
    tracing: Tracing
    task: Task
    seed: int
    """Of fine-tuning and of the last looks at a network."""
    device_type: str
    threads: int
    """CPUs that a worker holds."""
    gpu_share: float
    compute: ComputeConfig
    """Of which a task's functions take nothing but the threads."""

    @property
    def example_inputs(self) -> tuple[Tensor, ...]:
        """The task's."""
        return self.task.inputs()

    def subject(self) -> dict[str, Any]:
        """The task's own identity; see ``identity_of``."""
        return {"task": self.task.identity()}


def state_task(
    network: nn.Module,
    task: Task,
    settings: SearchSettings,
    *,
    placement: Placement | None = None,
) -> TaskProblem:
    """Trace a network for a task, and check that the settings fit both.

    Args:
        network: The trained network; left as it is.
        task: Example inputs, and how networks are scored and fine-tuned.
        settings: From ``settings_of_task``.
        placement: Where scores are computed; by default on one CPU.

    Raises:
        ValueError: the network cannot be pruned, the budget is out of the space's reach, or
            several workers are to fine-tune together.
    """
    placement = placement or Placement()
    if placement.fine_tune_workers > 1:
        raise ValueError(
            "a task fine-tunes by itself, in one process; leave fine_tune_workers at 1, got "
            f"{placement.fine_tune_workers}"
        )
    network = copy.deepcopy(network).cpu()  # workers unpickle it on devices of their own
    inputs = tuple(tensor.cpu() for tensor in task.inputs())
    return TaskProblem(
        network=network,
        tracing=prunable_tracing(network, inputs, settings, placement),
        task=task,
        seed=settings.seed,
        device_type=placement.device_type,
        threads=placement.cpus_per_worker,
        gpu_share=placement.gpus_per_worker,
        compute=settings.plain_compute(threads=placement.cpus_per_worker),
    )
