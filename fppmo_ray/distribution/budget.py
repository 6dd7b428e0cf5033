"""Masks that meet a MACs budget exactly.

Wishes (one priority per filter) go in, a legal mask comes out: the best filters first, until
nothing more fits. With random priorities, this is how proposals are sampled; with priorities
that carry no noise, it gives the likeliest mask (the mode) of a distribution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fppmo_ray.distribution.space import BoolArray, FloatArray, IntArray, PruningSpace


@dataclass(frozen=True)
class Budget:
    """The most multiply-accumulates a mask of a space may cost."""

    space: PruningSpace
    max_macs: int

    @classmethod
    def from_cut(cls, space: PruningSpace, macs_cut: float) -> Budget:
        """The budget that removes the share ``macs_cut``, in (0, 1), of the dense network's MACs.

        Raises:
            ValueError: the cut is out of range, or the smallest legal widths remove less.
        """
        check_macs_cut(macs_cut)
        max_macs = math.floor((1 - macs_cut) * space.dense_macs)
        if max_macs < space.min_macs:
            reachable = math.floor((1 - space.min_macs / space.dense_macs) * 1e4) / 1e4
            raise ValueError(
                f"macs_cut must be at most {reachable}, got {macs_cut}: "
                f"the smallest legal widths still cost {space.min_macs:,} of {space.dense_macs:,} "
                "MACs; lower macs_cut, or min_keep and multiple of the space"
            )
        return cls(space, max_macs)

    def fill(self, priority: FloatArray) -> BoolArray:
        """The mask ``(num_filters,)`` that keeps the filters of highest priority.

        A group's filters enter best first, in blocks of its ``multiple``, each block at the
        priority of its median member; the blocks up to the smallest legal width are always in.
        Blocks are taken in order as long as they fit; behind the first that does not, any that
        still fits is taken. So the mask is never over the budget, and no group could be widened
        by a legal step without going over. Ties go by index.
        """
        order = _descending(priority)
        groups = self._group_of[order]
        ranked = order[np.argsort(groups, kind="stable")]  # group by group, best first
        is_optional_block = np.zeros(len(order), dtype=bool)
        is_optional_block[ranked[self._optional_medians]] = True
        widths = self._widen(groups[is_optional_block[order]].astype(np.int64))
        keep = np.empty(len(order), dtype=bool)
        keep[ranked] = self._rank_in_group < np.repeat(widths, self.space.dense_widths)
        return keep

    def _widen(self, queue: IntArray) -> IntArray:
        """Widths after adding blocks, given as the groups they belong to, best block first."""
        blocks, taken = self._longest_prefix(queue)
        widths = self._widths(blocks)
        queue = queue[taken:]
        while len(queue):
            steps = np.minimum(self._multiples, self.space.max_widths - widths)
            slack = self.max_macs - self.space.macs_of_widths(widths)
            fits = self.space.macs_increase(widths, steps) <= slack
            # A group that does not fit now never will: adding only makes the rest dearer.
            queue = queue[fits[queue]]
            if len(queue):
                widths[queue[0]] += steps[queue[0]]
                queue = queue[1:]
        return widths

    def _longest_prefix(self, queue: IntArray) -> tuple[IntArray, int]:
        """Blocks per group after the longest prefix within the budget, and its length."""
        blocks = -(-self.space.min_widths // self._multiples)
        shortest, longest = 0, len(queue)
        while shortest < longest:
            middle = (shortest + longest + 1) // 2
            wider = blocks + np.bincount(queue[shortest:middle], minlength=len(blocks))
            if self.space.macs_of_widths(self._widths(wider)) <= self.max_macs:
                blocks, shortest = wider, middle
            else:
                longest = middle - 1
        return blocks, shortest

    def _widths(self, blocks: IntArray) -> IntArray:
        widths: IntArray = np.minimum(blocks * self._multiples, self.space.max_widths)
        return widths

    @cached_property
    def _multiples(self) -> IntArray:
        return np.array([group.multiple for group in self.space.groups], dtype=np.int64)

    @cached_property
    def _group_of(self) -> NDArray[np.uint16]:
        # Sixteen bits, because numpy sorts those by radix, in linear time.
        if len(self.space.groups) > np.iinfo(np.uint16).max:
            raise ValueError(f"expected at most 65535 channel groups, got {len(self.space.groups)}")
        return self.space.group_of.astype(np.uint16)

    @cached_property
    def _rank_in_group(self) -> IntArray:
        space = self.space
        return np.arange(space.num_filters) - space.offsets[space.group_of]

    @cached_property
    def _optional_medians(self) -> IntArray:
        """Positions of the blocks' median members, all groups ranked one after the other."""
        space, rank = self.space, self._rank_in_group
        multiples = self._multiples[space.group_of]
        block_starts = rank - rank % multiples
        block_sizes = np.minimum(multiples, space.max_widths[space.group_of] - block_starts)
        is_median = rank == block_starts + (block_sizes - 1) // 2
        is_optional = rank >= space.min_widths[space.group_of]
        is_optional &= rank < space.max_widths[space.group_of]
        return np.flatnonzero(is_median & is_optional)


def check_macs_cut(macs_cut: float) -> None:
    """Refuse a share of MACs to remove that no network could lose.

    Raises:
        ValueError: the cut is not in (0, 1).
    """
    if not 0 < macs_cut < 1:
        raise ValueError(
            f"macs_cut must be in (0, 1), got {macs_cut}; 0.57 removes 57 % of the MACs"
        )


def check_macs_cuts(macs_cuts: tuple[float, ...]) -> None:
    """Refuse cuts that make no list of different budgets, each tighter than the one before.

    Raises:
        ValueError: there is none, they do not ascend, or one is not in (0, 1).
    """
    if not macs_cuts:
        raise ValueError("macs_cut must be one share of the MACs or several, got none")
    for macs_cut in macs_cuts:
        check_macs_cut(macs_cut)
    ordered = tuple(sorted(set(macs_cuts)))
    if macs_cuts != ordered:
        raise ValueError(
            f"several macs_cut must ascend, each given once, got {_listed(macs_cuts)}; "
            f"give {_listed(ordered)}"
        )


def _listed(macs_cuts: tuple[float, ...]) -> str:
    return ",".join(map(str, macs_cuts))


def _descending(priority: FloatArray) -> IntArray:
    """Indices from the highest priority to the lowest; ties, to 32 bits of the range, by index.

    A radix sort in two digits: twice as fast as sorting floats, and the same on every processor,
    where the fast float sort leaves ties in an order of its own.
    """
    highest, lowest = priority.max(), priority.min()
    if highest == lowest:
        return np.arange(len(priority))
    depth = np.rint((highest - priority) * ((2**32 - 1) / (highest - lowest))).astype(np.uint32)
    order = np.argsort(depth.astype(np.uint16), kind="stable")
    return order[np.argsort((depth >> 16).astype(np.uint16)[order], kind="stable")]
