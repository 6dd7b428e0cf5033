"""The dense network on a worker's device."""

from __future__ import annotations

import copy
import io

import torch
from torch import nn

from fppmo_ray.service.assignments import Basis
from fppmo_ray.service.weights import load_arrays
from fppmo_ray.training import Engine


class DenseNetwork:
    """A worker's copy of the dense network; it keeps the weights that it was given last.

    ``network`` is in eval mode, on the device.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.network = copy.deepcopy(network).to(device).eval()
        self._round: int | None = None

    def on(self, basis: Basis) -> nn.Module:
        """The network with a round's weights, and torch with its engine's threads."""
        torch.set_num_threads(basis.engine.threads)
        if self._round != basis.round:
            load_arrays(self.network, basis.arrays)
            self.network.eval()
            self._round = basis.round
        return self.network

    def timed_on(self, engine: Engine) -> nn.Module:
        """The network with whatever weights it has, and torch with an engine's threads."""
        torch.set_num_threads(engine.threads)
        return self.network


def saved_bytes(network: nn.Module) -> int:
    """Size of a network's state dict, saved."""
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    return buffer.tell()
