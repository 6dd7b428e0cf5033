"""The inputs of a network without labels, in batches or on one device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fppmo_ray.training.dataset import IntArray
from fppmo_ray.training.device import copy_to
from fppmo_ray.training.images import Seed, derive_seed


def inputs_of(batch: Any, num_inputs: int = 1) -> tuple[Tensor, ...]:
    """Return the network's inputs at the beginning of a batch.

    Args:
        batch: A tensor, or a tuple that begins with the inputs, such as images and labels.
        num_inputs: How many tensors the network's forward takes.
    """
    return (batch,) if isinstance(batch, Tensor) else tuple(batch[:num_inputs])


@dataclass(frozen=True, eq=False)
class Inputs:
    """Unlabelled inputs of a network on one device, made by ``collect_inputs``."""

    tensors: tuple[Tensor, ...]
    """One tensor for each input of the forward, all of the same length."""

    def __len__(self) -> int:
        return len(self.tensors[0])

    def at(self, positions: IntArray) -> Inputs:
        """Return a copy of some of the inputs.

        Args:
            positions: Their positions, in [0, len).
        """
        rows = copy_to(self.tensors[0].device, torch.from_numpy(positions))
        return Inputs(tuple(tensor[rows] for tensor in self.tensors))

    def batches(
        self, batch_size: int, positions: IntArray | None = None
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yield inputs once, in order; the last batch may be smaller.

        Args:
            batch_size: Inputs per batch, >= 1.
            positions: Positions of the inputs to serve, in [0, len); None serves all.
        """
        served = self if positions is None else self.at(positions)
        return zip(*(torch.split(tensor, batch_size) for tensor in served.tensors), strict=True)

    def training_batches(
        self, batch_size: int, *, seed: Seed, epoch: int
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yield one epoch of shuffled batches of equal size; fewer inputs make a single batch.

        Args:
            batch_size: Inputs per batch, >= 1.
            seed: Random seed of the order.
            epoch: Number of the epoch, counted from 0.
        """
        generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
        served = max(1, len(self) // batch_size) * batch_size
        order = torch.randperm(len(self), generator=generator)[:served]
        return self.batches(batch_size, order.numpy())


def checked_batches(
    batches: Iterable[Any], examples: Sequence[Tensor], device: torch.device | str = "cpu"
) -> Iterator[tuple[tuple[Tensor, ...], Any]]:
    """Yield the network's inputs of each batch on a device, and what follows them; else None.

    Args:
        batches: Each a tensor, or a tuple that begins with the network's inputs.
        examples: An example of each input of the forward, with a batch axis.
        device: The device.

    Raises:
        ValueError: there is no batch, or one is not like the examples.
    """
    is_empty = True
    for batch in batches:
        is_empty, several = False, isinstance(batch, Tensor | tuple | list)
        inputs = inputs_of(batch, len(examples)) if several else (batch,)
        _check_batch(inputs, examples)
        rest = None if isinstance(batch, Tensor) else next(iter(batch[len(examples) :]), None)
        yield tuple(tensor.to(device) for tensor in inputs), rest
    if is_empty:
        raise ValueError("expected batches of images without labels, got none; give 100 or more")


def collect_inputs(
    batches: Iterable[Any], examples: Sequence[Tensor], device: torch.device | str = "cpu"
) -> Inputs:
    """Return all inputs of some batches on one device.

    Args:
        batches: Each a tensor, or a tuple that begins with the network's inputs.
        examples: An example of each input of the forward, with a batch axis.
        device: The device.

    Raises:
        ValueError: there is no batch, or one is not like the examples or like the first batch.
    """
    found: list[tuple[Tensor, ...]] = []
    for inputs, _ in checked_batches(batches, examples, device):
        expected, shapes = ([tuple(x.shape) for x in one] for one in ((*found, inputs)[0], inputs))
        if any(mine[1:] != first[1:] for mine, first in zip(shapes, expected, strict=True)):
            raise ValueError(
                f"all images must have the shape of those in the first batch, {expected}, got "
                f"{shapes}; crop or resize them"
            )
        found.append(inputs)
    return Inputs(tuple(torch.cat(column) for column in zip(*found, strict=True)))


def _check_batch(inputs: Sequence[Any], examples: Sequence[Tensor]) -> None:
    """Refuse a batch that the network cannot take."""
    tensors = [item for item in inputs if isinstance(item, Tensor)]
    shapes = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in inputs]
    fits = len(tensors) == len(examples) and all(
        tensor.dim() == example.dim() and len(tensor) == len(tensors[0]) > 0
        for tensor, example in zip(tensors, examples, strict=True)
    )
    if not fits:
        wanted = [tuple(example.shape) for example in examples]
        raise ValueError(
            "batches of images must begin with the network's inputs, tensors with a batch axis "
            f"like the example inputs of shape {wanted}, got {shapes}"
        )
