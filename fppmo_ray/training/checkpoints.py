"""Weights and training states in files, loaded without running any code in them."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from fppmo_ray.durable_files import write_whole
from fppmo_ray.training.compute import ComputeConfig
from fppmo_ray.training.images import Seed
from fppmo_ray.training.recipe import Recipe

_WRAPPERS = ("state_dict", "model", "net")
_DIGEST_BYTES = 64  # of SHA-256, in hexadecimal
_NUM_NAMED = 3  # tensors that an error message lists; it counts the rest


def load_weights(network: nn.Module, path: Path) -> None:
    """Load a published checkpoint into a network, in place; all tensors must fit.

    The file holds a state dict, or a dict with one under ``state_dict``, ``model`` or ``net``. A
    ``module.`` prefix (left by DataParallel) is dropped. Batch-norm step counters may be missing:
    files from before torch 0.4.1 lack them.

    Args:
        network: The network that receives the weights.
        path: File written by ``torch.save``, or a ``.safetensors`` file.

    Raises:
        ValueError: the file is missing, corrupt or truncated, holds anything but tensors, or
            belongs to another network.
    """
    assign_weights(network, _state_dict(path), str(path))


def assign_weights(network: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy a state dict into a network, in place; all tensors must fit.

    Args:
        network: The network that receives the weights.
        weights: Tensors by name.
        source: Where the weights come from, for the error message.

    Raises:
        ValueError: the weights belong to another network; the message lists the first mismatches.
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
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is no file of plain tensors: it is corrupt, or holds a whole pickled module; "
            "save network.state_dict() with torch.save"
        ) from error
    # On bytes that are no checkpoint, torch.load raises any of these.
    except (
        *(RuntimeError, OSError, EOFError, ValueError, LookupError),
        *(TypeError, AttributeError),
    ) as error:
        raise ValueError(f"{path} is corrupt or truncated; fetch or save it again") from error


def _read_safetensors(path: Path) -> object:
    try:
        safetensors: Any = import_module("safetensors")
        return import_module("safetensors.torch").load_file(path)
    except ImportError as error:
        raise ValueError(
            f"{path} needs the package safetensors; pip install 'fppmo-ray[export]' has it"
        ) from error
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is corrupt or truncated; fetch or save it again") from error


def _first(names: list[str]) -> str:
    shown = ", ".join(names[:_NUM_NAMED])
    rest = len(names) - _NUM_NAMED
    return f"{shown} and {rest} more" if rest > 0 else shown


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingState:
    """Everything that the next epoch depends on besides images, recipe and seed."""

    network: dict[str, Tensor]
    """State dict of the network, on the CPU."""
    momentum: dict[str, Tensor]
    """SGD's momentum buffer of each trained parameter, on the CPU; empty before the first step."""
    epochs_done: int
    """Number of epochs trained so far."""


def capture(network: nn.Module, optimizer: SGD | None, epochs_done: int) -> TrainingState:
    """Return a copy of a training's present state; later training does not change it.

    Args:
        network: The trained network.
        optimizer: The network's optimizer; None leaves the momentum empty.
        epochs_done: Number of epochs trained so far.
    """
    buffers = optimizer.state if optimizer is not None else {}
    return TrainingState(
        network={name: _copy(value) for name, value in network.state_dict().items()},
        momentum={
            name: _copy(buffers[parameter]["momentum_buffer"])
            for name, parameter in network.named_parameters()
            if parameter in buffers
        },
        epochs_done=epochs_done,
    )


def restore(state: TrainingState, network: nn.Module, optimizer: SGD | None = None) -> None:
    """Copy a state into a network and its optimizer, in place.

    Args:
        state: State of a training of an equal network.
        network: Receives weights and buffers.
        optimizer: Receives the momentum; None restores the network alone.

    Raises:
        ValueError: the state belongs to another network.
    """
    assign_weights(network, state.network, "the training state")
    if optimizer is None:
        return
    optimizer.state.clear()  # a state before the first step has no momentum
    for name, parameter in network.named_parameters():
        if name in state.momentum:
            momentum = torch.empty_like(parameter).copy_(state.momentum[name])
            optimizer.state[parameter]["momentum_buffer"] = momentum


def state_to_bytes(state: TrainingState) -> bytes:
    """Return the content of a file that ``torch.load(weights_only=True)`` reads."""
    return _to_bytes(_as_dict(state))


def state_from_bytes(content: bytes) -> TrainingState:
    """Return the state that ``state_to_bytes`` wrote.

    Raises:
        ValueError: the bytes hold no training state.
    """
    return _from_dict(_from_bytes(content, "the training state"), "the training state")


def training_identity(recipe: Recipe, compute: ComputeConfig, seed: Seed) -> dict[str, Any]:
    """Return the settings that distinguish one training of a network from another, as plain values.

    Args:
        recipe: Recipe of the training.
        compute: How its passes are computed.
        seed: Its random seed.
    """
    seeds = [seed] if isinstance(seed, int) else list(seed)
    return {**asdict(recipe), **asdict(compute), "seed": seeds}


def write_checkpoint(path: Path, state: TrainingState, run: Mapping[str, Any]) -> None:
    """Replace a checkpoint file atomically, so that it is complete at every moment.

    Args:
        path: The checkpoint file.
        state: The state to write.
        run: The training's identity, from ``training_identity``.
    """
    content = _to_bytes({**_as_dict(state), "run": dict(run)})
    # A zip file ends with a comment and, before it, its length: torch.load reads the file as ever.
    sealed = content[:-2] + _DIGEST_BYTES.to_bytes(2, "little")
    write_whole(path, sealed + _digest(sealed))


def read_checkpoint(path: Path, run: Mapping[str, Any]) -> TrainingState | None:
    """Return the state in a checkpoint file, or None where there is no file.

    Args:
        path: The checkpoint file.
        run: The identity that the file's training must have, from ``training_identity``.

    Raises:
        ValueError: the file is corrupt, or was written by another training.
    """
    if not path.is_file():
        return None
    sealed = path.read_bytes()
    if _digest(sealed[:-_DIGEST_BYTES]) != sealed[-_DIGEST_BYTES:]:
        raise ValueError(f"{path} is corrupt or truncated; delete it to start anew")
    content = _from_bytes(sealed, str(path))
    state = _from_dict(content, str(path))
    stored = content.get("run", {})
    differing = [name for name in run if stored.get(name) != run[name]]
    if differing:
        name = differing[0]
        raise ValueError(
            f"{path} belongs to another training run: its {name} is {stored.get(name)}, this "
            f"run's is {run[name]}; use another checkpoint file or delete this one"
        )
    return state


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _as_dict(state: TrainingState) -> dict[str, Any]:
    return {
        "network": state.network,
        "momentum": state.momentum,
        "epochs_done": state.epochs_done,
    }


def _from_dict(content: dict[str, Any], source: str) -> TrainingState:
    try:
        return TrainingState(
            network=content["network"],
            momentum=content["momentum"],
            epochs_done=content["epochs_done"],
        )
    except KeyError as error:
        raise ValueError(
            f"{source} lacks {error}; it is no checkpoint of a training run"
        ) from error


def _to_bytes(content: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _from_bytes(content: bytes, source: str) -> dict[str, Any]:
    try:
        loaded = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    # On bytes that are no checkpoint, torch.load raises any of these.
    except (
        *(pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError),
        *(TypeError, AttributeError),
    ) as error:
        raise ValueError(f"{source} is corrupt or truncated; delete it to start anew") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{source} holds a {type(loaded).__name__}, expected a training state")
    return loaded
