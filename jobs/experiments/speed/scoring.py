"""What a score costs: against its bare passes, the device's rate, and other ways to do it."""

from __future__ import annotations

import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from rich.table import Table

from speed.passes import Convolutions, Run, bare_passes, device_seconds, work_around
from speed.rivals import fastnas, naive, rival, task_of
from speed.subject import MACS_CUT, Plan, Subject, make_subject


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Median seconds of a score, and of what it consists of."""

    score: float
    bare: float
    """Forward and backward passes of the extracted network on batches that lie ready."""
    convolutions: float
    """Those of all passes, alone."""
    around: Mapping[str, float]
    """The work around the passes, by name: see ``work_around``."""
    launch: float
    """Of the bare passes: the host launches and the GPU does not work; 0 on CPUs."""
    training: Training | None
    """Of the fine-tuning steps within; None without."""
    rivals: Mapping[str, float]
    """Of a score the naive way, and of FastNAS's if it is installed; empty with steps."""

    @property
    def rest(self) -> float:
        """What none of the parts explains; below 0 where they overlap, or by noise."""
        return self.score - self.bare - sum(self.around.values())


@dataclass(frozen=True, kw_only=True)
class Training:
    """The fine-tuning steps of a score."""

    images: int
    seconds: float
    """That the score takes longer than one without steps."""
    convolutions: float
    """Seconds of theirs, alone."""


def scoring_tables(networks: Sequence[str], plan: Plan) -> tuple[Table, Table]:
    """Measure every network at every number of fine-tuning steps.

    Args:
        networks: CIFAR ResNets (32 x 32) or ``resnet50`` (224 x 224).
        plan: How they are scored.

    Returns:
        How fast scores are, and what they spend beside the passes.

    Raises:
        ValueError: there is no such device or network.
    """
    if plan.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for and torch sees none; take cpu")
    title = f"{_describe(plan)}; {MACS_CUT:.0%} of the MACs cut"
    speed = Table(
        *("network", "steps", "scores/s", "s", "bare s", "score / bare", "convs / score"),
        *("trained images/s", "convs / trained", "naive / score", "FastNAS / score"),
        title=title,
        caption="convs: the device's time for the convolutions alone, in the same dtype",
    )
    parts = Table(
        *("network", "steps", "extract", "copy", "launch", "BN", "metrics", "optimizer", "rest"),
        title="shares of a score beside its bare passes",
        caption="launch is within the bare passes",
    )
    for name in networks:
        subject = make_subject(name, plan)
        for steps in plan.steps:
            cost = measure(subject.at(steps), plan.repeats)
            speed.add_row(name, str(steps), *_speed(cost))
            parts.add_row(name, str(steps), *_parts(cost))
    return speed, parts


def _describe(plan: Plan) -> str:
    device = torch.cuda.get_device_name() if plan.device == "cuda" else "CPU"
    return f"{device}; {plan.compute}; load {os.getloadavg()[0]:.1f}"


def _speed(cost: Cost) -> list[str]:
    training = cost.training
    return [
        f"{1 / cost.score:.2f}",
        f"{cost.score:.3f}",
        f"{cost.bare:.3f}",
        f"{cost.score / cost.bare:.3f}",
        f"{cost.convolutions / cost.score:.1%}",
        f"{training.images / training.seconds:,.0f}" if training else "",
        f"{training.convolutions / training.seconds:.1%}" if training else "",
        *(
            f"{cost.rivals[way] / cost.score:.2f}" if way in cost.rivals else ""
            for way in ("naive", "fastnas")
        ),
    ]


def _parts(cost: Cost) -> list[str]:
    parts = {**cost.around, "launch": cost.launch, "rest": cost.rest}
    order = ("extract", "copy", "launch", "BN", "metrics", "optimizer", "rest")
    return [f"{parts[name] / cost.score:.1%}" for name in order]


def measure(subject: Subject, repeats: int) -> Cost:
    """Measure everything of one score in turns, so that disturbances hit all alike.

    Args:
        subject: What is scored.
        repeats: Number of turns, after a first one that does not count.
    """
    bare, around = bare_passes(subject), work_around(subject)
    convolutions, steps = Convolutions(subject), subject.fidelity.steps
    runs: dict[str, Run] = {
        "score": subject.score,
        "bare": bare,
        "looking": convolutions.look,
        **around,
    }
    if steps:
        runs |= {"untrained": subject.at(0).score, "training": convolutions.train}
    ways = {name: partial(_timed, run, subject.device) for name, run in runs.items()}
    with ExitStack() as rivals:
        others = {} if steps else _rivals_of(subject, rivals)
        seconds = _in_turns(ways | others, repeats)
    is_cuda = subject.device.type == "cuda"
    return Cost(
        score=seconds["score"],
        bare=seconds["bare"],
        convolutions=seconds["looking"] + seconds.get("training", 0),
        around={name: seconds[name] for name in around},
        launch=max(0.0, seconds["bare"] - device_seconds(bare)) if is_cuda else 0.0,
        training=_training(subject, seconds) if steps else None,
        rivals={name: seconds[name] for name in others},
    )


def _training(subject: Subject, seconds: Mapping[str, float]) -> Training:
    return Training(
        images=subject.fidelity.steps * min(subject.recipe.batch_size, len(subject.images)),
        seconds=seconds["score"] - seconds["untrained"],
        convolutions=seconds["training"],
    )


def _rivals_of(subject: Subject, stack: ExitStack) -> dict[str, Callable[[], float]]:
    ways = [naive, fastnas] if importlib.util.find_spec("modelopt") else [naive]
    task = task_of(subject)
    return {way.__name__: stack.enter_context(rival(way, task)) for way in ways}


def _in_turns(ways: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Medians of the seconds that each gives, without the first."""
    turns = [{name: seconds() for name, seconds in ways.items()} for _ in range(repeats + 1)]
    return {name: statistics.median(turn[name] for turn in turns[1:]) for name in ways}


def _timed(run: Run, device: torch.device) -> float:
    _wait_for(device)
    begin = time.perf_counter()
    run()
    _wait_for(device)
    return time.perf_counter() - begin


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
