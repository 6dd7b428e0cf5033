"""What the run directories of a search in stages hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from simulated_run import all_of

from fppmo_ray.service.journal.facts import (
    Chosen,
)


def composed(run_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """The mask of the first stage and that of both, over all filters, from the stages' journals."""
    [first], [second] = (all_of(run_dir / f"stage-{n}", Chosen) for n in (1, 2))
    whole = first.keep.copy()
    whole[np.flatnonzero(first.keep)] = second.keep
    return first.keep, whole


def folders(run_dir: Path) -> list[Path]:
    """The run directories of the whole search and of its stages."""
    return [run_dir, run_dir / "stage-1", run_dir / "stage-2"]
