"""The dense network on a worker's device, and what is made of it."""

from __future__ import annotations

import copy
import io

import torch
from torch import nn

from fppmo_ray.distribution import BoolArray
from fppmo_ray.pruning import Tracing, extract
from fppmo_ray.service.weights import load_arrays
from fppmo_ray.service.workers.assignments import Basis
from fppmo_ray.training import ComputeConfig, TrainingState


class DenseNetwork:
    """A worker's copy of the dense network; it keeps the weights that it was given last.

    ``network`` is in eval mode, on the device.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.network = copy.deepcopy(network).to(device).eval()
        self._round: int | None = None

    def on(self, basis: Basis) -> nn.Module:
        """The network with a round's weights, with torch's threads set as configured."""
        torch.set_num_threads(basis.compute.threads)
        if self._round != basis.round:
            load_arrays(self.network, basis.arrays)
            self.network.eval()
            self._round = basis.round
        return self.network

    def timed_on(self, compute: ComputeConfig) -> nn.Module:
        """The network with its present weights, with torch's threads set as configured."""
        torch.set_num_threads(compute.threads)
        return self.network


def own_network(
    dense: nn.Module, tracing: Tracing, keep: BoolArray | None, state: TrainingState | None = None
) -> nn.Module:
    """A network that shares nothing with the dense one.

    Args:
        dense: Left as it is.
        tracing: Of it.
        keep: The mask that it is cut by; None: it stays dense.
        state: Of a training, whose weights it takes; None: those of the dense network.
    """
    network = copy.deepcopy(dense) if keep is None else extract(dense, tracing, keep)
    if state is not None:
        network.load_state_dict(state.network)
    return network


def saved_bytes(network: nn.Module) -> int:
    """Size of a network's state dict, saved."""
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    return buffer.tell()
