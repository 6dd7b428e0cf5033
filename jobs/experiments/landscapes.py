"""Spaces of networks and losses of their masks that cost nothing, modelled on a real search."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fppmo_ray.distribution import (
    BoolArray,
    Budget,
    ChannelGroup,
    FloatArray,
    IntArray,
    LayerCost,
    PruningSpace,
    Width,
)
from fppmo_ray.distribution.logits import rank_in_layer, start_logits, uniform_priority


def cifar_space(blocks: int) -> PruningSpace:
    """Return the space of the inner layers of a CIFAR ResNet; its residual stream stays whole.

    Args:
        blocks: Basic blocks per stage.
    """
    groups: list[ChannelGroup] = []
    costs: list[LayerCost] = []
    for stage, (width, area) in enumerate(zip([16, 32, 64], [1024, 256, 64], strict=True)):
        for block in range(blocks):
            inner, stream = Width(terms=((len(groups), 1),)), Width(constant=width)
            into = Width(constant=width // 2) if stage and not block else stream
            groups.append(ChannelGroup(name=f"layer{stage + 1}.{block}", num_filters=width))
            costs += [_cost(9 * area, inner, into), _cost(9 * area, stream, inner)]
    stem_and_classifier = 27 * 16 * 1024 + 640
    return PruningSpace(tuple(groups), tuple(costs), stem_and_classifier).with_limits()


def bottleneck_space() -> PruningSpace:
    """Return the space of the two inner layers of ResNet-50's blocks; its stream stays whole."""
    groups: list[ChannelGroup] = []
    costs: list[LayerCost] = []
    into = 64
    stages = zip([64, 128, 256, 512], [3136, 784, 196, 49], [3, 4, 6, 3], strict=True)
    for stage, (width, area, blocks) in enumerate(stages):
        for block in range(blocks):
            reduced, inner = (Width(terms=((len(groups) + i, 1),)) for i in range(2))
            groups += [
                ChannelGroup(name=f"layer{stage + 1}.{block}.conv{i}", num_filters=width)
                for i in range(2)
            ]
            stream = Width(constant=4 * width)
            costs += [
                _cost(area * (4 if stage and not block else 1), reduced, Width(constant=into)),
                _cost(9 * area, inner, reduced),
                _cost(area, stream, inner),
            ]
            into = 4 * width
    stem_shortcuts_and_classifier = 479_723_520
    return PruningSpace(tuple(groups), tuple(costs), stem_shortcuts_and_classifier).with_limits()


def _cost(macs_per_pair: int, out_width: Width, in_width: Width) -> LayerCost:
    return LayerCost(
        layer="conv", macs_per_pair=macs_per_pair, out_width=out_width, in_width=in_width
    )


SPACES = {
    "resnet20": cifar_space(3),
    "resnet56": cifar_space(9),
    "resnet50": bottleneck_space(),
}


# Of a search on ResNet-20 (57 % cut, 320 recalibrate-only scores, layer_es, seed 0), by a Gaussian
# process on its masks: about half of a generation's variance is widths, half is which filters; a
# layer's L1 norms say next to nothing of its filters' fitted worth; rescoring has 0.03 of the
# first generation's spread, all that the model leaves unexplained 0.16. The importance-only mask is
# 0.4 spreads better than the first generation's mean, the mode in the end 4.6, and still gaining.
# The ranges below give 0.4 to 0.6, and 1 and 5 to 6 spreads. Deeper scores of fewer images are
# noisier, other criteria are better.
_KNOWN_WORTH = 0.1, 0.6  # correlation of log importance and log worth
_WORTH_SPREAD = 0.3, 0.5  # standard deviation of the log worth
_NOISES = 0.05, 0.15, 0.4  # in spreads of first samples
_CUT = 0.57


