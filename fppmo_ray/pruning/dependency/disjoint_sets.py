"""Disjoint sets of positions along the axes of weights.

Every index along every axis of every weight is one position. A set of positions that must be kept
or removed together is called a unit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fppmo_ray.distribution.space import IntArray

FIXED = -1
"""Position of a channel that no mask removes, such as padding."""

_PADDED = "padding, which always stays, is added to it"


class DisjointSets:
    """Union-find over arrays of positions, with the reasons why some units are never removed.

    A unit is identified by its root: the smallest position that was united into it.
    """

    def __init__(self) -> None:
        self._parents = np.zeros(0, dtype=np.int64)
        self._stays = np.zeros(0, dtype=np.bool_)  # valid at roots only
        self._kept: dict[int, str] = {}
        self._doubted: dict[int, str] = {}
        self._is_input = np.zeros(0, dtype=np.bool_)
        self._is_output = np.zeros(0, dtype=np.bool_)

    def __len__(self) -> int:
        """Return the number of positions."""
        return len(self._parents)

    def new(self, count: int) -> IntArray:
        """Add positions, each a unit of its own, and return them as ``(count,)``."""
        first = len(self._parents)
        fresh = np.arange(first, first + count, dtype=np.int64)
        self._parents = np.concatenate([self._parents, fresh])
        flags = np.zeros(count, dtype=np.bool_)
        self._stays = np.concatenate([self._stays, flags])
        self._is_input = np.concatenate([self._is_input, flags])
        self._is_output = np.concatenate([self._is_output, flags])
        return fresh

    def roots(self, positions: IntArray) -> IntArray:
        """Return the unit of every position, in the same shape; FIXED stays FIXED."""
        found = positions[positions != FIXED]
        # Climb for all positions at once until every one has reached its root.
        roots = self._parents[found]
        while not np.array_equal(above := self._parents[roots], roots):
            roots = above
        # Path compression: the next search from these positions takes one step.
        self._parents[found] = roots
        all_roots = np.full_like(positions, FIXED)
        all_roots[positions != FIXED] = roots
        return all_roots

    def unite(self, first: IntArray, second: IntArray) -> None:
        """Unite the units of every two positions at the same place of two arrays.

        Args:
            first: Positions of any shape.
            second: Positions of the same shape.
        """
        # Search all roots at once, and drop pairs that are equal or occur twice: arrays have many.
        pairs = np.stack([self.roots(first).ravel(), self.roots(second).ravel()])
        pairs = pairs[:, pairs[0] != pairs[1]]
        ordered = np.sort(pairs, axis=None)
        if ordered.size and ordered[0] != FIXED and (ordered[1:] != ordered[:-1]).all():
            root, child = pairs.min(axis=0), pairs.max(axis=0)  # no unit is in two pairs
            self._parents[child] = root
            self._stays[root] |= self._stays[child]
            return
        pairs = np.unique(pairs, axis=1)
        for one, other in pairs.T.tolist():
            if FIXED in (one, other):
                self.keep(np.array([max(one, other)]), _PADDED)
            else:
                # Earlier pairs of this loop may have moved the roots, so search them again.
                root, child = sorted((self._root(one), self._root(other)))
                self._parents[child] = root
                self._stays[root] |= self._stays[child]

    def join(self, arrays: Sequence[IntArray | None], reason: str) -> IntArray | None:
        """Unite the positions of several tensors along an axis that they share.

        A tensor whose axis is not tracked has a fixed length there, so if only some are tracked,
        their positions are kept.

        Args:
            arrays: Positions ``(length,)`` of every tensor, None where its axis is not tracked.
            reason: Why the positions are kept if only some tensors are tracked.

        Returns:
            The positions of the first tracked tensor, or None if none is tracked.
        """
        tracked = [array for array in arrays if array is not None]
        if not tracked:
            return None
        for array in tracked[1:]:
            self.unite(tracked[0], array)
        if len(tracked) < len(arrays):
            self.keep(tracked[0], reason)
        return tracked[0]

    def fold(self, positions: IntArray, parts: int) -> IntArray:
        """Unite the equal parts of an array place by place, and return the first part.

        Args:
            positions: Positions ``(length,)``.
            parts: Number of parts; it divides the length.
        """
        rows = positions.reshape(parts, -1)
        first: IntArray = rows[0]
        self.unite(np.broadcast_to(first, rows.shape), rows)
        return first

    def keep(self, positions: IntArray | None, reason: str) -> None:
        """Never remove these positions.

        Args:
            positions: Positions of any shape, or None for no position.
            reason: Shown to the user; the first reason given for a unit counts.
        """
        for root in [] if positions is None else np.unique(self.roots(positions)).tolist():
            if root != FIXED:
                self._kept.setdefault(root, reason)
                self._stays[root] = True

    def can_go(self, positions: IntArray) -> bool:
        """Return whether any of these positions may still be removed."""
        roots = self.roots(positions)
        return not self._stays[roots[roots != FIXED]].all()

    def doubt(self, positions: IntArray, reason: str) -> None:
        """Record that removal works only if the network's own code adapts to smaller widths.

        Args:
            positions: Positions of any shape.
            reason: What makes it doubtful; units with the same reason are tested together.
        """
        for root in np.unique(self.roots(positions)).tolist():
            if root != FIXED:
                self._doubted.setdefault(root, reason)

    def mark_input(self, positions: IntArray | None) -> None:
        """Record that an operation sums over this axis of a weight."""
        if positions is not None:
            self._is_input[positions[positions != FIXED]] = True

    def mark_output(self, positions: IntArray | None) -> None:
        """Record that this axis of a weight becomes an axis of an operation's result."""
        if positions is not None:
            self._is_output[positions[positions != FIXED]] = True

    def is_input(self, positions: IntArray) -> bool:
        """Return whether any of these positions was marked as input."""
        return bool(self._is_input[positions[positions != FIXED]].any())

    def is_output(self, positions: IntArray) -> bool:
        """Return whether any of these positions was marked as output."""
        return bool(self._is_output[positions[positions != FIXED]].any())

    def kept(self) -> dict[int, str]:
        """Return the units that are never removed, with the reason."""
        return self._by_root(self._kept)

    def doubted(self) -> dict[int, str]:
        """Return the units whose removal is doubtful, with the reason."""
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
