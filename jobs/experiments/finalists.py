"""The masks that allocation, search and rivals end with, all scored on the same images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from rivals.rankings import with_random_widths
from rivals.searches import LeGR
from torch import nn
from untrained_methods import Study

from fppmo_ray.distribution import (
    RULES,
    BoolArray,
    Budget,
    Feedback,
    MaskOptimizer,
    OptimizerSettings,
    UpdateRule,
)
from fppmo_ray.distribution.allocation import allocation_masks
from fppmo_ray.pruning.calibration.divergence import Answers, answers, divergence
from fppmo_ray.pruning.calibration.features import last_feature_match
from fppmo_ray.training import ComputeConfig, Images, fold_batchnorm, lay_out
from fppmo_ray.training.distill import FEW_IMAGES, distill, endless_batches

ALLOCATION = "allocation"
_BATCH = 50
_RECALIBRATED_ON = 250
_NUM_SAMPLES = 3  # best scored masks among the finalists, as in a search


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """What the methods work on."""

    study: Study
    budget: Budget
    gammas: tuple[float, ...]
    capacity_weight: float
    score_images: int
    score_steps: int = 0
    """Steps of distillation on all images before a network is scored; 0: it is not trained."""
    scored: tuple[Images, Answers]
    """Images of the scores, with the dense network's answers."""
    chosen: tuple[Images, Answers]
    """Those of the choice."""

    def finalists(self, method: str) -> dict[str, BoolArray]:
        """The masks that a method ends with, by name; the allocation is always among them."""
        allocation = self.allocation()
        if method == ALLOCATION:
            return {ALLOCATION: allocation}
        name, scores = method.split()
        if name in RULES:
            return self._searched(RULES[name], int(scores))
        masks = self._drawn(name, int(scores))
        best = sorted(masks, key=lambda i: masks[i][1])[:_NUM_SAMPLES]
        return {ALLOCATION: allocation} | {f"sample {i}": masks[i][0] for i in best}

    def allocation(self) -> BoolArray:
        """The allocation of the weight that scores best."""
        order = self.study.order
        masks = [
            allocation_masks([self.budget], order.error_curves, order.importance, gamma=gamma)[0]
            for gamma in self.gammas
        ]
        if len(masks) == 1:
            return masks[0]
        return min(masks, key=lambda keep: self.cost(self.score(keep), keep))

    def score(self, keep: BoolArray) -> float:
        """The divergence that a score sees: on few images, in small batches."""
        if self.score_steps:
            made = self.distilled(keep, self.score_steps)
        elif self.score_images:
            made = self.study.reconstructed(keep, self.score_images)
        else:
            made = self.study.network(keep, np.arange(_RECALIBRATED_ON))
        network = fold_batchnorm(made.eval())
        lay_out(network, ComputeConfig(channels_last=True))
        images, known = self.scored
        return divergence(network, images.batches(_BATCH), known)

    def cost(self, distance: float, keep: BoolArray) -> float:
        """The divergence of a mask, weighed by the parameters that it leaves."""
        space = self.budget.space
        share = space.parameters(keep) / space.dense_parameters
        return distance * float(share**-self.capacity_weight)

    def distance(self, keep: BoolArray) -> float:
        """The divergence on the images of the choice, made on all images, as it is scored."""
        images, known = self.chosen
        made = self.distilled(keep, self.score_steps)
        return divergence(made, images.batches(_BATCH), known)

    def distilled(self, keep: BoolArray, steps: int) -> nn.Module:
        """The network that a mask leaves, reconstructed on all images and distilled on them.

        Args:
            keep: The mask, ``(num_filters,)``.
            steps: Steps of ``FEW_IMAGES``; 0: the network is reconstructed alone.
        """
        study = self.study
        network = study.reconstructed(keep)
        if not steps:
            return network
        image = next(study.images.batches(1))[0]
        matches = last_feature_match(network, study.dense, study.tracing, keep, image)
        batches = endless_batches(study.images, FEW_IMAGES.batch_size, seed=study.seed)
        distill(network, study.dense, batches, steps=steps, matches=matches)
        return network

    def _searched(self, rule: UpdateRule, scores: int) -> dict[str, BoolArray]:
        order = self.study.order
        settings = OptimizerSettings(
            macs_cut=1 - self.budget.max_macs / self.budget.space.dense_macs,
            num_proposals=scores,
            rule=rule,
            seed=self.study.seed,
            capacity_weight=self.capacity_weight,
        )
        start = [self.allocation()]
        search = MaskOptimizer(self.budget.space, order.importance, settings, allocations=start)
        while not search.finished:
            for proposal in search.ask():
                loss = self.score(proposal.keep)
                found = Feedback(proposal_id=proposal.proposal_id, val_loss=loss, val_accuracy=None)
                search.tell(found)
        finalists = search.finalists(_NUM_SAMPLES)
        return {item.name: item.keep for item in finalists if item.name != "importance-only"}

    def _drawn(self, name: str, scores: int) -> dict[int, tuple[BoolArray, float]]:
        """Masks and scores of a method that draws one mask after the other."""
        importance, seed = self.study.order.importance, self.study.seed
        legr = LeGR(self.budget, importance, scores, seed)
        masks: dict[int, tuple[BoolArray, float]] = {}
        for i in range(scores):
            if name == "legr":
                [keep] = legr(range(i, i + 1), {j: cost for j, (_, cost) in masks.items()})
            else:
                rng = np.random.default_rng([seed, i])
                keep = with_random_widths(self.budget, importance, rng)
            masks[i] = keep, self.cost(self.score(keep), keep)
        return masks


def with_answers(dense: nn.Module, images: Images) -> tuple[Images, Answers]:
    """Images, and what the dense network answers to them.

    Args:
        dense: The dense network.
        images: The images.
    """
    return images, answers(dense, images.batches(_BATCH))
