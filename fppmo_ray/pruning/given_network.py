"""The network inside of what a caller gives as one."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fppmo_ray.pruning.network_io import opened

logger = logging.getLogger(__name__)

_HALVES = (torch.float16, torch.bfloat16)
_WAY_OUT = (
    "construct the network, load its weights with fppmo_ray.training.load_weights(network, path) "
    "or network.load_state_dict(...), and give the network"
)


def plain_network(network: Any) -> nn.Module:
    """Return the module that computes, in float32, without wrappers such as DataParallel.

    Args:
        network: A network, perhaps wrapped; left as it is.

    Raises:
        ValueError: it is a path, a state dict, a class, TorchScript, or no network at all.
    """
    if isinstance(network, str | Path):
        raise ValueError(f"network must be a torch.nn.Module, got the path {network}; {_WAY_OUT}")
    if isinstance(network, Mapping):
        raise ValueError(
            f"network must be a torch.nn.Module, got a dict of {len(network)} entries, probably a "
            f"state dict; {_WAY_OUT}"
        )
    if isinstance(network, type) or (callable(network) and not isinstance(network, nn.Module)):
        name = getattr(network, "__name__", type(network).__name__)
        raise ValueError(
            f"network must be a torch.nn.Module, got the class or function {name}; call it: "
            f"{name}()"
        )
    if isinstance(network, torch.jit.ScriptModule):
        raise ValueError(
            "network is TorchScript, whose layers cannot be replaced; give the network that it was "
            "made of"
        )
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"network must be a torch.nn.Module, got {type(network).__name__}; {_WAY_OUT}"
        )
    inner: nn.Module = opened(network)
    if any(parameter.dtype in _HALVES for parameter in inner.parameters()):
        logger.info("the network has half precision; it is pruned and handed out in float32")
        return copy.deepcopy(inner).float()
    return inner
