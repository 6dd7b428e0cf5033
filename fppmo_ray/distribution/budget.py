"""Masks that meet a budget exactly: a limit of MACs, and optionally of other resources.

``Budget.fill`` turns one priority per filter into a legal mask: it keeps the best filters until
nothing more fits. With random priorities it samples proposals; with the keep-logits themselves as
priorities it gives the likeliest mask (the mode) of a distribution. ``Budget.fill_each`` does so
for a whole population at once.
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

_FILTERS_AT_ONCE = 2**17


@dataclass(frozen=True)
class Budget:
    """The most that a mask may cost, in MACs and in further resources."""

    space: PruningSpace
    """The space of the masks."""
    max_macs: int
    """Most multiply-accumulates of the pruned network for one input."""
    further: tuple[Limit, ...] = ()
    """Limits of other resources, all of which hold beside ``max_macs``."""

    @classmethod
    def from_cut(
        cls,
        space: PruningSpace,
        macs_cut: float,
        further_cuts: Mapping[Resource, float] | None = None,
    ) -> Budget:
        """Return the budget that removes a share of the dense network's MACs.

        Args:
            space: The channel groups that can be pruned, and what they cost.
            macs_cut: Share of the MACs to remove, in (0, 1); beside further cuts it may be 0,
                which limits no MACs.
            further_cuts: Shares of other resources to remove, in (0, 1).

        Raises:
            ValueError: a cut is out of range, or the smallest legal widths remove less.
        """
        further_cuts = further_cuts or {}
        check_macs_cut(macs_cut, may_be_zero=bool(further_cuts))
        max_macs = math.floor((1 - macs_cut) * space.dense_macs)
        if max_macs < space.min_macs:
            # Rounded down, so that the number in the message is a legal cut.
            reachable = math.floor((1 - space.min_macs / space.dense_macs) * 1e4) / 1e4
            raise ValueError(
                f"macs_cut must be at most {reachable}, got {macs_cut}: "
                f"the smallest legal widths still cost {space.min_macs:,} of {space.dense_macs:,} "
                "MACs; lower macs_cut, or min_keep and multiple of the space"
            )
        return cls(space, max_macs, limits_of(space, further_cuts))

    def is_expected(self, widths: FloatArray) -> bool:
        """Return whether expected kept filters per group, ``(num_groups,)``, meet every limit."""
        if self.space.expected_macs(widths) > self.max_macs:
            return False
        return all(limit.is_expected(widths) for limit in self.further)

    def fill(self, priority: FloatArray) -> BoolArray:
        """Return the mask ``(num_filters,)`` that keeps the filters of highest priority.

        A group's filters enter best first, in blocks of its ``multiple``; a block has the priority
        of its median member. The blocks up to the smallest legal width always enter. The others
        enter in the order of their priority as long as they fit; after the first that does not
        fit, every later block that still fits enters. So the mask is never over the budget, and no
        group could be widened by a legal step without exceeding it. Ties go by index.

        Args:
            priority: ``(num_filters,)``, finite; only the order matters, except that differences
                below 2**-32 of the range count as ties.
        """
        mask: BoolArray = self.fill_each(priority[None])[0]
        return mask

    def fill_each(self, priorities: FloatArray) -> BoolArray:
        """Return ``fill`` of several priorities, ``(num_masks, num_filters)``.

        Args:
            priorities: ``(num_masks, num_filters)``, finite; see ``fill``.
        """
        at_once = max(1, _FILTERS_AT_ONCE // self.space.num_filters)  # bounds the memory
        starts = range(0, len(priorities) or 1, at_once)
        return np.concatenate([self._fill(priorities[at : at + at_once]) for at in starts])

    def _fill(self, priorities: FloatArray) -> BoolArray:
        # Filters of several masks are numbered throughout: a mask's begin where the last one's end.
        num_masks, num_filters = priorities.shape
        starts = num_filters * np.arange(num_masks)[:, None]
        # 1. Rank all filters, and with them the filters of each group.
        orders = _descending(priorities)
        groups = self._group_of[orders]
        by_group = np.argsort(groups, axis=1, kind="stable")
        orders += starts
        ranked = orders.take(by_group + starts)  # group by group, best first
        # 2. The queues: the group of each optional block, in the order of the blocks' medians.
        is_optional_block = np.zeros(priorities.size, dtype=bool)
        is_optional_block[ranked[:, self._optional_medians]] = True
        queues = groups[is_optional_block.take(orders)].astype(np.int64)
        # 3. Fill the budget with blocks; only the numbers of blocks matter for the cost.
        widths = self._widen(queues.reshape(num_masks, len(self._optional_medians)))
        # 4. Each group keeps as many of its best filters as its width allows.
        masks = np.empty(priorities.size, dtype=bool)
        masks[ranked] = self._rank_in_group < widths.take(self.space.group_of, axis=1)
        return masks.reshape(priorities.shape)

    def _widen(self, queues: IntArray) -> IntArray:
        """Return the widths ``(num_masks, num_groups)`` after adding every block that fits.

        The result is that of adding one block after the other and skipping those that do not fit;
        bisection finds it in far fewer evaluations of the cost.

        Args:
            queues: Group index of each optional block, ``(num_masks, num_blocks)``, best block
                first.
        """
        blocks, lengths = self._add_longest_prefixes(queues)
        widths = self._widths(blocks)
        # Behind most prefixes no block fits by its MACs alone, so nothing remains to be done.
        slack = self.max_macs - self.space.macs_cost.totals(widths)
        fits = self.space.macs_increase(widths, self._steps(widths)) <= slack[:, None]
        is_behind = np.arange(queues.shape[1]) >= lengths[:, None]
        has_rest = (np.take_along_axis(fits, queues, axis=1) & is_behind).any(axis=1)
        for row in np.flatnonzero(has_rest):
            widths[row] = self._add_rest(blocks[row], queues[row, lengths[row] :])
        return widths

    def _add_longest_prefixes(self, queues: IntArray) -> tuple[IntArray, IntArray]:
        """Return the blocks after adding each queue's longest prefix that fits, and its length.

        See ``_add_longest_prefix``. Here, where most evaluations of the cost are, all masks take
        each step of their bisections together.

        Args:
            queues: Group index of each block, ``(num_masks, num_blocks)``, best block first.

        Returns:
            Blocks per group, ``(num_masks, num_groups)``, and lengths, ``(num_masks,)``.
        """
        least = -(-self.space.min_widths // self._multiples)
        blocks = np.tile(least, (len(queues), 1))
        shortest, longest = np.zeros(len(queues), np.int64), np.full(len(queues), queues.shape[1])
        while len(rows := np.flatnonzero(shortest < longest)):
            middle = (shortest[rows] + longest[rows] + 1) // 2
            wider = blocks[rows] + self._count_each(queues, rows, shortest[rows], middle)
            is_met = self._are_met(self._widths(wider))
            blocks[rows[is_met]] = wider[is_met]
            shortest[rows[is_met]] = middle[is_met]
            longest[rows[~is_met]] = middle[~is_met] - 1
        return blocks, shortest

    def _count_each(
        self, queues: IntArray, rows: IntArray, starts: IntArray, stops: IntArray
    ) -> IntArray:
        """Return how many blocks of each group stand in a part of some queues.

        Args:
            queues: Group index of each block, ``(num_masks, num_blocks)``.
            rows: Which queues, ``(num_rows,)``.
            starts: First block of each part, ``(num_rows,)``.
            stops: End of each part, ``(num_rows,)``.

        Returns:
            Blocks per group, ``(num_rows, num_groups)``.
        """
        lengths = stops - starts
        row = np.repeat(np.arange(len(rows)), lengths)
        # The place of each block of the parts among the blocks of all queues.
        begins = rows * queues.shape[1] + starts - (np.cumsum(lengths) - lengths)
        places = np.arange(len(row)) + begins[row]
        num_groups = len(self.space.groups)
        entries = row * num_groups + queues.take(places)
        counts = np.bincount(entries, minlength=len(rows) * num_groups)
        return counts.reshape(-1, num_groups)

    def _add_rest(self, blocks: IntArray, queue: IntArray) -> IntArray:
        """Return the widths ``(num_groups,)`` after adding every block of the queue that fits.

        Args:
            blocks: Blocks per group so far, ``(num_groups,)``; the queue's first does not fit.
            queue: Group index of each further block, ``(num_blocks,)``, best block first.
        """
        reach = 1
        while len(queue):
            # Costs never fall as widths rise, so a block that does not fit now will not fit behind
            # further blocks either: all remaining blocks of its group leave the queue for good.
            widths = self._widths(blocks)
            fitting = queue[self._allows(widths, self._steps(widths))[queue]]
            # Galloping search: as long as no group drops out, look twice as far as before. Many
            # blocks may fit here if a limit does not depend on some groups; else very few do.
            reach = 2 * reach if len(fitting) == len(queue) else 1
            # The first fitting block was just tested by itself, so it is sure to fit.
            blocks, num_added = self._add_longest_prefix(blocks, fitting[:reach], num_sure=1)
            queue = fitting[num_added:]
        return self._widths(blocks)

    def _add_longest_prefix(
        self, blocks: IntArray, queue: IntArray, num_sure: int
    ) -> tuple[IntArray, int]:
        """Return the blocks after adding the longest prefix that fits, and the prefix's length.

        Costs never fall as widths rise, so every part of a prefix that fits fits as well, and
        bisection finds the longest one. (``_add_longest_prefixes`` of a single mask takes so much
        longer that a generation of 64 masks of a ResNet-20 took 3.2 ms instead of 2.0.)

        Args:
            blocks: Blocks per group so far, ``(num_groups,)``.
            queue: Group index of each further block, ``(num_blocks,)``, best block first.
            num_sure: Length of a prefix that is known to fit.
        """
        shortest, longest = min(num_sure, len(queue)), len(queue)
        blocks = blocks + np.bincount(queue[:shortest], minlength=len(blocks))
        while shortest < longest:
            middle = (shortest + longest + 1) // 2
            wider = blocks + np.bincount(queue[shortest:middle], minlength=len(blocks))
            if self._are_met(self._widths(wider)[None])[0]:
                blocks, shortest = wider, middle
            else:
                longest = middle - 1
        return blocks, shortest

    def _are_met(self, widths: IntArray) -> BoolArray:
        """Return whether widths ``(num_masks, num_groups)`` meet every limit, ``(num_masks,)``."""
        are_met: BoolArray = self.space.macs_cost.totals(widths) <= self.max_macs
        for limit in self.further:
            are_met &= limit.cost.totals(widths) <= limit.most
        return are_met

    def _allows(self, widths: IntArray, steps: IntArray) -> BoolArray:
        """Return which groups could be widened by their steps, each alone, ``(num_groups,)``."""
        slack = self.max_macs - self.space.macs_of_widths(widths)
        allowed: BoolArray = self.space.macs_increase(widths, steps) <= slack
        for limit in self.further:
            allowed &= limit.allows(widths, steps)
        return allowed

    def _widths(self, blocks: IntArray) -> IntArray:
        """Return kept filters per group, ``(..., num_groups)``.

        The last block of a group may be smaller.

        Args:
            blocks: Blocks per group, ``(..., num_groups)``.
        """
        widths: IntArray = np.minimum(blocks * self._multiples, self.space.max_widths)
        return widths

    def _steps(self, widths: IntArray) -> IntArray:
        """Return the filters that a further block adds to each group, ``(..., num_groups)``."""
        steps: IntArray = np.minimum(self._multiples, self.space.max_widths - widths)
        return steps

    @cached_property
    def _multiples(self) -> IntArray:
        """Size of the blocks of each group, ``(num_groups,)``."""
        return np.array([group.multiple for group in self.space.groups], dtype=np.int64)

    @cached_property
    def _group_of(self) -> NDArray[np.uint16]:
        """Group index of each filter, in 16 bits, which numpy sorts by radix in linear time."""
        if len(self.space.groups) > np.iinfo(np.uint16).max:
            raise ValueError(f"expected at most 65535 channel groups, got {len(self.space.groups)}")
        return self.space.group_of.astype(np.uint16)

    @cached_property
    def _rank_in_group(self) -> IntArray:
        """Rank of each position within its group, all groups ranked one after the other."""
        space = self.space
        return np.arange(space.num_filters) - space.offsets[space.group_of]

    @cached_property
    def _optional_medians(self) -> IntArray:
        """Positions of the optional blocks' median members, in the order of ``_rank_in_group``."""
        space, rank = self.space, self._rank_in_group
        multiples = self._multiples[space.group_of]
        block_starts = rank - rank % multiples
        block_sizes = np.minimum(multiples, space.max_widths[space.group_of] - block_starts)
        is_median = rank == block_starts + (block_sizes - 1) // 2
        is_optional = rank >= space.min_widths[space.group_of]
        is_optional &= rank < space.max_widths[space.group_of]
        return np.flatnonzero(is_median & is_optional)


