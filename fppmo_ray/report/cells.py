"""The cells that jobs leave: a JSON file for everything that was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def reading_cell(path: Path, job: str) -> Iterator[None]:
    """While a cell is read: say of which job it should have been, where it cannot.

    Args:
        path: The cell's file.
        job: Such as ``jobs/compare.py``.

    Raises:
        ValueError: the file is no JSON, or lacks what the job's cells have.
    """
    try:
        yield
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no cell of {job}: {error!r}") from error
