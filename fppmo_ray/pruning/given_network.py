"""The network inside of what a caller gives as one."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

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
    _refuse_torchscript(network)
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"network must be a torch.nn.Module, got {type(network).__name__}; {_WAY_OUT}"
        )
    inner: nn.Module = opened(network)
    if any(parameter.dtype in _HALVES for parameter in inner.parameters()):
        logger.info("the network has half precision; it is pruned and handed out in float32")
        return copy.deepcopy(inner).float()
    return inner


def check_traceable(model: Any) -> None:
    """Raise a ValueError for what is no network, or one whose weights cannot be replaced."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a network as a torch.nn.Module, got {type(model).__name__}")
    _refuse_torchscript(model)
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(
                f"{name} of the network has no shape yet; run the network on a batch once, so that "
                "its lazy layers get their weights"
            )
        if tensor.is_meta:
            raise ValueError(
                f"{name} of the network is on the meta device and holds no values; construct the "
                "network on a device with memory and load its weights"
            )


def check_finite(model: nn.Module) -> None:
    """Refuse weights that make every score NaN; other buffers, such as masks, may be infinite."""
    statistics = [item for item in model.named_buffers() if "running_" in item[0]]
    for name, tensor in [*model.named_parameters(), *statistics]:
        if not tensor.is_floating_point() or tensor.sum().isfinite():  # no bad value is lost in it
            continue
        num_bad = int((~torch.isfinite(tensor)).sum())
        if num_bad:
            raise ValueError(
                f"{name} of the network holds {num_bad} values of {tensor.numel()} that are NaN or "
                "infinite; load weights of a training that has not diverged"
            )


def _refuse_torchscript(network: Any) -> None:
    """Raise a ValueError if a network is TorchScript."""
    if isinstance(network, torch.jit.ScriptModule):
        raise ValueError(
            "network is TorchScript, whose layers cannot be replaced; give the network that it was "
            "made of"
        )
