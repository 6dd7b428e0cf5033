"""Pruned networks on disk: a state dict and a JSON recipe, safe to open, loaded without tracing.

``NAME.pt`` holds the tensors and is read with ``weights_only=True``. ``NAME.json`` lists the
indices of the dense network that were kept along every tensor axis, its constructor, and what the
network expects and answers.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fppmo_ray.distribution.space import BoolArray, IntArray
from fppmo_ray.durable_files import write_whole
from fppmo_ray.pruning.copying import with_plain_weights
from fppmo_ray.pruning.dependency.sizes import module_numbers
from fppmo_ray.pruning.extract import Axis, Tracing, check_axes, select
from fppmo_ray.pruning.network_io import opened
from fppmo_ray.training import Interface, interface_from_json

_FORMAT = 2
_SAFETENSORS = ".safetensors"
TRUSTED_MODULES = ("fppmo_ray.training.networks", "torchvision.models", "timm")
"""Modules whose functions a recipe may name as the constructor of its network."""
_TIMM_ARGUMENTS = {"model_name", "num_classes"}  # others name files and repositories to load


def save_network(
    network: nn.Module,
    path: str | Path,
    *,
    tracing: Tracing,
    keep: BoolArray,
    source: Mapping[str, Any] | None = None,
    interface: Interface | None = None,
) -> Path:
    """Write a pruned network as ``path``.pt and ``path``.json, each atomically.

    Args:
        network: ``extract(dense, tracing, keep)``, fine-tuned or not.
        path: File name without suffix; its folder is created.
        tracing: What ``trace`` returned for the dense network.
        keep: The mask, ``(num_filters,)``, True = kept.
        source: Constructor of the dense network: ``{"constructor":
            "fppmo_ray.training.networks:resnet56", "arguments": {...}}``. Without it,
            ``load_network`` must be given a constructor.
        interface: Preprocessing and class names, which the JSON file then carries.

    Returns:
        The path of the JSON file, for ``load_network``.

    Raises:
        ValueError: the network is not that of the mask.
    """
    kept = tracing.kept_indices(keep)
    check_axes(
        network, {axis: len(kept.get(axis, range(n))) for axis, n in tracing.axis_lengths.items()}
    )
    stem = Path(path)
    stem.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    state = network.state_dict()
    for name, tensor in state.items():
        if isinstance(tensor, torch.Tensor):  # a module may keep other things beside
            state[name] = tensor.cpu()  # in place: the state carries its modules' versions
    torch.save(state, buffer)
    weights = buffer.getvalue()
    recipe = {
        "format": _FORMAT,
        "weights": f"{stem.name}.pt",
        "sha256": hashlib.sha256(weights).hexdigest(),
        "source": dict(source or {}),
        "interface": (interface or Interface()).to_json(),
        "macs": tracing.space.macs(keep),
        "dense_macs": tracing.space.dense_macs,
        "kept_channels": _kept_channels(tracing, kept),
        "axes": _axes_to_json(tracing, kept),
        "numbers": [[*number, n] for number, n in tracing.widths_of_numbers(keep).items()],
    }
    write_whole(_with_suffix(stem, ".pt"), weights)
    recipe_path = _with_suffix(stem, ".json")
    _write_recipe(recipe_path, recipe)
    return recipe_path


def write_safetensors(recipe_path: Path, folder: Path) -> list[Path]:
    """Write a saved network with its tensors in a safetensors file instead of a ``.pt`` file.

    The file's header carries preprocessing and class names, one JSON value per entry; the JSON file
    is that of ``save_network`` and loads with ``load_network``.

    Args:
        recipe_path: The JSON file of ``save_network``.
        folder: Folder of the new files, which is created.

    Returns:
        The safetensors file and the JSON file.

    Raises:
        ValueError: a file is missing or damaged, or the package safetensors is not installed.
    """
    recipe = _read_recipe(recipe_path)
    state = _read_weights(recipe_path.parent / recipe["weights"], recipe["sha256"])
    header = {name: json.dumps(value) for name, value in recipe.get("interface", {}).items()}
    tensors = {name: tensor.contiguous().clone() for name, tensor in state.items()}
    content = _safetensors().save(tensors, metadata={"format": "pt", **header})
    name = recipe_path.stem + _SAFETENSORS
    recipe |= {"weights": name, "sha256": hashlib.sha256(content).hexdigest()}
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / name, content)
    _write_recipe(folder / recipe_path.name, recipe)
    return [folder / name, folder / recipe_path.name]


def read_interface(path: str | Path) -> Interface:
    """Return preprocessing and class names of a network that ``save_network`` wrote.

    Args:
        path: The JSON file.

    Raises:
        ValueError: the file is missing or damaged.
    """
    return interface_from_json(_read_recipe(Path(path)).get("interface", {}))


def _safetensors() -> Any:
    try:
        return importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise ValueError(
            "a safetensors file needs the package safetensors; pip install 'fppmo-ray[export]' "
            "has it"
        ) from error


def load_network(path: str | Path, constructor: Callable[[], nn.Module] | None = None) -> nn.Module:
    """Load a network that ``save_network`` wrote, in eval mode on the CPU.

    Args:
        path: The JSON file; the ``.pt`` file is in the same folder.
        constructor: Makes the dense network; its weights do not matter. Needed only if the file
            names no constructor of this package or of torchvision: nothing else is imported.

    Raises:
        ValueError: a file is missing or damaged, or the constructor makes another network.
    """
    recipe = _read_recipe(Path(path))
    state = _read_weights(Path(path).parent / recipe["weights"], recipe["sha256"])
    make = constructor or _named_constructor(recipe["source"])
    ranges = _axes_from_json(recipe["axes"])
    dense = with_plain_weights(opened(make()))
    check_axes(dense, {axis: length for axis, (length, _) in ranges.items()})
    kept = {axis: _from_ranges(text, length) for axis, (length, text) in ranges.items()}
    numbers = {(name, attribute, index): n for name, attribute, index, n in recipe["numbers"]}
    if unknown := numbers.keys() - module_numbers(dense).keys():
        raise ValueError(
            f"{path} holds another network than the constructor makes, whose modules keep no "
            f"number {unknown}"
        )
    narrower = {axis: k for axis, k in kept.items() if len(k) < ranges[axis][0]}
    network = select(dense, narrower, numbers)
    try:
        network.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"{path} holds another network than the constructor makes: {error}"
        ) from error
    return network.cpu().eval()


def _kept_channels(tracing: Tracing, kept: Mapping[Axis, IntArray]) -> dict[str, str]:
    """Output channels of the dense network that were kept, for every pruned layer."""
    return {
        part.layer: _to_ranges(kept[part.tensor, part.axis])
        for part in tracing.slices
        if part.side == "output" and (part.tensor, part.axis) in kept
    }


def _axes_to_json(tracing: Tracing, kept: Mapping[Axis, IntArray]) -> list[dict[str, Any]]:
    """One entry per set of kept indices, with all tensor axes that use it."""
    shared: dict[tuple[int, str], list[list[str | int]]] = {}
    for axis, length in tracing.axis_lengths.items():
        indices = _to_ranges(kept[axis]) if axis in kept else f"0-{length - 1}"
        shared.setdefault((length, indices), []).append(list(axis))
    return [
        {"length": length, "kept": indices, "tensors": axes}
        for (length, indices), axes in shared.items()
    ]


def _axes_from_json(entries: list[dict[str, Any]]) -> dict[Axis, tuple[int, str]]:
    """Return the length of every tensor axis in the dense network, and its kept indices as text."""
    return {
        (tensor, axis): (entry["length"], entry["kept"])
        for entry in entries
        for tensor, axis in entry["tensors"]
    }


def _to_ranges(indices: IntArray) -> str:
    """Sorted indices as text: 0, 1, 2, 5, 7, 8 are ``0-2,5,7-8``."""
    runs = np.split(indices, np.flatnonzero(np.diff(indices) > 1) + 1)
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _from_ranges(text: str, length: int) -> IntArray:
    """Return the indices that ``_to_ranges`` wrote, ascending in [0, length)."""
    bounds = [[int(bound) for bound in run.split("-")] for run in text.split(",")]
    flat = [bound for run in bounds for bound in run]
    if any(len(run) > 2 for run in bounds) or flat != sorted(set(flat)) or flat[-1] >= length:
        raise ValueError(f"expected ascending indices below {length}, got {text:.40}")
    return np.concatenate([np.arange(run[0], run[-1] + 1, dtype=np.int64) for run in bounds])


def _named_constructor(source: Mapping[str, Any]) -> Callable[[], nn.Module]:
    """The constructor named by a recipe, if its module is trusted."""
    if "constructor" not in source:
        raise ValueError(
            "the file does not name a constructor of its dense network; pass constructor= (on the "
            "command line: --constructor MODULE:FUNCTION)"
        )
    module_name, _, function = str(source["constructor"]).partition(":")
    if module_name not in TRUSTED_MODULES or function.startswith("_"):
        raise ValueError(
            f"the file names the constructor {source['constructor']!r}; only those of "
            f"{', '.join(TRUSTED_MODULES)} are called by name, so pass constructor="
        )
    make = getattr(importlib.import_module(module_name), function, None)
    if not callable(make):
        raise ValueError(f"{module_name} has no {function!r}; pass constructor= instead")
    arguments = dict(source.get("arguments", {}))
    if module_name == "torchvision.models":
        arguments["weights"] = None  # do not download weights that are overwritten
        arguments.pop("pretrained", None)
    if module_name == "timm":
        _check_timm(function, arguments)

    def construct() -> nn.Module:
        try:
            network: nn.Module = make(**arguments)
        except TypeError as error:
            raise ValueError(
                f"{function} takes other arguments than the file's: {error}"
            ) from error
        return network

    return construct


def _check_timm(function: str, arguments: Mapping[str, Any]) -> None:
    """Refuse a call of timm that would read other files, or ask a hub."""
    name = str(arguments.get("model_name", ""))
    unknown = sorted(arguments.keys() - _TIMM_ARGUMENTS)
    if function != "create_model" or unknown or not re.fullmatch(r"[\w.]+", name):
        raise ValueError(
            f"the file calls timm:{function} for {name!r} with {', '.join(unknown) or 'no more'}; "
            "only timm:create_model with a model's name and the number of classes is called by "
            "name, so pass constructor="
        )


def _read_recipe(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"expected a network's JSON file at {path}, got none")
    try:
        recipe = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file ({error}); it is damaged") from error
    if not isinstance(recipe, dict) or "checksum" not in recipe:
        raise ValueError(f"{path} is not a network's JSON file of format {_FORMAT}")
    if recipe.pop("checksum") != _checksum(recipe):
        raise ValueError(
            f"{path} was changed after it was written: its checksum does not fit; copy or export "
            "it again"
        )
    if recipe.get("format") != _FORMAT:
        raise ValueError(
            f"{path} is of format {recipe.get('format')}, expected {_FORMAT}; read it with the "
            "version of fppmo_ray that wrote it"
        )
    return recipe


def _write_recipe(path: Path, recipe: Mapping[str, Any]) -> None:
    as_read = json.loads(json.dumps(recipe))  # JSON has no tuples and no numbers as keys
    sealed = {**as_read, "checksum": _checksum(as_read)}
    write_whole(path, json.dumps(sealed, indent=1).encode())


def _checksum(recipe: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a recipe, however its file is laid out."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def _read_weights(path: Path, sha256: str) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"expected the network's weights at {path}, got no file")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(
            f"{path} is damaged or of another save: its SHA-256 is {found[:12]}..., the JSON file "
            f"says {sha256[:12]}...; copy both files again"
        )
    if path.suffix == _SAFETENSORS:
        tensors: dict[str, Any] = _safetensors().load(content)
        return tensors
    state: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return state


def _with_suffix(stem: Path, suffix: str) -> Path:
    return stem.with_name(stem.name + suffix)  # with_suffix would cut "v1.2" short
