"""Where a pruned network's features can be compared with the dense network's."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from fppmo_ray.distribution.space import BoolArray
from fppmo_ray.pruning.extract import Tracing
from fppmo_ray.training.compute import in_mode
from fppmo_ray.training.feature_match import FeatureMatch


def last_feature_match(
    pruned: nn.Module, dense: nn.Module, tracing: Tracing, keep: BoolArray | None, *inputs: Tensor
) -> list[FeatureMatch]:
    """The last feature map before the network's answer, as a place to compare.

    Among all modules, blocks included, it is the output of the one that ends last and makes a map
    of more than one pixel; in a ResNet, the last block's output.

    Args:
        pruned: ``extract(dense, tracing, keep)``, with any weights.
        dense: The traced network.
        tracing: Its tracing.
        keep: The mask, ``(num_filters,)``, True = kept; None: nothing was removed.
        *inputs: The forward's inputs for a batch of one image, on the networks' device.

    Returns:
        One match; none where there is no such map, or its channels cannot be told apart.
    """
    maps = _feature_maps(dense, inputs)
    if not maps:
        return []
    name, channels = maps[-1]
    left = dict(_feature_maps(pruned, inputs))[name]
    if keep is None or left == channels:
        return [FeatureMatch(module=name)]
    # The map's channels are those of the last layer before it that makes as many.
    kept = tracing.kept_indices(keep)
    names = [module for module, _ in maps]
    for layer in reversed(names):
        for part in tracing.slices:
            fits = part.layer == layer and part.side != "input" and len(part.units) == channels
            indices = kept.get((part.tensor, part.axis)) if fits else None
            if indices is not None and len(indices) == left:
                return [FeatureMatch(module=name, channels=np.asarray(indices))]
    return []


@torch.no_grad()
def _feature_maps(network: nn.Module, inputs: Sequence[Tensor]) -> list[tuple[str, int]]:
    """Modules that make maps of more than one pixel, with their channels, in order of their end."""
    found: list[tuple[str, int, Tensor]] = []

    def note(name: str, module: nn.Module, args: object, output: object) -> None:
        if isinstance(output, Tensor) and output.dim() > 2 and output[0, 0].numel() > 1:
            found.append((name, output.shape[1], output))

    with in_mode(network, training=False), ExitStack() as hooks:
        for name, module in network.named_modules():
            if name:
                handle = module.register_forward_hook(partial(note, name))
                hooks.callback(handle.remove)
        answer = network(*inputs)
    return [(name, channels) for name, channels, output in found if output is not answer]
