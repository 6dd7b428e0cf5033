"""Handing out the network of a finished search."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from fppmo_ray.pruning import load_network
from fppmo_ray.pruning.export import ExchangeFormat, export_network
from fppmo_ray.service.record.artifacts import network_files, read_figures
from fppmo_ray.service.record.storage import local_folder

Format = Literal["torch"] | ExchangeFormat
"""``torch``: the state dict and the recipe that rebuilds the network."""


def export_result(
    run_dir: str | Path,
    output: Path,
    *,
    format: Format = "torch",
    macs_cut: float | None = None,
    constructor: Callable[[], nn.Module] | None = None,
) -> list[Path]:
    """Rebuild a search's network from its recipe, which checks it, and write its files.

    Args:
        run_dir: The search's folder, or the URI of where it is.
        output: A folder of this machine; made if absent.
        format: Of the files.
        macs_cut: Which budget's, of several.
        constructor: Makes the dense network, as for ``load_network``.

    Returns:
        The files in the folder ``output``.

    Raises:
        ValueError: the search has not finished, had no such budget, or its network cannot be
            rebuilt or exported.
    """
    folder = local_folder(run_dir)
    if folder is not None and output.resolve() == folder.resolve():
        raise ValueError(f"the network lies in {run_dir} already; give another folder")
    with network_files(run_dir, macs_cut) as (weights, recipe):
        network = load_network(recipe, constructor)
        if format == "torch":
            output.mkdir(parents=True, exist_ok=True)
            return [Path(shutil.copy(path, output)) for path in (weights, recipe)]
        target, inputs = output / recipe.stem, _example_inputs(run_dir)
        return [export_network(network, target, format=format, example_inputs=inputs)]


def load_constructor(name: str) -> Callable[[], nn.Module]:
    """The function called ``MODULE:FUNCTION``; its module is imported, and runs as it is.

    Raises:
        ValueError: there is none of that name.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"expected MODULE:FUNCTION as a constructor, got {name}: {error}"
        ) from error
    if not callable(found):
        raise ValueError(f"expected MODULE:FUNCTION as a constructor, got {name}: no function")
    made: Callable[[], nn.Module] = found
    return made


def _example_inputs(run_dir: str | Path) -> tuple[Tensor, ...]:
    kept = read_figures(run_dir).get("inputs")
    if kept is None:
        raise ValueError(
            f"{run_dir} is of a version that did not keep the inputs' shapes; load_network and "
            "export_network do in Python what is asked for"
        )
    return tuple(torch.zeros(1, *one["shape"], dtype=getattr(torch, one["dtype"])) for one in kept)
