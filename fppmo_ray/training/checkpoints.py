"""Weights from files in the layouts people publish, loaded without running anything in them."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

_WRAPPERS = ("state_dict", "model", "net")
_NUM_NAMED = 3  # tensors named in an error; the rest is counted


def load_weights(network: nn.Module, path: Path) -> None:
    """Load a checkpoint into ``network``, in place; every tensor must find its place.

    The file is a state dict, or a dict that holds one under ``state_dict``, ``model`` or ``net``;
    a ``module.`` prefix (left by DataParallel) is dropped. Batch-norm step counters may be
    missing: files from before torch 0.4.1 lack them.

    Raises:
        ValueError: the file is missing, corrupt or truncated, holds something else than tensors,
            or belongs to another network.
    """
    assign_weights(network, _state_dict(path), str(path))


def assign_weights(network: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy a state dict into ``network``, in place; every tensor must find its place.

    Raises:
        ValueError: they are another network's; says ``source`` and the first tensors at odds.
    """
    expected = network.state_dict()
    missing = [
        name
        for name in expected
        if name not in weights and not name.endswith(".num_batches_tracked")
    ]
    unexpected = [name for name in weights if name not in expected]
    misshaped = [
        f"{name} {tuple(weight.shape)} instead of {tuple(expected[name].shape)}"
        for name, weight in weights.items()
        if name in expected and weight.shape != expected[name].shape
    ]
    complaints = [
        f"{kind}: {_first(names)}"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshaped),
        )
        if names
    ]
    if complaints:
        raise ValueError(
            f"{source} holds the weights of another network than {type(network).__name__}; "
            f"{'; '.join(complaints)}; choose the network and number of classes it was saved from"
        )
    network.load_state_dict(weights)


def _state_dict(path: Path) -> dict[str, Tensor]:
    content = _read(path)
    if isinstance(content, Mapping):
        content = next((content[key] for key in _WRAPPERS if key in content), content)
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path} holds no state dict; save network.state_dict() with torch.save")
    weights = {str(name).removeprefix("module."): value for name, value in content.items()}
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{path} holds a {type(value).__name__} under {name!r} where a tensor was "
                "expected; save network.state_dict() with torch.save"
            )
    return weights


def _read(path: Path) -> object:
    if not path.is_file():
        raise ValueError(f"there is no file of weights at {path}")
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is no file of plain tensors: it is corrupt, or holds a whole pickled module; "
            "save network.state_dict() with torch.save"
        ) from error
    # What torch.load raises on bytes that are no checkpoint depends on where they break off.
    except (RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is corrupt or truncated; fetch or save it again") from error


def _first(names: list[str]) -> str:
    shown = ", ".join(names[:_NUM_NAMED])
    rest = len(names) - _NUM_NAMED
    return f"{shown} and {rest} more" if rest > 0 else shown
