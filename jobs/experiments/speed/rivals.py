"""Other ways to score a mask, each in a process of its own, as a plain script would run."""

from __future__ import annotations

import contextlib
import copy
import importlib
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from torch.utils.data import Dataset as TorchDataset

from fppmo_ray import Dataset, ImageArrays
from fppmo_ray.training import example_batch
from speed.subject import MACS_CUT, RECALIBRATION_BATCH, Subject

_FASTNAS_BATCHES = 50  # it recalibrates on that many, or not at all
_FASTNAS_DIVISOR = 8  # of widths; its own 32 leaves CIFAR's ResNets hardly anything to prune

Turn = Callable[[], AbstractContextManager[None]]
"""What a way scores within: waits until it is its turn, and tells how long it took."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A score without fine-tuning, as others understand it."""

    dense: nn.Module
    """On the CPU."""
    removed: Mapping[str, list[int]]
    """Filters, by the name of a convolution they are outputs of."""
    dataset: Dataset
    recalibrate_images: int
    score_images: int
    device: str
    threads: int


def task_of(subject: Subject) -> Task:
    """The score of the subject's mask."""
    space = subject.tracing.space
    masks = np.split(subject.keep, space.offsets[1:])
    removed = {
        group.name: np.flatnonzero(~keep).tolist()
        for group, keep in zip(space.groups, masks, strict=True)
        if not keep.all()
    }
    return Task(
        dense=copy.deepcopy(subject.dense).cpu(),
        removed=removed,
        dataset=subject.dataset,
        recalibrate_images=subject.fidelity.recalibrate_images,
        score_images=subject.fidelity.score_images,
        device=subject.device.type,
        threads=torch.get_num_threads(),
    )


@contextmanager
def rival(way: Callable[[Task, Turn], None], task: Task) -> Iterator[Callable[[], float]]:
    """Start a process that does one score, and returns its seconds, whenever it is asked to.

    Args:
        way: ``naive`` or ``fastnas``.
        task: The score.

    Raises:
        RuntimeError: the process ended, with an error of its own.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(way, task, there), daemon=True)
    process.start()
    there.close()

    def take_turn() -> float:
        try:
            here.send("your turn")
            seconds: float = here.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError(f"{way.__name__} ended; its error is above") from error
        return seconds

    try:
        yield take_turn
    finally:
        here.close()
        process.join()


def _serve(way: Callable[[Task, Turn], None], task: Task, pipe: Connection) -> None:
    torch.set_num_threads(task.threads)

    @contextmanager
    def turn() -> Iterator[None]:
        pipe.recv()
        begin = time.perf_counter()
        yield
        pipe.send(time.perf_counter() - begin)

    with contextlib.suppress(EOFError, BrokenPipeError):  # nobody asks for more
        while True:
            way(task, turn)


def naive(task: Task, turn: Turn) -> None:
    """Score by a copy of the network, Torch-Pruning on the copy, and a DataLoader, in float32.

    Args:
        task: The score.
        turn: Context in which the score is done and timed.
    """
    dense = task.dense.to(task.device)
    with turn():
        network = naively_pruned(dense, task)
        _recalibrate(network, _loaded(task, task.recalibrate_images))
        _loss(network, _loaded(task, task.score_images))


def naively_pruned(dense: nn.Module, task: Task) -> nn.Module:
    """Return a copy of the network that Torch-Pruning has pruned.

    Args:
        dense: The dense network.
        task: The filters to remove.
    """
    import torch_pruning

    network = copy.deepcopy(dense)
    layers = dict(network.named_modules())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = example_batch(task.dataset).to(task.device)
        graph = torch_pruning.DependencyGraph().build_dependency(network, image)
    for name, filters in task.removed.items():
        prune = torch_pruning.prune_conv_out_channels
        graph.get_pruning_group(layers[name], prune, idxs=filters).prune()
    return network


def fastnas(task: Task, turn: Turn) -> None:
    """Run a search of NVIDIA's Model Optimizer, whose score function waits for its turn.

    Args:
        task: The score.
        turn: Context in which a score is done and timed.
    """
    prune = importlib.import_module("modelopt.torch.prune")  # without types
    rules = importlib.import_module("modelopt.torch.prune.fastnas").FastNASConfig().model_dump()
    rules["nn.Conv2d"]["*"]["channel_divisor"] = _FASTNAS_DIVISOR
    rules["nn.BatchNorm2d"]["*"]["feature_divisor"] = _FASTNAS_DIVISOR
    count = task.recalibrate_images
    calibration = list(_loaded(task, count, batch_size=max(1, count // _FASTNAS_BATCHES)))

    def score(network: nn.Module) -> float:
        with turn():
            network.eval()  # recalibrates
            return -_loss(network, _loaded(task, task.score_images))

    with open(os.devnull, "w") as nowhere, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            prune.prune(
                copy.deepcopy(task.dense).to(task.device),
                mode=[("fastnas", rules)],
                constraints={"flops": f"{1 - MACS_CUT:.0%}"},
                dummy_input=example_batch(task.dataset).to(task.device),
                config={
                    "data_loader": calibration,
                    "collect_func": lambda batch: batch[0],
                    "score_func": score,
                },
            )


class _SingleImages(TorchDataset[tuple[Tensor, int]]):
    """Images one by one, as torchvision's data sets give them after ToTensor and Normalize."""

    def __init__(self, dataset: Dataset) -> None:
        assert isinstance(dataset.train, ImageArrays)
        self._source = dataset.train
        self._mean = torch.tensor(dataset.mean).reshape(-1, 1, 1)
        self._std = torch.tensor(dataset.std).reshape(-1, 1, 1)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels = torch.from_numpy(self._source.images[index]).permute(2, 0, 1).contiguous()
        image = pixels.float().div(255).sub(self._mean).div(self._std)
        return image, int(self._source.labels[index])


def _loaded(
    task: Task, count: int, batch_size: int = RECALIBRATION_BATCH
) -> Iterator[tuple[Tensor, Tensor]]:
    images = Subset(_SingleImages(task.dataset), range(count))
    for batch, labels in DataLoader(images, batch_size=batch_size):
        yield batch.to(task.device), labels.to(task.device)


@torch.no_grad()
def _recalibrate(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    network.train()
    for images, _ in batches:
        network(images)


@torch.no_grad()
def _loss(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Mean over all images; the accuracy is asked for too, as in a score."""
    network.eval()
    total, right, count = 0.0, 0, 0
    for images, labels in batches:
        logits = network(images)
        total += F.cross_entropy(logits, labels, reduction="sum").item()
        right += int((logits.argmax(1) == labels).sum())
        count += len(labels)
    return total / count
