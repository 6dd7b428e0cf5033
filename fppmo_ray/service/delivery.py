"""Handing out the network of a finished search."""

from __future__ import annotations

import shutil
from pathlib import Path

from fppmo_ray.pruning import load_network
from fppmo_ray.service.record.storage import local_folder
from fppmo_ray.service.result import network_files


def deliver(run_dir: str | Path, output: Path, macs_cut: float | None = None) -> list[Path]:
    """Rebuild a search's network from its recipe, which checks it, and copy its files.

    Args:
        run_dir: The search's folder, or the URI of where it is.
        output: A folder of this machine; made if absent.
        macs_cut: Which budget's, of several.

    Returns:
        The weights and the recipe in the folder ``output``.

    Raises:
        ValueError: the search has not finished, had no such budget, or its network cannot be
            rebuilt.
    """
    folder = local_folder(run_dir)
    if folder is not None and output.resolve() == folder.resolve():
        raise ValueError(f"the network lies in {run_dir} already; give another folder")
    with network_files(run_dir, macs_cut) as (weights, recipe):
        load_network(recipe)
        output.mkdir(parents=True, exist_ok=True)
        return [Path(shutil.copy(path, output)) for path in (weights, recipe)]
