"""Handing out the network of a finished search."""

from __future__ import annotations

import shutil
from pathlib import Path

from fppmo_ray.pruning import load_network
from fppmo_ray.service.conclusion import NETWORK, RESULT


def deliver(run_dir: Path, output: Path) -> list[Path]:
    """Rebuild a search's network from its recipe, which checks it, and copy its files.

    Returns:
        The weights and the recipe in the folder ``output``.

    Raises:
        ValueError: the search has not finished, or its network cannot be rebuilt.
    """
    if not (run_dir / RESULT).is_file():
        raise ValueError(f"{run_dir} holds no {RESULT}: the search there has not finished")
    if output.resolve() == run_dir.resolve():
        raise ValueError(f"the network lies in {run_dir} already; give another folder")
    load_network(run_dir / f"{NETWORK}.json")
    output.mkdir(parents=True, exist_ok=True)
    names = f"{NETWORK}.pt", f"{NETWORK}.json"
    return [Path(shutil.copyfile(run_dir / name, output / name)) for name in names]
