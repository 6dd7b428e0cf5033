"""The space of masks: which filters can be removed, and what every pruned network costs.

A space is plain numbers. A network is traced once (``fppmo_ray.pruning.trace``); from then on its
exact multiply-accumulates and parameters follow from the widths, without building it.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from fppmo_ray.distribution.costs import (
    Activations,
    BoolArray,
    FloatArray,
    IntArray,
    Products,
    TensorSize,
    Width,
    as_products,
)
from fppmo_ray.distribution.latency_table import LatencyTable

__all__ = [
    "BoolArray",
    "ChannelGroup",
    "FloatArray",
    "IntArray",
    "LayerCost",
    "PruningSpace",
    "TensorSize",
    "Width",
    "legal_max_width",
    "legal_min_width",
]

_GPU_MULTIPLE = 8  # channels in bfloat16 that matrix units read at once
# Filters from which on multiples of 8 leave enough widths to choose from. In narrow layers they
# cost accuracy: layers of 16 filters have two such widths, and a search on a CIFAR ResNet with
# multiples of 8 everywhere ended at 51.7 % instead of 63.4 %.
_WIDE = 64


@dataclass(frozen=True, kw_only=True)
class ChannelGroup:
    """Filters of one or several layers that are coupled by index: they are removed together.

    Raises:
        ValueError: a limit is out of its range.
    """

    name: str
    """Name of the first layer that produces these channels."""
    num_filters: int
    """Number of filters in the dense network, at least 1."""
    min_keep: int = 1
    """Fewest filters that a mask may keep, in [1, num_filters]."""
    multiple: int = 1
    """Legal widths are multiples of this, at least 1; ``num_filters`` is always legal too, unless
    ``max_keep`` is lower."""
    max_keep: int | None = None
    """Most filters that a mask may keep, in [min_keep, num_filters]; None: all."""
    floor: int = 1
    """Fewest filters with which the network still computes the same, at least 1: its code decides
    otherwise below. ``min_keep`` is never less."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_keep <= self.num_filters:
            raise ValueError(
                f"min_keep of group {self.name} must be in [1, {self.num_filters}], "
                f"got {self.min_keep}"
            )
        if self.max_keep is not None and not self.min_keep <= self.max_keep <= self.num_filters:
            raise ValueError(
                f"max_keep of group {self.name} must be in [{self.min_keep}, {self.num_filters}], "
                f"got {self.max_keep}"
            )
        if self.multiple < 1:
            raise ValueError(f"multiple of group {self.name} must be >= 1, got {self.multiple}")


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """Multiply-accumulates of one layer: ``macs_per_pair * out_width * in_width``."""

    layer: str
    """Name of the layer."""
    macs_per_pair: int
    """Multiply-accumulates per pair of output and input channel for one input, >= 0."""
    out_width: Width
    """Number of output channels."""
    in_width: Width
    """Number of input channels."""


