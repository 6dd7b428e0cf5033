"""Inputs that the caller's own code has prepared, in memory or item by item."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fppmo_ray.training.dataset import IntArray, PreparedInputs
from fppmo_ray.training.device import copy_to

_INPUT_KEYS = ("pixel_values", "image", "img", "input", "inputs", "x")
_MAX_KEPT = 2 * 1024**3  # bytes, as of image folders that are decoded into memory
_LABEL_KEYS = ("label", "labels", "fine_label", "target", "y")


def split_item(item: Any, place: str) -> tuple[Any, Any]:
    """Return the input and the label of an item; None where it has no label.

    Args:
        item: An input, a tuple (input, label), or a mapping with such entries.
        place: Where the item comes from, for the error message.

    Raises:
        ValueError: the item is something else.
    """
    if isinstance(item, Mapping):
        inputs = [item[key] for key in _INPUT_KEYS if key in item]
        labels = [item[key] for key in _LABEL_KEYS if key in item]
        if not inputs:
            raise ValueError(
                f"{place} must have one of the entries {', '.join(_INPUT_KEYS)}, got "
                f"{', '.join(map(str, item))}; rename the column of the input"
            )
        return inputs[0], labels[0] if labels else None
    if isinstance(item, tuple | list):
        if len(item) not in (1, 2):
            raise ValueError(
                f"{place} must be an input or a pair (input, label), got {len(item)} entries; for "
                "other tasks give a FunctionTask"
            )
        return item[0], item[1] if len(item) == 2 else None
    return item, None


def to_input(value: Any, place: str) -> Tensor:
    """Return an input as float32 on the CPU.

    Args:
        value: A tensor or an array of floats, without a batch axis.
        place: Where it comes from, for the error message.

    Raises:
        ValueError: it is something else.
    """
    tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = str(tensor.dtype) if isinstance(tensor, Tensor) else type(value).__name__
        raise ValueError(
            f"the input of {place} must be a tensor of floats, prepared as the network expects it, "
            f"got {got}; add a transform to the data set (ToTensor and Normalize)"
        )
    return tensor.detach().to("cpu", torch.float32)


class KeptArrays:
    """Arrays that are made when they are first asked for, and then stay in memory.

    Args:
        shape: Number of arrays, then their shape.
        dtype: Their type.
    """

    def __init__(self, shape: Sequence[int], dtype: type[np.generic]) -> None:
        self._arrays = np.empty(shape, dtype)  # takes up memory as it is written to
        self._is_made = np.zeros(len(self._arrays), dtype=bool)

    def get(self, position: int, make: Callable[[int], Any]) -> Any:
        """Return the array at a position; several threads may ask for the same one.

        Args:
            position: Its place.
            make: Returns the array of a position, always the same.
        """
        if not self._is_made[position]:
            self._arrays[position] = make(position)
            self._is_made[position] = True
        return self._arrays[position]


def kept_arrays(shape: Sequence[int], dtype: type[np.generic]) -> KeptArrays | None:
    """Return room for arrays, or None if they would take more than 2 GiB.

    Args:
        shape: Number of arrays, then their shape.
        dtype: Their type.
    """
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    return KeptArrays(shape, dtype) if num_bytes <= _MAX_KEPT else None


@dataclass(frozen=True, eq=False)
class ItemStream:
    """Batches of items that a map-style data set prepares one after the other, in this process.

    What is random about an item follows from a seed for the item, so that batches do not depend on
    what was drawn before.
    """

    inputs: PreparedInputs
    """The items."""
    device: torch.device
    """Device on which the batches are needed."""
    kept: KeptArrays | None = None
    """What ``stream`` has prepared; None: it prepares every item again."""

    @property
    def num_channels(self) -> int:
        """Length of an input's first axis."""
        return self.inputs.shape[0]

    def stream(self, order: Tensor, batch_size: int) -> Iterator[Tensor]:
        """Yield batches of inputs; see ``PixelSource.stream``.

        Args:
            order: Positions of the items, int64 on the CPU.
            batch_size: Items per batch; the last batch may be smaller.
        """
        if self.kept is None:
            yield from self.stream_seeded(order, order, batch_size)
            return
        for part in torch.split(order, batch_size):
            with _generators_restored():
                arrays = [self.kept.get(position, self._prepared) for position in part.tolist()]
            yield copy_to(self.device, torch.from_numpy(np.stack(arrays)))

    def _prepared(self, position: int) -> np.ndarray[Any, Any]:
        return self._read(position, position).numpy()

    def stream_seeded(self, order: Tensor, seeds: Tensor, batch_size: int) -> Iterator[Tensor]:
        """Yield batches of inputs, each item prepared with its own seed.

        Args:
            order: Positions of the items, int64 on the CPU.
            seeds: Random seed of each item, int64 on the CPU.
            batch_size: Items per batch; the last batch may be smaller.
        """
        for part in torch.split(torch.stack([order, seeds], dim=1), batch_size):
            with _generators_restored():
                batch = torch.stack([self._read(*job) for job in part.tolist()])
            yield copy_to(self.device, batch)

    def _read(self, position: int, seed: int) -> Tensor:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 (what transforms draw from)
        place = f"item {position}"
        value = to_input(split_item(self.inputs.items[position], place)[0], place)
        if tuple(value.shape) != self.inputs.shape:
            raise ValueError(
                f"{place} of the data set has shape {tuple(value.shape)}, the first one "
                f"{self.inputs.shape}; crop or resize all items to one size"
            )
        return value


@contextmanager
def _generators_restored() -> Iterator[None]:
    """Give torch, Python and numpy their random states back at the end of the block."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002


@dataclass(frozen=True, eq=False)
class Rows(Sequence[Any]):
    """Some rows of a sequence, read when they are asked for."""

    source: Any
    """Something with ``__getitem__`` for integers."""
    rows: Sequence[int] | IntArray
    """Row numbers in the source."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: Any) -> Any:
        return self.source[int(self.rows[position])]

    def blocks(self, positions: IntArray) -> IntArray | None:
        """Return the number of the block that each position is read with; None: single items.

        Args:
            positions: Positions in these rows.
        """
        blocks = getattr(self.source, "blocks", None)
        found: IntArray | None = None
        if blocks is not None:
            found = blocks(np.asarray(self.rows, dtype=np.int64)[positions])
        return found


def shuffled_by_blocks(blocks: IntArray, window: int, rng: np.random.Generator) -> IntArray:
    """Return positions in an order that reads a few blocks at a time, each of them once.

    Args:
        blocks: Block of every position, ``(n,)``.
        window: Number of blocks whose positions are shuffled among each other.
        rng: Source of randomness.
    """
    order = rng.permutation(np.unique(blocks))
    place = np.empty(order.max() + 1, dtype=np.int64)
    place[order] = np.arange(len(order)) // window
    # Random keys sort the positions of a window.
    positions: IntArray = np.lexsort((rng.random(len(blocks)), place[blocks]))
    return positions
