"""Compare the feature maps of two networks in a loss.

A network's answers say little per image, its feature maps say much: where both networks have the
same channels, theirs are compared position by position, which is thousands of numbers per image
(as FitNets, 1412.6550, and, for pruned networks and few images, PRACTISE, 2202.07861, do).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from fppmo_ray.training.dataset import IntArray
from fppmo_ray.training.device import copy_to


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureMatch:
    """A place where the features of both networks are compared."""

    module: str
    """Name of the module whose output it is, in both networks."""
    channels: IntArray | None = None
    """Channels of the teacher's output, along axis 1, that the student has; None: all."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureComparison:
    """Feature matches, ready for many steps on one device."""

    matches: tuple[FeatureMatch, ...]
    channels: tuple[Tensor | None, ...]
    """By match: its channels on the device."""

    @contextmanager
    def outputs_of(self, network: nn.Module) -> Iterator[dict[str, Tensor]]:
        """Yield a dict that holds, after a forward pass, the compared outputs by module.

        Args:
            network: One of the two networks, or its wrapper for several processes.
        """
        outputs: dict[str, Tensor] = {}

        def keep(name: str, module: nn.Module, args: object, output: Tensor) -> None:
            outputs[name] = output

        inner = network.module if isinstance(network, DistributedDataParallel) else network
        with ExitStack() as hooks:
            for match in self.matches:
                module = inner.get_submodule(match.module)
                handle = module.register_forward_hook(partial(keep, match.module))
                hooks.callback(handle.remove)
            yield outputs

    def error(self, features: Mapping[str, Tensor], wished: Mapping[str, Tensor]) -> Tensor | float:
        """Return the mean over the matches of the relative errors; 0 where there are none.

        Args:
            features: The student's outputs, by module.
            wished: The teacher's, by module.
        """
        total: Tensor | float = 0.0
        for match, channels in zip(self.matches, self.channels, strict=True):
            target = wished[match.module]
            if channels is not None:
                target = target[:, channels]
            error = relative_error(features[match.module].float(), target.float())
            total = total + error / len(self.matches)
        return total


def compare_on(matches: Sequence[FeatureMatch], device: torch.device) -> FeatureComparison:
    """Put feature matches on a device.

    Args:
        matches: Where features are compared; none: nowhere.
        device: The device of both networks.
    """
    return FeatureComparison(
        matches=tuple(matches),
        channels=tuple(
            None if match.channels is None else copy_to(device, torch.from_numpy(match.channels))
            for match in matches
        ),
    )


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Return the squared error over the variance of the target; a scalar.

    Args:
        output: Any tensor.
        target: A tensor of the same shape.
    """
    variance = target.var(correction=0)
    return F.mse_loss(output, target) / torch.where(variance > 0, variance, 1.0)