@dataclass(frozen=True)
class PruningSpace:
    """All channel groups of a network, in order, and its cost at all widths.

    A mask ``keep`` is a bool array ``(num_filters,)`` over all groups, one after the other;
    True means kept.

    Raises:
        ValueError: there is no group.
    """

    groups: tuple[ChannelGroup, ...]
    """The channel groups, at least one."""
    layer_costs: tuple[LayerCost, ...]
    """Multiply-accumulates of the layers whose widths depend on the mask."""
    constant_macs: int = 0
    """Multiply-accumulates of all other layers for one input."""
    tensor_sizes: tuple[TensorSize, ...] = ()
    """Elements of the parameters whose size depends on the mask; empty if unknown."""
    constant_parameters: int = 0
    """Elements of all other parameters."""
    activations: Activations | None = None
    """The tensors that an inference of one image makes; None if unknown."""
    latency: LatencyTable | None = None
    """Measured latency; None as long as it is not measured."""

    def __post_init__(self) -> None:
        if not self.groups:
            raise ValueError("a pruning space needs at least one channel group, got none")

    @cached_property
    def num_filters(self) -> int:
        """Number of filters of all groups, the length of a mask."""
        return sum(group.num_filters for group in self.groups)

    @cached_property
    def offsets(self) -> IntArray:
        """Index of each group's first filter in a mask, ``(num_groups,)``."""
        sizes = [group.num_filters for group in self.groups]
        return np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)

    @cached_property
    def group_of(self) -> IntArray:
        """Group index of every filter, ``(num_filters,)``."""
        sizes = [group.num_filters for group in self.groups]
        return np.repeat(np.arange(len(sizes)), sizes).astype(np.int64)

    @cached_property
    def dense_widths(self) -> IntArray:
        """Filters per group of the dense network, ``(num_groups,)``."""
        return np.array([group.num_filters for group in self.groups], dtype=np.int64)

    @cached_property
    def dense_macs(self) -> int:
        """Multiply-accumulates of the dense network for one input."""
        return self.macs_of_widths(self.dense_widths)

    @cached_property
    def min_widths(self) -> IntArray:
        """Smallest legal number of kept filters per group, ``(num_groups,)``."""
        return np.array([legal_min_width(group) for group in self.groups], dtype=np.int64)

    @cached_property
    def max_widths(self) -> IntArray:
        """Largest legal number of kept filters per group, ``(num_groups,)``."""
        return np.array([legal_max_width(group) for group in self.groups], dtype=np.int64)

    @cached_property
    def min_macs(self) -> int:
        """Multiply-accumulates with every group at its smallest legal width."""
        return self.macs_of_widths(self.min_widths)

    @cached_property
    def macs_cost(self) -> Products:
        """Multiply-accumulates as a function of widths."""
        products = [(c.macs_per_pair, c.out_width, c.in_width) for c in self.layer_costs]
        return Products(products, len(self.groups), self.constant_macs)

    @cached_property
    def parameters_cost(self) -> Products:
        """Parameters as a function of widths."""
        return as_products(self.tensor_sizes, len(self.groups), self.constant_parameters)

    def widths(self, keep: BoolArray) -> IntArray:
        """Return the kept filters per group, ``(num_groups,)``."""
        return np.add.reduceat(keep, self.offsets, dtype=np.int64)

    def macs(self, keep: BoolArray) -> int:
        """Return the exact multiply-accumulates of the pruned network for one input."""
        return self.macs_of_widths(self.widths(keep))

    def macs_of_masks(self, masks: BoolArray) -> list[int]:
        """Return ``macs`` of several masks, ``(num_masks, num_filters)``, in far less time."""
        totals: list[int] = self.macs_cost.totals(self._widths_of_masks(masks)).tolist()
        return totals

    def parameters_of_masks(self, masks: BoolArray) -> list[int]:
        """Return ``parameters`` of several masks, ``(num_masks, num_filters)``."""
        totals: list[int] = self.parameters_cost.totals(self._widths_of_masks(masks)).tolist()
        return totals

    def _widths_of_masks(self, masks: BoolArray) -> IntArray:
        widths: IntArray = np.add.reduceat(masks, self.offsets, axis=1, dtype=np.int64)
        return widths

    def macs_of_widths(self, widths: IntArray) -> int:
        """Return the exact multiply-accumulates at kept filters per group, ``(num_groups,)``."""
        return self.macs_cost.total(widths)

    def parameters(self, keep: BoolArray) -> int:
        """Return the exact number of parameters of the pruned network."""
        return self.parameters_cost.total(self.widths(keep))

    @cached_property
    def dense_parameters(self) -> int:
        """Number of parameters of the dense network."""
        return self.parameters(np.ones(self.num_filters, dtype=np.bool_))

    def expected_macs(self, widths: FloatArray) -> float:
        """Return the multiply-accumulates at fractional kept filters per group, ``(num_groups,)``.

        The covariance of a layer's input and output widths is left out: it is small, and masks
        meet their budget exactly because ``Budget.fill`` counts the exact cost.
        """
        return self.macs_cost.expected(widths)

    def macs_increase(self, widths: IntArray, steps: IntArray) -> IntArray:
        """Return how many MACs widening each group alone would add, ``(..., num_groups)``.

        Args:
            widths: Kept filters per group, ``(..., num_groups)``.
            steps: Filters to add to each group, ``(..., num_groups)``.
        """
        return self.macs_cost.increase(widths, steps)

    def with_limits(
        self,
        *,
        min_keep: float = 0.1,
        multiple: int | Literal["wide"] = 1,
        layers: Mapping[str, tuple[float, float]] | None = None,
    ) -> PruningSpace:
        """Return this space with limits on the width of every group.

        Args:
            min_keep: Smallest share of a group's filters that may be kept, in (0, 1]; at least
                one filter always stays.
            multiple: Legal widths are multiples of this, at least 1. ``wide``: multiples of 8,
                which suits GPUs, in groups of at least 64 filters, any width in others.
            layers: For layers by name, the smallest and largest share of filters that their groups
                may keep, in (0, 1]. Names may hold the wildcards ``*`` and ``?``; a later entry
                overrides an earlier one.

        Raises:
            ValueError: a limit is out of its range, or no group holds filters of a named layer.
        """
        if not 0 < min_keep <= 1:
            raise ValueError(f"min_keep must be in (0, 1], got {min_keep}")
        if multiple != "wide" and not (isinstance(multiple, int) and multiple >= 1):
            raise ValueError(f"multiple must be 'wide' or a number >= 1, got {multiple!r}")
        shares = self._shares(min_keep, layers or {})
        return replace(
            self,
            groups=tuple(
                replace(
                    group,
                    min_keep=(least := max(group.floor, math.ceil(low * group.num_filters))),
                    multiple=_wide_multiple(group) if multiple == "wide" else multiple,
                    max_keep=None if high == 1 else max(least, int(high * group.num_filters)),
                )
                for group, (low, high) in zip(self.groups, shares, strict=True)
            ),
        )

    def _shares(
        self, min_keep: float, layers: Mapping[str, tuple[float, float]]
    ) -> list[tuple[float, float]]:
        """Return the smallest and largest share of filters that each group may keep."""
        # A group is found by its own name and by every layer whose output it widens.
        makers = [{group.name} for group in self.groups]
        for cost in self.layer_costs:
            for index, _ in cost.out_width.terms:
                makers[index].add(cost.layer)
        shares = [(min_keep, 1.0)] * len(makers)
        for pattern, (low, high) in layers.items():
            if not 0 < low <= high <= 1:
                raise ValueError(
                    f"limits of {pattern} must be shares 0 < smallest <= largest <= 1, got "
                    f"{low} and {high}"
                )
            found = [i for i, names in enumerate(makers) if fnmatch.filter(names, pattern)]
            if not found:
                raise ValueError(
                    f"no channel group holds filters of {pattern!r}; the groups are "
                    f"{', '.join(group.name for group in self.groups)}"
                )
            for index in found:
                shares[index] = (low, high)
        return shares

    def within(self, keep: BoolArray) -> PruningSpace:
        """Return the space of the filters that a mask keeps, in order.

        A mask of the smaller space costs the same as the same filters cost here.

        Args:
            keep: ``(num_filters,)``, True = kept, with a legal width in every group.
        """
        return replace(
            self,
            groups=tuple(
                replace(
                    group,
                    num_filters=width,
                    min_keep=min(legal_min_width(group), width),
                    max_keep=None,
                )
                for group, width in zip(self.groups, self.widths(keep).tolist(), strict=True)
            ),
        )

    def fingerprint(self) -> str:
        """Return the SHA-256 of the space; a search resumes only with the space that it began with.

        The sizes of tensors and activations are left out, since they follow from the network, and
        so is the latency table, which is an artifact of its own. Floors stand in ``min_keep``.
        """
        groups = [asdict(group) for group in self.groups]
        for group in groups:
            group.pop("floor")
        data = {
            "groups": groups,
            "layer_costs": [asdict(cost) for cost in self.layer_costs],
            "constant_macs": self.constant_macs,
        }
        text = json.dumps(data, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def _wide_multiple(group: ChannelGroup) -> int:
    return _GPU_MULTIPLE if group.num_filters >= _WIDE else 1


def legal_min_width(group: ChannelGroup) -> int:
    """Return the smallest legal width: ``min_keep`` rounded up to the multiple, or all filters."""
    rounded = math.ceil(group.min_keep / group.multiple) * group.multiple
    return min(rounded, group.num_filters)


def legal_max_width(group: ChannelGroup) -> int:
    """Return the largest legal width: ``max_keep`` rounded down to the multiple, or all."""
    if group.max_keep is None or group.max_keep == group.num_filters:
        return group.num_filters
    rounded = group.max_keep // group.multiple * group.multiple
    return max(rounded, legal_min_width(group))