def check_macs_cut(macs_cut: float, *, may_be_zero: bool = False) -> None:
    """Refuse a share of MACs to remove that is not in (0, 1).

    Args:
        macs_cut: Share of the dense network's MACs to remove.
        may_be_zero: Whether 0, no limit of MACs, is allowed because another resource is limited.

    Raises:
        ValueError: the cut is out of its range.
    """
    if not 0 < macs_cut < 1 and not (macs_cut == 0 and may_be_zero):
        raise ValueError(
            f"macs_cut must be in (0, 1), got {macs_cut}; 0.57 removes 57 % of the MACs, and 0 "
            "is allowed beside another cut"
        )


def check_macs_cuts(macs_cuts: tuple[float, ...], *, may_be_zero: bool = False) -> None:
    """Refuse cuts that do not ascend: each budget must be tighter than the one before.

    Args:
        macs_cuts: Shares of the dense network's MACs to remove.
        may_be_zero: Whether 0, no limit of MACs, is allowed because another resource is limited.

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


def _descending(priorities: FloatArray) -> IntArray:
    """Return the indices of each row from the highest priority to the lowest; ties go by index.

    A radix sort of 32-bit fixed-point numbers in two digits of 16 bits. It is twice as fast as
    sorting floats, and the same on every processor: numpy's vectorised float sort is not stable.

    Args:
        priorities: ``(num_masks, num_filters)``, finite.
    """
    highest = priorities.max(axis=1, keepdims=True)
    spread = highest - priorities.min(axis=1, keepdims=True)
    scale = np.divide(2**32 - 1, spread, out=np.zeros_like(spread), where=spread > 0)
    depth = np.rint((highest - priorities) * scale).astype(np.uint32)
    # Least significant digit first: the second sort keeps the first one's order among equals.
    orders: IntArray = np.argsort(depth.astype(np.uint16), axis=1, kind="stable")
    starts = priorities.shape[1] * np.arange(len(priorities))[:, None]
    high = (depth >> 16).astype(np.uint16).take(orders + starts)
    ordered: IntArray = orders.take(np.argsort(high, axis=1, kind="stable") + starts)
    return ordered
