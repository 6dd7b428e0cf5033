"""Trainings from their first epoch to the last, with nothing else to do until they have ended."""

from __future__ import annotations

from collections.abc import Sequence

from fppmo_ray.service.pool.worker_pool import WorkerPool
from fppmo_ray.service.problem import Problem, Prunable
from fppmo_ray.service.record.run_directory import RunDirectory
from fppmo_ray.service.replicated_training import train_on_several
from fppmo_ray.service.training_tasks import Training, train


def train_whole(
    trainings: Sequence[Training], problem: Prunable, pool: WorkerPool, run: RunDirectory
) -> dict[str, bytes]:
    """Train each by several workers together if the problem wants that, else by one, side by side.

    Args:
        trainings: Equally long, the largest network first; none is an adaptation.
        problem: Says how many workers share a training.
        pool: Where they are trained, with nothing unfinished.
        run: Where checkpoints and facts are kept.

    Returns:
        The final training state of each task, as bytes, by the task's name.

    Raises:
        RuntimeError: a task diverged, or failed again and again.
        SearchStopped: a stop was requested.
    """
    have_epochs = all(training.task.recipe.epochs for training in trainings)
    if isinstance(problem, Problem) and problem.fine_tune_workers > 1 and have_epochs:
        return train_on_several(trainings, problem, pool, run)
    return train(trainings, pool, run)
