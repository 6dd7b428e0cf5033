"""FastNAS of NVIDIA's Model Optimizer: the mask that it finds for a budget, and its scores."""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from fine_tuning import classification_of
from torch import Tensor, nn

from fppmo_ray.distribution import BoolArray, Budget
from fppmo_ray.pruning import Tracing
from fppmo_ray.service.problem import Problem
from fppmo_ray.training import ComputeConfig, evaluate

BATCHES = 50  # it re-estimates batch-norm statistics on that many, or not at all
_DIVISOR = 1  # of widths: as free as everybody else's; of its own 32, 16 filters are no choice
_SLACK = 0.005  # of the dense MACs, since it counts them in a way of its own


@dataclass(frozen=True, kw_only=True, eq=False)
class FastNASChoice:
    """The mask that FastNAS found, and its cost."""

    keep: BoolArray
    scores: int
    seconds: float
    """Wall time of the search, which scores one network after the other."""


def require_fastnas() -> None:
    """Check that FastNAS and the packages that it imports are installed.

    Raises:
        ValueError: one of them is not.
    """
    needed = ("modelopt", "huggingface_hub", "torchprofile")  # it imports the second unasked
    missing = [name for name in needed if not importlib.util.find_spec(name)]
    if missing:
        raise ValueError(
            f"method fastnas needs {', '.join(missing)}, which is not installed: "
            "pip install nvidia-modelopt huggingface_hub torchprofile==0.0.4, "
            "or leave the method out"
        )


def fastnas_choice(
    problem: Problem, budget: Budget, *, score_images: int, compute: ComputeConfig, seed: int
) -> FastNASChoice:
    """Let FastNAS prune to the budget, scoring by the loss on search-val images.

    The search is serial, so it runs in this process. FastNAS re-estimates batch-norm statistics
    itself, on as many images as a finalist's score.

    Args:
        problem: The network and its data.
        budget: The budget that the mask meets.
        score_images: Search-val images of a score.
        compute: How the passes are computed.
        seed: Seed of the choice of images, >= 0.

    Raises:
        RuntimeError: the pruned network is no mask of the space, or is over the budget.
    """
    device = torch.device("cpu")
    torch.set_num_threads(compute.threads)
    images_of = (
        classification_of(problem)
        .open(problem.tracing, problem.settings, device, threads=problem.threads)
        .images
    )
    held_out, images = images_of("search_val"), images_of("search_train")
    rng = np.random.default_rng(seed)
    drawn = np.sort(rng.permutation(len(held_out))[:score_images])
    count = min(problem.settings.scoring.recalibrate_images, len(images))
    size = max(1, count // BATCHES)
    calibration = [batch for batch, _ in images.batches(size, np.arange(size * BATCHES))]
    num_scores = 0

    def score(network: nn.Module) -> float:
        nonlocal num_scores
        num_scores += 1
        network.eval()  # re-estimates the statistics
        batches = held_out.batches(compute.scoring_batch, drawn)
        return -evaluate(network, batches, dtype=compute.dtype).loss

    begin = time.perf_counter()
    network = searched(
        problem.network,
        problem.task.inputs()[0],
        share=budget.max_macs / budget.space.dense_macs,
        score=score,
        calibration=calibration,
    )
    seconds = time.perf_counter() - begin
    keep = mask_of(network, problem.network, problem.tracing)
    if problem.tracing.space.macs(keep) > budget.max_macs + _SLACK * budget.space.dense_macs:
        raise RuntimeError("fastnas ended over the budget: it counts MACs differently here")
    return FastNASChoice(keep=keep, scores=num_scores, seconds=seconds)


def searched(
    dense: nn.Module,
    image: Tensor,
    *,
    share: float,
    score: Callable[[nn.Module], float],
    calibration: Sequence[Tensor],
) -> nn.Module:
    """Return the network that FastNAS finds; its channels are in an order of its own.

    Args:
        dense: The dense network, which is left as it is.
        image: An input, (1, C, H, W).
        share: Share of the MACs that may be left, in (0, 1).
        score: Scores a network; more is better.
        calibration: Batches that re-estimate batch-norm statistics before every score; without
            at least 50 of them nothing is re-estimated.
    """
    with _quietly():
        prune = importlib.import_module("modelopt.torch.prune")  # without types
        network, _ = prune.prune(
            copy.deepcopy(dense),
            mode=[("fastnas", _rules())],
            constraints={"flops": f"{100 * share}%"},
            dummy_input=image,
            config={
                "data_loader": calibration,
                "collect_func": lambda batch: batch,
                "score_func": score,
            },
        )
    smaller: nn.Module = network
    return smaller


def mask_of(network: nn.Module, dense: nn.Module, tracing: Tracing) -> BoolArray:
    """Return the mask of a pruned network whose filters may be in another order.

    A filter is recognised by its weights, so only layers whose inputs are whole can be pruned, as
    in the option-A ResNets.

    Args:
        network: The pruned network.
        dense: The dense network.
        tracing: Tracing of the dense network.

    Raises:
        RuntimeError: a filter is none of the dense network's.
    """
    keep = np.ones(tracing.space.num_filters, dtype=bool)
    for part in tracing.slices:
        if part.side != "output" or not part.tensor.endswith(".weight"):
            continue
        rows = dense.get_parameter(part.tensor).detach().flatten(1).numpy()
        places = {row.tobytes(): place for place, row in enumerate(rows)}
        left = network.get_parameter(part.tensor).detach().flatten(1).contiguous().numpy()
        kept = [places.get(row.tobytes(), -1) for row in left]
        if -1 in kept or len(set(kept)) < len(kept):
            raise RuntimeError(f"{part.tensor} holds filters that are not the dense network's")
        gone = np.setdiff1d(np.arange(len(part.units)), kept)
        keep[part.units[gone][part.units[gone] >= 0]] = False
    return keep


def _rules() -> dict[str, dict[str, dict[str, object]]]:
    fastnas = importlib.import_module("modelopt.torch.prune.fastnas")
    rules: dict[str, dict[str, dict[str, object]]] = fastnas.FastNASConfig().model_dump()
    rules["nn.Conv2d"]["*"]["channel_divisor"] = _DIVISOR
    rules["nn.BatchNorm2d"]["*"]["feature_divisor"] = _DIVISOR
    return rules


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    with (
        open(os.devnull, "w") as nowhere,
        warnings.catch_warnings(),
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        warnings.simplefilter("ignore")
        yield
