"""Export the network of a finished search."""

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
from fppmo_ray.service.journal.artifacts import network_files, read_figures
from fppmo_ray.service.journal.storage import local_folder

Format = Literal["torch"] | ExchangeFormat
"""File formats; ``torch`` is the state dict and the recipe that rebuilds the network."""


def export_result(
    run_dir: str | Path,
    output: Path,
    *,
    format: Format = "torch",
    macs_cut: float | None = None,
    constructor: Callable[[], nn.Module] | None = None,
) -> list[Path]:
    """Check the network of a search by rebuilding it from its recipe, and write its files.

    Args:
        run_dir: The search's run directory, a folder or a URI.
        output: A folder on this machine. It is created if it does not exist.
        format: The file format.
        macs_cut: The budget whose network to export, if the search had several budgets.
        constructor: Constructs the dense network, as for ``load_network``.

    Returns:
        The files written to ``output``.

    Raises:
        ValueError: the search has not finished, it has no such budget, or its network cannot be
            rebuilt or exported.
    """
    folder = local_folder(run_dir)
    if folder is not None and output.resolve() == folder.resolve():
        raise ValueError(f"the network is in {run_dir} already; choose another output folder")
    with network_files(run_dir, macs_cut) as (weights, recipe):
        network = load_network(recipe, constructor)
        if format == "torch":
            output.mkdir(parents=True, exist_ok=True)
            return [Path(shutil.copy(path, output)) for path in (weights, recipe)]
        target, inputs = output / recipe.stem, _example_inputs(run_dir)
        return [export_network(network, target, format=format, example_inputs=inputs)]


def load_constructor(name: str) -> Callable[[], nn.Module]:
    """Return the function that ``MODULE:FUNCTION`` names, after importing the module.

    Args:
        name: ``MODULE:FUNCTION``.

    Raises:
        ValueError: there is no such module or function.
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
    constructor: Callable[[], nn.Module] = found
    return constructor


def _example_inputs(run_dir: str | Path) -> tuple[Tensor, ...]:
    """Return zeros of the shapes and types of the network's inputs, with a batch of one."""
    return tuple(
        torch.zeros(1, *one["shape"], dtype=getattr(torch, one["dtype"]))
        for one in read_figures(run_dir)["inputs"]
    )