@dataclass(frozen=True, kw_only=True, eq=False)
class Landscape:
    """A loss that sums over layers what too little worth costs, the more the less is left.

    Filters of a layer come in clusters that do the same: the worths kept of a cluster add up like
    the sides of a right triangle. What is left of a layer is the share of its worth that is kept;
    losing in two neighbouring layers costs more than both.
    """

    budget: Budget
    importance: FloatArray
    worth: FloatArray
    """``(num_filters,)``, cluster by cluster."""
    cluster_starts: IntArray
    """Where clusters start; none crosses a border of groups."""
    cost: FloatArray
    steepness: FloatArray
    """``(num_groups,)``: losing all but a share q of the worth costs cost * (q^-steepness - 1)."""
    together: FloatArray
    """``(num_groups - 1,)``: cost of losing in a group and the next."""
    relative_noise: float

    @property
    def space(self) -> PruningSpace:
        """The space of the masks."""
        return self.budget.space

    def loss(self, keep: BoolArray) -> FloatArray:
        """Return the losses without noise of masks ``(num_masks, num_filters)``."""
        lost = -np.log(self._kept_worth(keep) / self._total_worth)
        alone = self.cost * np.expm1(self.steepness * lost)
        total: FloatArray = alone.sum(axis=1)
        total += (self.together * lost[:, 1:] * lost[:, :-1]).sum(axis=1)
        return total

    def gain(self, keep: BoolArray) -> FloatArray:
        """Return how far masks get from the importance-only mask (0) to the best known one (1)."""
        gain: FloatArray = (self._start - self.loss(keep)) / (self._start - self._best_known)
        return gain

    @cached_property
    def noise(self) -> float:
        """Standard deviation of a score's noise."""
        rng = np.random.default_rng(0)
        shape = (64, self.space.num_filters)
        priorities = start_logits(self.budget, self.importance) + rng.logistic(size=shape)
        masks = np.array([self.budget.fill(priority) for priority in priorities])
        return self.relative_noise * float(self.loss(masks).std())

    @cached_property
    def _start(self) -> float:
        keep = self.budget.fill(uniform_priority(self.space, self.importance))
        return float(self.loss(keep[None])[0])

    @cached_property
    def _best_known(self) -> float:
        """By what each filter gains for its MACs where the widths are by now, over and over."""
        space = self.space
        rank = rank_in_layer(space, self._worth_beside_better)
        best_first = np.lexsort((rank, space.group_of))
        keep = self.budget.fill(-rank / space.dense_widths[space.group_of])
        priority, best = np.zeros(space.num_filters), np.inf
        for _ in range(80):
            best = min(best, float(self.loss(keep[None])[0]))
            macs = space.macs_increase(space.widths(keep), np.ones(len(space.groups), dtype=int))
            wanted = np.log(self._gains(best_first, keep) / macs[space.group_of])
            priority = 0.8 * priority + 0.2 * wanted
            keep = self.budget.fill(priority)
        return best

    def _gains(self, best_first: IntArray, keep: BoolArray) -> FloatArray:
        """What each filter takes off the loss when it is added to the better ones of its layer."""
        group = self.space.group_of
        worths = self._worth_beside_better[best_first]
        before_layer = np.append(0, np.cumsum(self._total_worth))[group]
        after = (np.cumsum(worths) - before_layer) / self._total_worth[group]
        before = np.maximum(after - worths / self._total_worth[group], 1e-3)
        lost = -np.log(self._kept_worth(keep[None])[0] / self._total_worth)
        beside = np.append(self.together * lost[1:], 0) + np.append(0, self.together * lost[:-1])
        alone = self.cost[group] * (
            before ** -self.steepness[group] - after ** -self.steepness[group]
        )
        gains = np.empty(len(group))
        gains[best_first] = alone + beside[group] * np.log(after / before)
        return gains

    @cached_property
    def _worth_beside_better(self) -> FloatArray:
        """What each filter adds to the better ones of its cluster."""
        cluster = np.repeat(
            np.arange(len(self.cluster_starts)),
            np.diff(np.append(self.cluster_starts, len(self.worth))),
        )
        order = np.lexsort((-self.worth, cluster))
        sums = np.cumsum(self.worth[order] ** 2)
        before_cluster = np.append(0, sums)[self.cluster_starts][cluster]
        added = np.empty(len(self.worth))
        after = np.sqrt(sums - before_cluster)
        before = np.sqrt(np.maximum(sums - self.worth[order] ** 2 - before_cluster, 0))
        added[order] = after - before
        return added

    def _kept_worth(self, keep: BoolArray) -> FloatArray:
        squares = np.add.reduceat(self.worth**2 * keep, self.cluster_starts, axis=1)
        group_starts = np.searchsorted(self.cluster_starts, self.space.offsets)
        kept: FloatArray = np.add.reduceat(np.sqrt(squares), group_starts, axis=1)
        return kept

    @cached_property
    def _total_worth(self) -> FloatArray:
        total: FloatArray = self._kept_worth(np.ones((1, self.space.num_filters), dtype=bool))[0]
        return total


def landscape(space: PruningSpace, seed: int) -> Landscape:
    """Return one of many landscapes of a space.

    Args:
        space: The space of the masks.
        seed: Number of the landscape.
    """
    rng = np.random.default_rng(seed)
    num_groups, num_filters = len(space.groups), space.num_filters
    log_worth = rng.standard_normal(num_filters)
    known = rng.uniform(*_KNOWN_WORTH)
    log_importance = known * log_worth + np.sqrt(1 - known**2) * rng.standard_normal(num_filters)
    cost = rng.lognormal(sigma=0.6, size=num_groups)
    starts_cluster = rng.random(num_filters) < 0.4  # of 2.5 filters in the mean
    starts_cluster[space.offsets] = True
    return Landscape(
        budget=Budget.from_cut(space, _CUT),
        importance=np.exp(0.5 * log_importance),
        worth=np.exp(rng.uniform(*_WORTH_SPREAD) * log_worth),
        cluster_starts=np.flatnonzero(starts_cluster),
        cost=cost,
        steepness=rng.uniform(0.3, 1.0, num_groups),
        together=0.3 * rng.random(num_groups - 1) * np.sqrt(cost[1:] * cost[:-1]),
        relative_noise=_NOISES[seed % len(_NOISES)],
    )
