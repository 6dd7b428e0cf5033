"""Spaces small enough to write out, and scores whose best mask is known."""

from __future__ import annotations

import base64
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fppmo_ray.distribution import (
    BoolArray,
    ChannelGroup,
    Feedback,
    FloatArray,
    LayerCost,
    MaskOptimizer,
    OptimizerSettings,
    Proposal,
    PruningSpace,
    UpdateRule,
    Width,
)


def chain_space(sizes: list[int], multiple: int = 1, min_keep: float = 0.1) -> PruningSpace:
    """Layers one after the other, each with a group of its own, and a fixed classifier."""
    groups = tuple(ChannelGroup(name=f"conv{i}", num_filters=n) for i, n in enumerate(sizes))
    outputs = [Width(terms=((i, 1),)) for i in range(len(sizes))] + [Width(constant=10)]
    inputs = [Width(constant=3), *outputs[:-1]]
    costs = tuple(
        LayerCost(layer=f"conv{i}", macs_per_pair=9, out_width=out, in_width=into)
        for i, (out, into) in enumerate(zip(outputs, inputs, strict=True))
    )
    return PruningSpace(groups, costs).with_limits(min_keep=min_keep, multiple=multiple)


def resnet20_space() -> PruningSpace:
    """The inner layers of ResNet-20's nine blocks; the residual stream stays whole."""
    groups, costs = [], []
    for index, (width, area) in enumerate(zip([16, 32, 64], [1024, 256, 64], strict=True)):
        for block in range(3):
            group = len(groups)
            inner, stream = Width(terms=((group, 1),)), Width(constant=width)
            into = Width(constant=width // 2) if index and not block else stream
            groups.append(ChannelGroup(name=f"layer{index + 1}.{block}", num_filters=width))
            for out_width, in_width in ((inner, into), (stream, inner)):
                costs.append(
                    LayerCost(
                        layer=groups[-1].name,
                        macs_per_pair=9 * area,
                        out_width=out_width,
                        in_width=in_width,
                    )
                )
    stem_and_classifier = 27 * 16 * 1024 + 640
    return PruningSpace(tuple(groups), tuple(costs), stem_and_classifier).with_limits()


@dataclass(frozen=True, eq=False)
class Landscape:
    """A loss that is lowest at planted widths and with the filters of highest worth."""

    space: PruningSpace
    best_widths: tuple[int, ...]
    worth: FloatArray

    def loss(self, keep: BoolArray) -> float:
        space = self.space
        off = np.log(space.widths(keep) / np.array(self.best_widths))
        total = np.add.reduceat(self.worth, space.offsets)
        kept = np.add.reduceat(self.worth * keep, space.offsets)
        return float(2 * np.mean(off**2) + 0.9 * np.mean(1 - kept / total))


def resnet20_landscape(seed: int) -> tuple[Landscape, FloatArray]:
    """A landscape and an importance that knows a part of the filters' worth."""
    space = resnet20_space()
    rng = np.random.default_rng(seed)
    worth = rng.lognormal(size=space.num_filters)
    importance = np.sqrt(worth) * rng.lognormal(sigma=0.7, size=space.num_filters)
    return Landscape(space, (3, 5, 5, 23, 14, 5, 60, 30, 34), worth), importance


def small_importance(space: PruningSpace) -> FloatArray:
    """Different for all filters, neither rising nor falling with the index."""
    return 1.0 + np.arange(space.num_filters) * 7 % 11


def small_score(proposal: Proposal) -> Feedback:
    """Cheap, without ties, and with a preference for even filters."""
    weights = np.where(np.arange(len(proposal.keep)) % 2 == 0, 2.0, 0.5)
    weights += np.linspace(0, 0.1, len(weights))
    kept = float(weights @ proposal.keep / weights.sum())
    return Feedback(
        proposal_id=proposal.proposal_id,
        val_loss=1 - kept,
        val_accuracy=kept,
    )


def packed(keep: BoolArray) -> str:
    """A mask as base64 text of its packed bits."""
    return base64.b64encode(np.packbits(keep).tobytes()).decode("ascii")


def run_to_end(
    optimizer: MaskOptimizer, score: Callable[[Proposal], Feedback] = small_score
) -> list[Proposal]:
    """Search, telling everything as soon as it is asked; returns all proposals."""
    proposals = []
    while not optimizer.finished:
        asked = optimizer.ask()
        assert asked, "the search waits although nothing is in flight"
        proposals += asked
        for proposal in asked:
            optimizer.tell(score(proposal))
    return proposals


def run_shuffled(
    optimizer: MaskOptimizer, score: Callable[[Proposal], Feedback] = small_score
) -> list[Proposal]:
    """Search, asking rarely or often and telling in any order; returns all proposals."""
    shuffle = random.Random(0)
    flying, proposals = [], []
    while not optimizer.finished:
        while shuffle.random() < 0.7 and (asked := optimizer.ask()):
            flying += asked
            proposals += asked
        if flying:
            optimizer.tell(score(flying.pop(shuffle.randrange(len(flying)))))
    return proposals


def small_optimizer(
    rule: str | UpdateRule, space: PruningSpace | None = None, **changes
) -> MaskOptimizer:
    """A search over two dozen filters, five generations of at most six proposals."""
    space = space or chain_space([8, 8, 8])
    settings = {"macs_cut": 0.5, "num_proposals": 28, "population_size": 6, "seed": 3}
    return MaskOptimizer(
        space, small_importance(space), OptimizerSettings(rule=rule, **settings | changes)
    )
