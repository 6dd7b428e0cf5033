"""Split the training set into search-train, search-val and choose-val."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import combinations
from pathlib import Path

import numpy as np

from fppmo_ray.training.dataset import IntArray

CHOOSE_SHARE = 0.4
"""Share of the rows in a search-val file that become choose-val where no file names them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Splits:
    """Disjoint rows of the training set, each a sorted int64 array ``(n,)``."""

    search_train: IntArray
    """Rows that train and recalibrate candidates."""
    search_val: IntArray
    """Rows that score the candidates during the search."""
    choose_val: IntArray
    """Rows that decide among the finalists."""

    def __post_init__(self) -> None:
        rows = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, split in rows.items():
            _check_rows(split, name)
        for first, second in combinations(rows, 2):
            shared = np.intersect1d(rows[first], rows[second])
            if len(shared):
                raise ValueError(
                    f"splits must be disjoint, got {len(shared)} rows in both {first} and "
                    f"{second}, the first is {shared[0]}"
                )


def stratified_splits(
    labels: IntArray, *, search_val: int | float, choose_val: int | float, seed: int
) -> Splits:
    """Draw random splits in which every class keeps its share; the rest is search-train.

    Args:
        labels: Class labels of the training set, int64 ``(N,)``.
        search_val: Number of images (int, >= 1), or share of the images (float in (0, 1)).
        choose_val: Number of images or share of them, as for ``search_val``.
        seed: Random seed, >= 0; equal seeds give equal splits.

    Raises:
        ValueError: a size is out of its range, or no image is left for search-train.
    """
    rng = np.random.default_rng(seed)
    num_search = _num_rows(search_val, len(labels), "search_val")
    num_choose = _num_rows(choose_val, len(labels), "choose_val")
    if num_search + num_choose >= len(labels):
        raise ValueError(
            f"search_val and choose_val take {num_search} + {num_choose} of {len(labels)} images "
            "and leave none for search-train; make them smaller"
        )
    val = stratified_rows(labels, num_search + num_choose, rng)
    choose = val[stratified_rows(labels[val], num_choose, rng)]
    return Splits(
        search_train=_all_but(val, len(labels)),
        search_val=np.setdiff1d(val, choose),
        choose_val=choose,
    )


def splits_from_files(
    labels: IntArray,
    *,
    search_val: Path,
    choose_val: Path | None = None,
    search_train: Path | None = None,
    seed: int = 0,
) -> Splits:
    """Read splits from ``.npy`` files of row numbers.

    Args:
        labels: Class labels of the training set, int64 ``(N,)``.
        search_val: File of the rows that score candidates.
        choose_val: File of the rows that decide among finalists; None takes a stratified
            ``CHOOSE_SHARE`` of the rows in ``search_val``.
        search_train: File of the rows to train on; None takes all others.
        seed: Random seed of the stratified choice, >= 0.

    Raises:
        ValueError: a file is missing or holds no array of row numbers; a row is out of range, or
            occurs twice or in two splits.
    """
    held_out = _read_rows(search_val, len(labels))
    if choose_val is None:
        num_choose = _num_rows(CHOOSE_SHARE, len(held_out), "choose_val")
        rng = np.random.default_rng(seed)
        choose = held_out[stratified_rows(labels[held_out], num_choose, rng)]
        held_out = np.setdiff1d(held_out, choose)
    else:
        choose = _read_rows(choose_val, len(labels))
    if search_train is None:
        train = _all_but(np.union1d(held_out, choose), len(labels))
    else:
        train = _read_rows(search_train, len(labels))
    return Splits(search_train=train, search_val=held_out, choose_val=choose)


def stratified_rows(labels: IntArray, num_rows: int, rng: np.random.Generator) -> IntArray:
    """Draw sorted row numbers, with each class in its proportion as nearly as whole rows allow.

    Rows that rounding down leaves over go to the classes with the largest fractional claims.

    Args:
        labels: Class labels, int64 ``(N,)``.
        num_rows: Number of rows to draw, in [0, N].
        rng: Source of randomness.
    """
    classes, counts = np.unique(labels, return_counts=True)
    # Each class claims its proportional share of the rows, a fraction in general.
    claims = counts * (num_rows / len(labels))
    quotas = np.floor(claims).astype(np.int64)
    # Largest-remainder method: rows lost by rounding go to the largest fractions.
    left_over = num_rows - int(quotas.sum())
    quotas[np.argsort(quotas - claims, kind="stable")[:left_over]] += 1
    chosen = [
        rng.permutation(np.flatnonzero(labels == label))[:quota]
        for label, quota in zip(classes, quotas, strict=True)
    ]
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def _num_rows(size: int | float, available: int, name: str) -> int:
    if isinstance(size, float):
        if not 0 < size < 1:
            raise ValueError(f"{name} as a share must be in (0, 1), got {size}")
        size = round(size * available)
    if not 0 < size < available:
        raise ValueError(f"{name} must take 1 to {available - 1} images, got {size}")
    return size


def _all_but(rows: IntArray, num_rows: int) -> IntArray:
    return np.setdiff1d(np.arange(num_rows, dtype=np.int64), rows)


def _read_rows(path: Path, num_rows: int) -> IntArray:
    if not path.is_file():
        raise ValueError(f"there is no file of row numbers at {path}")
    try:
        rows = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is no readable .npy file; write it with numpy.save") from error
    if not isinstance(rows, np.ndarray) or rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise ValueError(f"{path} must hold one array of integers (n,); write row numbers")
    outside = rows[(rows < 0) | (rows >= num_rows)]
    if len(outside):
        raise ValueError(
            f"{path} names row {outside[0]}, but the training set's rows are 0 to {num_rows - 1}"
        )
    _check_rows(rows, str(path))
    return np.sort(rows).astype(np.int64)


def _check_rows(rows: IntArray, name: str) -> None:
    if not len(rows):
        raise ValueError(f"{name} is empty; every split needs rows")
    unique, counts = np.unique(rows, return_counts=True)
    if len(unique) < len(rows):
        raise ValueError(f"{name} names row {unique[counts > 1][0]} more than once")
