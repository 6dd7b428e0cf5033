"""Positions along the axes of weights, in units: sets that are kept or removed together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fppmo_ray.distribution.space import IntArray

FIXED = -1
"""A position that no mask removes: padding, say."""

_PADDED = "padding, which always stays, is added to it"


class DisjointSets:
    """Disjoint sets of positions (union-find over arrays), and why some are never removed."""

    def __init__(self) -> None:
        self._parents = np.zeros(0, dtype=np.int64)
        self._stays = np.zeros(0, dtype=np.bool_)  # of roots
        self._kept: dict[int, str] = {}
        self._doubted: dict[int, str] = {}
        self._read: set[int] = set()
        self._made: set[int] = set()

    def new(self, count: int) -> IntArray:
        """Positions that are units of their own, ``(count,)``."""
        first = len(self._parents)
        fresh = np.arange(first, first + count, dtype=np.int64)
        self._parents = np.concatenate([self._parents, fresh])
        self._stays = np.concatenate([self._stays, np.zeros(count, dtype=np.bool_)])
        return fresh

    def roots(self, positions: IntArray) -> IntArray:
        """One number per unit, the same for all positions of a unit; that of FIXED is FIXED."""
        found = positions[positions != FIXED]
        roots = self._parents[found]
        while not np.array_equal(above := self._parents[roots], roots):
            roots = above
        self._parents[found] = roots
        all_roots = np.full_like(positions, FIXED)
        all_roots[positions != FIXED] = roots
        return all_roots

    def unite(self, first: IntArray, second: IntArray) -> None:
        """Make one unit of every two positions at the same place of two arrays."""
        pairs = np.stack([self.roots(first).ravel(), self.roots(second).ravel()])
        pairs = np.unique(pairs[:, pairs[0] != pairs[1]], axis=1)
        for one, other in pairs.T.tolist():
            if FIXED in (one, other):
                self.keep(np.array([max(one, other)]), _PADDED)
            else:
                one, other = sorted((self._root(one), self._root(other)))
                self._parents[other] = one
                self._stays[one] |= self._stays[other]

    def join(self, arrays: Sequence[IntArray | None], reason: str) -> IntArray | None:
        """Unite arrays that run along the same axis; None where nothing runs along it.

        An axis that is followed in some operands only has a fixed length in the others, so it
        is kept.
        """
        present = [array for array in arrays if array is not None]
        if not present:
            return None
        for array in present[1:]:
            self.unite(present[0], array)
        if len(present) < len(arrays):
            self.keep(present[0], reason)
        return present[0]

    def fold(self, positions: IntArray, parts: int) -> IntArray:
        """Unite equal parts of an array, place by place; returns the first part."""
        rows = positions.reshape(parts, -1)
        first: IntArray = rows[0]
        self.unite(np.broadcast_to(first, rows.shape), rows)
        return first

    def keep(self, positions: IntArray | None, reason: str) -> None:
        """Never remove these; the first reason counts."""
        for root in [] if positions is None else np.unique(self.roots(positions)).tolist():
            if root != FIXED:
                self._kept.setdefault(root, reason)
                self._stays[root] = True

    def can_go(self, positions: IntArray) -> bool:
        """Whether any of these is not known to stay."""
        roots = self.roots(positions)
        return not self._stays[roots[roots != FIXED]].all()

    def doubt(self, positions: IntArray, reason: str) -> None:
        """Say that these can be removed only if the network's own code follows widths."""
        for root in np.unique(self.roots(positions)).tolist():
            if root != FIXED:
                self._doubted.setdefault(root, reason)

    def mark_read(self, positions: IntArray | None) -> None:
        """These are an axis of a weight along which it is summed."""
        self._read.update([] if positions is None else positions.tolist())

    def mark_made(self, positions: IntArray | None) -> None:
        """These are an axis of a weight that becomes an axis of a result."""
        self._made.update([] if positions is None else positions.tolist())

    def is_read(self, positions: IntArray) -> bool:
        """Whether the axis of a weight that these are is summed along."""
        return not self._read.isdisjoint(positions.tolist())

    def is_made(self, positions: IntArray) -> bool:
        """Whether the axis of a weight that these are becomes a result's."""
        return not self._made.isdisjoint(positions.tolist())

    def kept(self) -> dict[int, str]:
        """The units that are never removed, with the reason."""
        return self._by_root(self._kept)

    def doubted(self) -> dict[int, str]:
        """The units that may turn out to be impossible to remove, with the reason."""
        return self._by_root(self._doubted)

    def _by_root(self, reasons: dict[int, str]) -> dict[int, str]:
        found: dict[int, str] = {}
        for position, reason in reasons.items():
            found.setdefault(self._root(position), reason)
        return found

    def _root(self, position: int) -> int:
        root = position
        while self._parents[root] != root:
            root = int(self._parents[root])
        self._parents[position] = root
        return root
