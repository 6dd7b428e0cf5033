"""The id of a search, which a submitted job hands down to it."""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path

from fppmo_ray.service.journal.storage import location_of

SEARCH_ID = "FPPMO_SEARCH_ID"
"""Environment variable of a submitted job: the id of its search."""
RUN_DIR = "FPPMO_RUN_DIR"
"""Environment variable of a submitted job: the run directory that its flags name, if they do."""

_first_run_dir: dict[str, str] = {}
"""The run directory of this process's first search, by the id of its job."""


def search_id(run_dir: str | Path) -> str:
    """Return an id for a new search.

    A submitted job gives its own id to the search in the run directory that its flags name, or to
    its first search if they name none. Its other searches append a hash of their run directory,
    so that a resumed job uses the same ids again whatever it skips.

    Args:
        run_dir: The search's run directory, a folder or a URI.
    """
    job = os.environ.get(SEARCH_ID)
    if not job:
        return uuid.uuid4().hex[:12]
    location = location_of(run_dir).rstrip("/")
    given = os.environ.get(RUN_DIR, "").rstrip("/")
    if location == (given or _first_run_dir.setdefault(job, location)):
        return job
    return f"{job}-{hashlib.sha256(location.encode()).hexdigest()[:6]}"
