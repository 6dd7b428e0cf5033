"""What a score costs, against the bare passes it consists of and against the naive way to do it."""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from fppmo_ray import Dataset, ImageArrays, Recipe
from fppmo_ray.distribution import BoolArray, Budget
from fppmo_ray.distribution.logits import uniform_priority
from fppmo_ray.pruning import Fidelity, Tracing, extract, importance, trace
from fppmo_ray.pruning.score import score
from fppmo_ray.training import (
    Augmentation,
    Images,
    build_network,
    evaluate,
    example_batch,
    open_images,
)
from fppmo_ray.training import recalibrate_batchnorm as recalibrate
from fppmo_ray.training.modes import DType, arithmetic

_MACS_CUT = 0.57
_BATCH = 250  # as in scores
_SMALL = 32  # pixels
_LARGE = 224


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A network that is scored, on random images of its size."""

    name: str
    dense: nn.Module
    tracing: Tracing
    keep: BoolArray
    images: Images
    dataset: Dataset
    fidelity: Fidelity
    recipe: Recipe

    @property
    def device(self) -> torch.device:
        """Where it is scored."""
        return self.images.labels.device


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Median seconds of a score, and of what it consists of."""

    score: float
    extract: float
    data: float
    """Batches: gathered, augmented, normalised."""
    bare: float
    """Forward and backward passes of the extracted network on batches that lie ready."""
    naive: float | None
    """Recalibrate-only the naive way; None where the score trains."""


def scoring_table(
    networks: Sequence[str], steps: Sequence[int], *, dtype: DType, device: str, repeats: int
) -> Table:
    """Measure every network at every number of fine-tuning steps.

    Args:
        networks: CIFAR ResNets (32 x 32) or ``resnet50`` (224 x 224).
        steps: Fidelities: fine-tuning steps per score.
        dtype: Of the passes.
        device: ``cpu`` or ``cuda``.
        repeats: Of each measurement; what is compared is measured in turns.
    """
    table = Table(
        *("network", "steps", "scores/s", "s", "bare s", "score / bare"),
        *("extract", "data", "other", "naive / score"),
        title=f"{_describe(device)}, {dtype}, {_MACS_CUT:.0%} of the MACs cut",
    )
    for name in networks:
        subject = _subject(name, dtype, device)
        for count in steps:
            fidelity = replace(subject.fidelity, steps=count)
            cost = _measure(replace(subject, fidelity=fidelity), repeats)
            table.add_row(name, str(count), *_figures(cost))
    return table


def _figures(cost: Cost) -> list[str]:
    other = cost.score - cost.bare - cost.extract - cost.data
    parts = [f"{part / cost.score:.1%}" for part in (cost.extract, cost.data, other)]
    naive = "" if cost.naive is None else f"{cost.naive / cost.score:.2f}"
    ratio = f"{cost.score / cost.bare:.3f}"
    return [f"{1 / cost.score:.2f}", f"{cost.score:.3f}", f"{cost.bare:.3f}", ratio, *parts, naive]


def _describe(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)}"


