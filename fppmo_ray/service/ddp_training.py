"""Whole trainings, by one worker each or shared by several: Ray Train around torch's DDP.

The pool's workers make room first. Ray Train starts a group of replicas, which work on one network
after the other: each extracts the pruned network, then wraps it, and trains on its part of every
batch. The first replica hands every epoch's state to the checkpoint exchange, from where the driver
makes it durable, like the states of a single worker. If replicas are lost, a new group goes on from
the latest state.
"""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fppmo_ray.service.journal.run_directory import RunDirectory
from fppmo_ray.service.pool.cluster import Demand, end_actor
from fppmo_ray.service.pool.in_flight import TimeLimits
from fppmo_ray.service.pool.worker_pool import WorkerPool
from fppmo_ray.service.problem import Problem
from fppmo_ray.service.stopping import StopRequest, process_ends_after
from fppmo_ray.service.trainings import (
    Begin,
    CheckpointExchange,
    EpochDone,
    Training,
    keep_epoch,
    resume_point,
    train_side_by_side,
)
from fppmo_ray.service.worker import PruningWorker
from fppmo_ray.service.worker_protocol import TrainingTask, Worker
from fppmo_ray.training import Shard

if TYPE_CHECKING:
    from ray.train import ScalingConfig


logger = logging.getLogger(__name__)

_LOOK_UP_S = 1.0  # longest delay until a finished epoch or a stop is noticed
# Longest wait of a replica for the others. Ray notices a replica that is lost within a minute and
# ends the group; this ends a group of which one hangs.
_MAX_WAIT_S = 300
_MAX_FAILURES = 3  # groups in a row that finish no epoch: then it is no accident
_MAX_MINUTES_WITHOUT_ROOM = 10  # of a group; a node that an autoscaler adds takes less


def train_whole(
    trainings: Sequence[Training],
    problem: Problem,
    pool: WorkerPool[Worker],
    run: RunDirectory,
) -> dict[str, bytes]:
    """Train networks from the first epoch, or the last checkpoint, to the recipe's last epoch.

    Several workers share each training if the problem wants that; else each network is trained by
    one worker, side by side.

    Args:
        trainings: The trainings, equally long, the largest network first.
        problem: Says how many workers share a training.
        pool: Workers with nothing unfinished.
        run: Where checkpoints and facts are kept.

    Returns:
        The final training state of each network, as bytes, by the task's name.

    Raises:
        RuntimeError: a training diverged, or failed again and again.
        SearchStopped: a stop was requested.
    """
    have_epochs = all(training.task.recipe.epochs for training in trainings)
    if problem.task.shares_training and problem.fine_tune_workers > 1 and have_epochs:
        return train_on_several(trainings, problem, pool, run)
    return train_side_by_side(trainings, pool, run)


def train_on_several(
    trainings: Sequence[Training], problem: Problem, pool: WorkerPool[Worker], run: RunDirectory
) -> dict[str, bytes]:
    """Train every network by all replicas; see ``train_whole``.

    Args:
        trainings: One after the other, each by all replicas; of at least one epoch.
        problem: Says how many replicas there are.
        pool: Makes room for them, with nothing unfinished.
        run: Where checkpoints and facts are kept.

    Returns:
        The final training state of each task, as bytes, by the task's name.

    Raises:
        RuntimeError: a task diverged, or replicas fail again and again.
        SearchStopped: a stop was requested.
    """
    states, unfinished = _resumed(trainings, run)
    if not unfinished:
        return states

    def keep(done: EpochDone) -> None:
        task = unfinished[done.training][0].task
        keep_epoch(task.name, done.epoch, done.state, done.report, run)
        if done.epoch + 1 == task.recipe.epochs:
            states[task.name] = done.state

    begins = [begin for _, begin in unfinished]
    # Beside the driver, since nodes of workers come and go.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor: Any = ray.remote(num_cpus=0)(CheckpointExchange)
    exchange = actor.options(scheduling_strategy=here).remote(begins, ray.put)
    # References only: the weights themselves are in the object store.
    trained = [
        (training.task, training.weights.shared, training.teacher.shared)
        for training, _ in unfinished
    ]
    replica = partial(_train_replica, trained, pool.limits)
    try:
        with pool.away():
            _train_by_groups(replica, exchange, keep, problem, pool.stop)
    finally:
        end_actor(exchange)
    return states


def _resumed(
    trainings: Sequence[Training], run: RunDirectory
) -> tuple[dict[str, bytes], list[tuple[Training, Begin]]]:
    """Return the final states of finished trainings, and where the others go on."""
    states: dict[str, bytes] = {}
    unfinished = []
    for training in trainings:
        name, num_epochs = training.task.name, training.task.recipe.epochs
        epoch, state = resume_point(training, run)
        if state is not None and epoch >= num_epochs:
            states[name] = state
        else:
            begin = Begin(epoch=epoch, state=state, num_epochs=num_epochs)
            unfinished.append((training, begin))
    return states, unfinished


