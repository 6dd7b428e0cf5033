"""The inverse of extraction: a smaller network's tensors in the shapes of the dense network."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fppmo_ray.distribution.space import BoolArray, IntArray
from fppmo_ray.pruning.extract import Axis, Tracing, check_axes, named_tensors


@torch.no_grad()
def scatter(smaller: nn.Module, dense: nn.Module, tracing: Tracing, keep: BoolArray) -> None:
    """Write a smaller network's tensors to their positions in the dense network, in place.

    Removed filters become 0, so in eval mode the dense network computes the same as the smaller
    one. ``extract`` with the same mask returns the smaller network's tensors bit for bit.

    Args:
        smaller: ``extract(dense, tracing, keep)``, fine-tuned or not.
        dense: The traced network, or another of the same architecture, on the same device.
        tracing: What ``trace`` returned for it.
        keep: The mask, bool ``(num_filters,)``, True = kept.

    Raises:
        ValueError: the mask does not fit the space, or a network does not fit the mask.
    """
    kept = tracing.kept_indices(keep)
    lengths = tracing.axis_lengths
    check_axes(dense, lengths)
    check_axes(smaller, {axis: len(kept.get(axis, range(n))) for axis, n in lengths.items()})
    sources = named_tensors(smaller)
    for name, target in named_tensors(dense).items():
        target.zero_()
        target[_places(name, target, kept)] = sources[name].to(target.dtype)


def _places(name: str, target: Tensor, kept: Mapping[Axis, IntArray]) -> tuple[Tensor, ...]:
    """Indices of the smaller tensor within the dense one, one per axis, ready to broadcast."""
    places = []
    for axis, length in enumerate(target.shape):
        positions = kept.get((name, axis))
        index = torch.arange(length) if positions is None else torch.from_numpy(positions)
        shape = [-1 if i == axis else 1 for i in range(target.dim())]
        places.append(index.to(target.device).reshape(shape))
    return tuple(places)
