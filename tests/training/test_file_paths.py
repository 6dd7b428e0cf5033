"""Paths in one array: the same paths, and names that do not depend on the folder's place."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from fppmo_ray.training.file_paths import FilePaths
from fppmo_ray.training.prepared import Rows

PATHS = [Path("/data/train") / name for name in ("cat/1.png", "cat-2/7.png", "dög/1 b.png")]


def test_paths_are_the_given_ones_by_position_slice_and_rows() -> None:
    paths = FilePaths(PATHS)
    assert list(paths) == PATHS
    assert len(paths) == 3
    assert paths[-1] == PATHS[-1]
    assert list(paths[1:]) == PATHS[1:]
    assert list(Rows(paths, np.array([2, 0]))) == [PATHS[2], PATHS[0]]
    assert list(pickle.loads(pickle.dumps(paths))) == PATHS
    with pytest.raises(IndexError):
        paths[3]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (PATHS, ["cat/1.png", "cat-2/7.png", "dög/1 b.png"]),
        (PATHS[:1], ["."]),
        (["/a/b/c.png", "/a/bc/d.png"], ["b/c.png", "bc/d.png"]),
        (["/a/x.png", "/b/x.png"], ["a/x.png", "b/x.png"]),
        ([], []),
    ],
)
def test_names_are_relative_to_the_folder_that_holds_all(
    paths: list[Path], names: list[str]
) -> None:
    assert FilePaths(paths).relative_names() == names
    if len(paths) > 1:
        moved = [Path("/elsewhere") / str(path)[1:] for path in paths]
        assert FilePaths(moved).relative_names() == names