def _train_by_groups(
    replica: Callable[[Any, Any], None],
    exchange: Any,
    keep: Callable[[EpochDone], None],
    problem: Problem,
    stop: StopRequest,
) -> None:
    """Start groups of replicas until one has finished all trainings."""
    from ray.train import TrainingFailedError  # slow to import, with all that is below ray.train

    reference = ray.put(replace(problem, gpu_share=1.0))
    train = partial(replica, reference, exchange)
    num_failures = 0
    while num_failures < _MAX_FAILURES:
        ray.get(exchange.start_group.remote())
        group = _in_background(partial(_fit, train, problem))
        num_kept = _keep_epochs(group, exchange, keep, stop)
        error = group.exception()
        if error is None:
            return
        if not isinstance(error, TrainingFailedError):  # the group was never started
            raise error
        num_failures = 1 if num_kept else num_failures + 1
        reason = str(error).strip().splitlines()[-1]  # the lines above are remote tracebacks
        logger.warning("a group of replicas ended before its work was done: %s", reason)
    raise RuntimeError(
        f"{num_failures} groups of replicas in a row ended before they finished an epoch, the last "
        f"with: {reason}"
    ) from error


def _keep_epochs(
    group: Future[None], exchange: Any, keep: Callable[[EpochDone], None], stop: StopRequest
) -> int:
    """Keep epochs as they end, until the group has ended; return their number.

    Raises:
        SearchStopped: a stop was requested, and the epoch under way has ended.
    """
    num_kept, has_ended = 0, False
    while not has_ended:
        has_ended = _has_ended(group)
        for done in ray.get(exchange.take.remote()):
            keep(replace(done, state=ray.get(done.state)))
            num_kept += 1
        if stop.is_made and not ray.get(exchange.stop.remote()):
            raise stop.stopped()
    return num_kept


def _has_ended(group: Future[None]) -> bool:
    """Return whether the group has ended, after waiting for a second at most."""
    try:
        group.exception(timeout=_LOOK_UP_S)
    except TimeoutError:
        return False
    return True


def _in_background(run: Callable[[], None]) -> Future[None]:
    """Start a call in a thread that does not keep the process alive; return its future."""
    future: Future[None] = Future()

    def call() -> None:
        try:
            run()
        except Exception as error:  # raised again from the future
            future.set_exception(error)
        except SystemExit as error:  # Ray ends the thread when it is shut down under it
            future.set_exception(RuntimeError(f"Ray was shut down during a training: {error}"))
        else:
            future.set_result(None)

    threading.Thread(target=call, name="replicas", daemon=True).start()
    return future


def scaling_of(problem: Problem) -> ScalingConfig:
    """Return the resources of a group of replicas: each has a whole GPU if workers hold any."""
    from ray.train import ScalingConfig

    demand: Demand = problem.replica_demand
    labels: dict[str, Any] = {"label_selector": dict(demand.labels)} if demand.labels else {}
    return ScalingConfig(
        num_workers=problem.fine_tune_workers,
        use_gpu=problem.device_type == "cuda",
        resources_per_worker=demand.bundle(),
        accelerator_type=demand.accelerator_type,
        **labels,
    )


def _fit(train: Callable[[], None], problem: Problem) -> None:
    """Run one group of replicas from its start to its end.

    Raises:
        TrainingFailedError: one of them failed, or was lost.
    """
    from ray.train import FailureConfig, RunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    # Ray Train would wait for room for ever, a minute at a time, without a line to the driver.
    retries = _MAX_MINUTES_WITHOUT_ROOM - 1
    failures: Any = FailureConfig(controller_failure_limit=retries)  # type: ignore[call-arg]
    with tempfile.TemporaryDirectory() as folder:  # wanted by Ray Train
        TorchTrainer(
            train,
            torch_config=TorchConfig(timeout_s=_MAX_WAIT_S),
            scaling_config=scaling_of(problem),
            run_config=RunConfig(name="fine-tuning", storage_path=folder, failure_config=failures),
        ).fit()


def _train_replica(
    trainings: Sequence[tuple[TrainingTask, Any, Any]],
    limits: TimeLimits,
    problem: Any,
    exchange: Any,
) -> None:
    """Run one replica: epoch after epoch, all replicas the same one.

    A replica whose epoch takes longer than such calls may ends its process, and so its group.
    """
    from ray.train import get_context

    context = get_context()
    shard = Shard(context.get_world_rank(), context.get_world_size())
    worker = PruningWorker(ray.get(problem), shard.index)
    reached: tuple[tuple[int, int], bytes] | None = None
    while (place := _agree_on_next(shard, exchange)) is not None:
        index, epoch = place
        if reached is not None and reached[0] == place:
            state: bytes | None = reached[1]
        else:
            shared = ray.get(exchange.state_before.remote(index, epoch))
            state = None if shared is None else ray.get(shared)
        task, weights, teacher = trainings[index]
        with process_ends_after(limits.limit("train_epoch")):
            new_state, report = worker.train_epoch(
                ray.get(weights), task, epoch, state, ray.get(teacher), shard
            )
        assert report is not None  # a task with epochs reports them
        limits.learn("train_epoch", report.seconds)
        reached = (index, epoch + 1), new_state
        if shard.index == 0:
            done = EpochDone(training=index, epoch=epoch, state=new_state, report=report)
            ray.get(exchange.put.remote(done))


def _agree_on_next(shard: Shard, exchange: Any) -> tuple[int, int] | None:
    """Let the first replica ask for the next epoch, so that all replicas do the same one."""
    from torch import distributed

    answers = [ray.get(exchange.next_epoch.remote()) if shard.index == 0 else None]
    distributed.broadcast_object_list(answers)
    return answers[0]
