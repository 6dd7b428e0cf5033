"""Masks that meet a budget exactly: of MACs, and of whatever else is limited.

Wishes (one priority per filter) go in, a legal mask comes out: the best filters first, until
nothing more fits. With random priorities, this is how proposals are sampled; with priorities
that carry no noise, it gives the likeliest mask (the mode) of a distribution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fppmo_ray.distribution.limits import Limit, Resource, limits_of
from fppmo_ray.distribution.space import BoolArray, FloatArray, IntArray, PruningSpace


@dataclass(frozen=True)
class Budget:
    """The most multiply-accumulates a mask of a space may cost, and the most of other things."""

    space: PruningSpace
    max_macs: int
    further: tuple[Limit, ...] = ()

    @classmethod
    def from_cut(
        cls,
        space: PruningSpace,
        macs_cut: float,
        further_cuts: Mapping[Resource, float] | None = None,
    ) -> Budget:
        """The budget that removes the share ``macs_cut``, in (0, 1), of the dense network's MACs.

        Args:
            space: What can be pruned, and what it costs.
            macs_cut: Beside further cuts it may be 0, which limits nothing.
            further_cuts: Shares, in (0, 1), of other resources.

        Raises:
            ValueError: a cut is out of range, or the smallest legal widths remove less.
        """
        further_cuts = further_cuts or {}
        check_macs_cut(macs_cut, may_be_zero=bool(further_cuts))
        max_macs = math.floor((1 - macs_cut) * space.dense_macs)
        if max_macs < space.min_macs:
            reachable = math.floor((1 - space.min_macs / space.dense_macs) * 1e4) / 1e4
            raise ValueError(
                f"macs_cut must be at most {reachable}, got {macs_cut}: "
                f"the smallest legal widths still cost {space.min_macs:,} of {space.dense_macs:,} "
                "MACs; lower macs_cut, or min_keep and multiple of the space"
            )
        return cls(space, max_macs, limits_of(space, further_cuts))

    def is_expected(self, widths: FloatArray) -> bool:
        """Whether expected kept filters per group, ``(num_groups,)``, keep to every limit."""
        if self.space.expected_macs(widths) > self.max_macs:
            return False
        return all(limit.is_expected(widths) for limit in self.further)

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
        blocks = -(-self.space.min_widths // self._multiples)
        blocks, taken = self._longest_prefix(blocks, queue, 0)
        queue, reach = queue[taken:], 1
        while len(queue):
            widths = self._widths(blocks)
            steps = np.minimum(self._multiples, self.space.max_widths - widths)
            # A group that does not fit now never will: adding only makes the rest dearer.
            fitting = queue[self._allows(widths, steps)[queue]]
            # Many blocks may fit behind the first that does not, where limits overlook groups.
            reach = 2 * reach if len(fitting) == len(queue) else 1
            blocks, taken = self._longest_prefix(blocks, fitting[:reach], 1)
            queue = fitting[taken:]
        return self._widths(blocks)

    def _longest_prefix(self, blocks: IntArray, queue: IntArray, sure: int) -> tuple[IntArray, int]:
        """Blocks per group after adding the longest prefix within the budget, and its length.

        Args:
            blocks: Per group, so far.
            queue: The groups of further ones, the best first.
            sure: So many, of those there are, are known to fit.
        """
        shortest, longest = min(sure, len(queue)), len(queue)
        blocks = blocks + np.bincount(queue[:shortest], minlength=len(blocks))
        while shortest < longest:
            middle = (shortest + longest + 1) // 2
            wider = blocks + np.bincount(queue[shortest:middle], minlength=len(blocks))
            if self._is_met(self._widths(wider)):
                blocks, shortest = wider, middle
            else:
                longest = middle - 1
        return blocks, shortest

    def _is_met(self, widths: IntArray) -> bool:
        if self.space.macs_of_widths(widths) > self.max_macs:
            return False
        return all(limit.is_met(widths) for limit in self.further)

    def _allows(self, widths: IntArray, steps: IntArray) -> BoolArray:
        """Which groups could be widened by their steps, each alone, ``(num_groups,)``."""
        slack = self.max_macs - self.space.macs_of_widths(widths)
        allowed: BoolArray = self.space.macs_increase(widths, steps) <= slack
        for limit in self.further:
            allowed &= limit.allows(widths, steps)
        return allowed

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


def check_macs_cut(macs_cut: float, *, may_be_zero: bool = False) -> None:
    """Refuse a share of MACs to remove that no network could lose.

    Args:
        macs_cut: In (0, 1).
        may_be_zero: Whether something else is limited, so that 0 makes sense: no limit of MACs.

    Raises:
        ValueError: the cut is out of its range.
    """
    if not 0 < macs_cut < 1 and not (macs_cut == 0 and may_be_zero):
        raise ValueError(
            f"macs_cut must be in (0, 1), got {macs_cut}; 0.57 removes 57 % of the MACs, and 0 "
            "is allowed beside another cut"
        )


def check_macs_cuts(macs_cuts: tuple[float, ...], *, may_be_zero: bool = False) -> None:
    """Refuse cuts that make no list of different budgets, each tighter than the one before.

    Args:
        macs_cuts: Each as of ``check_macs_cut``.
        may_be_zero: See there.

    Raises:
        ValueError: there is none, they do not ascend, or one is out of its range.
    """
    if not macs_cuts:
        raise ValueError("macs_cut must be one share of the MACs or several, got none")
    for macs_cut in macs_cuts:
        check_macs_cut(macs_cut, may_be_zero=may_be_zero)
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