def _subject(name: str, dtype: DType, device: str) -> Subject:
    size = _LARGE if name == "resnet50" else _SMALL
    dense = _network(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is left whole, is left whole
        tracing = trace(dense, torch.zeros(1, 3, size, size))
    space = tracing.space.with_limits(min_keep=0.1)
    priority = uniform_priority(space, importance(dense, tracing, "l1"))
    # Few large images: their passes outweigh all else even so.
    fidelity = Fidelity() if size == _SMALL else Fidelity(recalibrate_images=250, score_images=250)
    dataset = random_dataset(4000 if size == _SMALL else 500, size)
    return Subject(
        name=name,
        dense=dense.to(device),
        tracing=tracing,
        keep=Budget.from_cut(space, _MACS_CUT).fill(priority),
        images=open_images(dataset.train, None, dataset, device),
        dataset=dataset,
        fidelity=fidelity,
        recipe=Recipe(dtype=dtype, batch_size=128 if size == _SMALL else 32),
    )


def _network(name: str) -> nn.Module:
    if name != "resnet50":
        return build_network(name, 10).eval()
    from torchvision.models import resnet50

    network: nn.Module = resnet50(num_classes=10)
    return network.eval()


def random_dataset(count: int, size: int) -> Dataset:
    """Square images of noise in ten classes; the same ones train and test."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    images = ImageArrays(pixels, np.arange(count) % 10)
    return Dataset(
        name="random images",
        train=images,
        test=images,
        num_classes=10,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        augmentation=Augmentation(padding=4, flip=True),
    )


def _measure(subject: Subject, repeats: int) -> Cost:
    ways: dict[str, Callable[[], object]] = {
        "score": partial(_score, subject),
        "extract": partial(_extracted, subject),
        "data": partial(_run_through, subject),
        "bare": _bare_passes(subject),
    }
    if not subject.fidelity.steps:
        ways["naive"] = partial(_score_naively, subject)
    seconds = _in_turns(ways, subject.device, repeats)
    naive = seconds.pop("naive", None)
    return Cost(naive=naive, **seconds)


def _in_turns(
    ways: Mapping[str, Callable[[], object]], device: torch.device, repeats: int
) -> dict[str, float]:
    """Median seconds of each, after a first time; in turns, so that disturbances hit all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, run in ways.items():
            _wait_for(device)
            begin = time.perf_counter()
            run()
            _wait_for(device)
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _score(subject: Subject) -> None:
    score(
        subject.dense,
        subject.tracing,
        subject.keep,
        search_train=subject.images,
        held_out=subject.images,
        fidelity=subject.fidelity,
        recipe=subject.recipe,
        seed=(0, 0),
    )


def _extracted(subject: Subject) -> nn.Module:
    network = extract(subject.dense, subject.tracing, subject.keep)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch stubs
    return network


def _rows(subject: Subject, count: int) -> np.ndarray:
    return np.arange(min(count, len(subject.images)))


def _batches(subject: Subject) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """All batches of a score: the tensors that the passes are done on."""
    images, fidelity = subject.images, subject.fidelity
    size, steps = subject.recipe.batch_size, fidelity.steps
    training: list[tuple[Tensor, Tensor]] = []
    for epoch in range(-(-steps // images.num_training_batches(size))):
        training += images.training_batches(size, seed=0, epoch=epoch)
    return {
        "training": training[:steps],
        "recalibration": list(images.batches(_BATCH, _rows(subject, fidelity.recalibrate_images))),
        "scoring": list(images.batches(_BATCH, _rows(subject, fidelity.score_images))),
    }


def _run_through(subject: Subject) -> None:
    _batches(subject)


def _bare_passes(subject: Subject) -> Callable[[], None]:
    network, batches = _extracted(subject), _batches(subject)

    def run() -> None:
        network.train()
        for images, labels in batches["training"]:
            with arithmetic(subject.device, subject.recipe.dtype):
                logits = network(images)
            F.cross_entropy(logits.float(), labels).backward()  # type: ignore[no-untyped-call]
            network.zero_grad()
        with torch.no_grad(), arithmetic(subject.device, subject.recipe.dtype):
            for images, _ in batches["recalibration"]:
                network(images)
            network.eval()
            for images, _ in batches["scoring"]:
                network(images)

    return run


class _SingleImages(TorchDataset[tuple[Tensor, int]]):
    """Images one by one, as torchvision's data sets give them after ToTensor and Normalize."""

    def __init__(self, dataset: Dataset, count: int) -> None:
        assert isinstance(dataset.train, ImageArrays)
        self._source, self._count = dataset.train, count
        self._mean = torch.tensor(dataset.mean).reshape(-1, 1, 1)
        self._std = torch.tensor(dataset.std).reshape(-1, 1, 1)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels = torch.from_numpy(self._source.images[index]).permute(2, 0, 1).contiguous()
        image = pixels.float().div(255).sub(self._mean).div(self._std)
        return image, int(self._source.labels[index])


def _score_naively(subject: Subject) -> None:
    """A copy, Torch-Pruning on the copy, and a DataLoader: float32, as it comes."""
    import torch_pruning

    network = copy.deepcopy(subject.dense)
    image = example_batch(subject.dataset).to(subject.device)
    graph = torch_pruning.DependencyGraph()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph.build_dependency(network, image)
    space, modules = subject.tracing.space, dict(network.named_modules())
    for group, kept in zip(space.groups, np.split(subject.keep, space.offsets[1:]), strict=True):
        removed = np.flatnonzero(~kept).tolist()
        if removed:
            layer = modules[group.name]
            prune = torch_pruning.prune_conv_out_channels
            graph.get_pruning_group(layer, prune, idxs=removed).prune()
    recalibrate(network, _loaded(subject, subject.fidelity.recalibrate_images))
    evaluate(network, _loaded(subject, subject.fidelity.score_images))


def _loaded(subject: Subject, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    rows = len(_rows(subject, count))
    for images, labels in DataLoader(_SingleImages(subject.dataset, rows), batch_size=_BATCH):
        yield images.to(subject.device), labels.to(subject.device)
