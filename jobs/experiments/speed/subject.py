"""What the scoring benchmark scores: a network, a mask and random images of its size."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from typing import Literal

import numpy as np
import torch
from torch import nn

from fppmo_ray import Dataset, ImageArrays, Recipe
from fppmo_ray.distribution import BoolArray, Budget
from fppmo_ray.distribution.logits import uniform_priority
from fppmo_ray.pruning import Fidelity, Tracing, extract, importance, trace
from fppmo_ray.pruning.score import Candidate, score
from fppmo_ray.training import (
    PLAIN_COMPUTE,
    Augmentation,
    Batch,
    ComputeConfig,
    Images,
    build_network,
    lay_out,
    open_images,
)

MACS_CUT = 0.57
RECALIBRATION_BATCH = 250  # as in scores
_SMALL, _LARGE = 32, 224  # pixels
_TEST = 10  # images: only searches look at them, at their end
_FEWER = 8  # times fewer large images, which are 49 times as large


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured of scores, and how."""

    steps: tuple[int, ...] = (0, 50)
    """Fine-tuning steps of a score, one row of the tables for each number."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where scores are computed."""
    compute: ComputeConfig = PLAIN_COMPUTE
    """How the scores' passes are computed; the bare ones have its dtype and layout."""
    repeats: int = 5
    """Of each measurement, after a first one that does not count; medians are taken."""
    recalibrate_images: int = 1000
    """Images that a score re-estimates batch-norm statistics on."""
    score_images: int = 2000
    """Images that a score is read on. The counts of images are those of 32 x 32; of 224 x 224 an
    eighth are taken."""
    batch_size: int = 128
    """Images per fine-tuning step."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A network that is scored, and everything that a score of it depends on."""

    name: str
    dense: nn.Module
    tracing: Tracing
    keep: BoolArray
    images: Images
    dataset: Dataset
    fidelity: Fidelity
    recipe: Recipe
    compute: ComputeConfig

    @property
    def device(self) -> torch.device:
        """Where it is scored."""
        return self.images.labels.device

    def at(self, steps: int) -> Subject:
        """The same, scored after so many fine-tuning steps."""
        return replace(self, fidelity=replace(self.fidelity, steps=steps))

    def score(self) -> None:
        """Do what is measured."""
        candidate = Candidate(
            dense=self.dense,
            tracing=self.tracing,
            keep=self.keep,
            search_train=self.images,
            held_out=self.images,
            fidelity=self.fidelity,
            recipe=self.recipe,
            seed=(0, 0),
            compute=self.compute,
        )
        score(candidate)

    def extracted(self) -> nn.Module:
        """The network that the mask leaves over, laid out as in a score."""
        network = extract(self.dense, self.tracing, self.keep)
        lay_out(network, self.compute)
        return network

    def batches(self) -> Batches:
        """Gather, augment and normalise all batches of a score."""
        images, size, steps = self.images, self.recipe.batch_size, self.fidelity.steps
        epochs = (images.training_batches(size, seed=0, epoch=epoch) for epoch in count())
        return Batches(
            training=list(islice(chain.from_iterable(epochs), steps)),
            recalibration=self._first(self.fidelity.recalibrate_images, RECALIBRATION_BATCH),
            scoring=self._first(self.fidelity.score_images, self.compute.scoring_batch),
        )

    def _first(self, num_images: int, batch_size: int) -> list[Batch]:
        rows = np.arange(min(num_images, len(self.images)))
        return list(self.images.batches(batch_size, rows))


@dataclass(frozen=True, kw_only=True)
class Batches:
    """The tensors that the passes of a score are done on."""

    training: list[Batch]
    recalibration: list[Batch]
    scoring: list[Batch]

    @property
    def rows(self) -> int:
        """Of the largest batch."""
        every = [*self.training, *self.recalibration, *self.scoring]
        return max(len(labels) for _, labels in every)


def make_subject(name: str, plan: Plan) -> Subject:
    """A network with random weights, on random images.

    Args:
        name: A CIFAR network (32 x 32), or torchvision's ``resnet50`` (224 x 224).
        plan: How it is scored; its steps play no part.
    """
    size, fewer = (_LARGE, _FEWER) if name == "resnet50" else (_SMALL, 1)
    fidelity = Fidelity(
        steps=0,
        recalibrate_images=plan.recalibrate_images // fewer,
        score_images=plan.score_images // fewer,
    )
    recipe = Recipe(batch_size=plan.batch_size // fewer, distillation_weight=0.0)  # as scores
    dense = _network(name)
    padded = name.startswith("resnet") and name != "resnet50" and not name.endswith("_b")
    ignore = ("conv1",) if padded else ()  # Torch-Pruning cannot cut a padded residual stream
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is left whole, is left whole
        tracing = trace(dense, torch.zeros(1, 3, size, size), ignore=ignore)
    space = tracing.space.with_limits(min_keep=0.1)
    priority = uniform_priority(space, importance(dense, tracing, "l1"))
    num_images = max(fidelity.recalibrate_images, fidelity.score_images, 8 * recipe.batch_size)
    dataset = random_dataset(num_images, size)
    return Subject(
        name=name,
        dense=dense.to(plan.device),
        tracing=tracing,
        keep=Budget.from_cut(space, MACS_CUT).fill(priority),
        images=open_images(dataset.train, None, dataset, plan.device),
        dataset=dataset,
        fidelity=fidelity,
        recipe=recipe,
        compute=plan.compute,
    )


def _network(name: str) -> nn.Module:
    if name != "resnet50":
        return build_network(name, 10).eval()
    from torchvision.models import resnet50

    network: nn.Module = resnet50(num_classes=10)
    return network.eval()


def random_dataset(num_images: int, size: int) -> Dataset:
    """Return square images of noise in ten classes; some of them are the test set too.

    Args:
        num_images: Number of training images.
        size: Height and width in pixels.
    """
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (num_images, size, size, 3), dtype=np.uint8)
    labels = np.arange(num_images) % 10
    return Dataset(
        name="random images",
        train=ImageArrays(pixels, labels),
        test=ImageArrays(pixels[:_TEST], labels[:_TEST]),
        num_classes=10,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        augmentation=Augmentation(padding=4, flip=True),
    )
