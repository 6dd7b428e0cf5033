"""The unlabelled images of a user's task in a worker's process, and what they are used for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fppmo_ray.distribution import BoolArray, IntArray
from fppmo_ray.pruning import Tracing
from fppmo_ray.pruning.calibration import Calibration, DenseCalibration
from fppmo_ray.pruning.calibration.divergence import ANSWER_BATCH, DenseAnswers, divergence
from fppmo_ray.pruning.distillation import distill_pruned
from fppmo_ray.service.settings import SearchSettings
from fppmo_ray.training import recalibrate_batchnorm
from fppmo_ray.training.inputs import Inputs, collect_inputs

_HELD_OUT = 0.15  # share of search-val and of choose-val where the divergence is the score
_RECALIBRATION_BATCH = 250


class TaskImages:
    """Images that calibrate a dense network and, without a score of the task's own, score masks.

    They are drawn up in an order that does not depend on how they came. Where the divergence is the
    score, 15 % of them are search-val and 15 % choose-val, which no other step looks at.

    Args:
        given: Returns batches of images; called when they are needed first.
        examples: An example of each input of the forward, with a batch axis.
        tracing: Tracing of the dense network.
        settings: How many images calibrate, recalibrate and score.
        device: The worker's device.
        threads: CPUs that calibrate.
        holds_out: Whether some images are held out, to score masks.
    """

    def __init__(
        self,
        given: Callable[[], Iterable[Any]],
        examples: Sequence[Tensor],
        tracing: Tracing,
        settings: SearchSettings,
        device: torch.device,
        *,
        threads: int,
        holds_out: bool,
    ) -> None:
        self._given = given
        self._examples = examples
        self._tracing = tracing
        self._settings = settings
        self._device = device
        self._holds_out = holds_out
        self._num_inputs = len(examples)
        self._calibration = DenseCalibration(
            tracing, self._all_of_few, threads=threads, num_inputs=self._num_inputs
        )
        self._answers: dict[str, DenseAnswers] = {}
        """The last dense network's answers, by split."""

    def load(self) -> None:
        """Put all images on the device."""
        _ = self._splits

    @property
    def few(self) -> Inputs:
        """The calibration images."""
        return self._splits["calibration"]

    def calibration(self, dense: nn.Module) -> Calibration:
        """Return the calibration of a dense network.

        Args:
            dense: The dense network.
        """
        return self._calibration.of(dense)

    def refit(self, network: nn.Module, dense: nn.Module, keep: BoolArray) -> None:
        """Refit a pruned network, in place.

        Args:
            network: The network that the mask leaves.
            dense: The dense network.
            keep: The mask, ``(num_filters,)``.
        """
        self._calibration.refit(dense)(network, keep)

    def reconstruct(
        self, network: nn.Module, dense: nn.Module, keep: BoolArray, num_images: int | None
    ) -> None:
        """Correct the layers of a recalibrated network, in place.

        Args:
            network: The network that the mask leaves.
            dense: The dense network.
            keep: The mask, ``(num_filters,)``.
            num_images: How many calibration images to use; None: all.
        """
        self._calibration.reconstruct(dense, network, keep, num_images)

    def recalibrate(self, network: nn.Module, positions: IntArray) -> None:
        """Re-estimate the statistics of batch norms on calibration images, in place.

        Args:
            network: A pruned network.
            positions: Positions of the images to look at.
        """
        batches = self.few.batches(_RECALIBRATION_BATCH, positions)
        recalibrate_batchnorm(network, batches, num_inputs=self._num_inputs)

    def divergence(
        self, network: nn.Module, dense: nn.Module, split: str, rng: np.random.Generator
    ) -> float:
        """Return the mean divergence of a network from the dense network on held-out images.

        Args:
            network: Any network of the task.
            dense: The dense network.
            split: ``search_val`` or ``choose_val``.
            rng: Draws the images, where fewer are to be looked at than there are.
        """
        images, settings = self._splits[split], self._settings
        count = (
            settings.scoring.score_images
            if split == "search_val"
            else settings.scoring.rescore_images
        )
        drawn = np.sort(rng.permutation(len(images))[:count])
        known = self._answers.get(split)
        if known is None or known.dense is not dense:
            known = self._answers[split] = DenseAnswers(dense, images, self._num_inputs)
        batches = images.batches(ANSWER_BATCH, drawn)
        return divergence(network, batches, known.of(drawn), self._num_inputs)

    def distill(
        self, network: nn.Module, dense: nn.Module, keep: BoolArray, *, steps: int, seed: int
    ) -> None:
        """Distil a pruned network on the calibration images, in place.

        Args:
            network: What the mask leaves of the dense network.
            dense: The dense network.
            keep: The mask, ``(num_filters,)``.
            steps: Number of steps.
            seed: Random seed.
        """
        distill_pruned(
            *(network, dense, self._tracing, keep, self.few),
            steps=steps,
            seed=seed,
            num_inputs=self._num_inputs,
        )

    @cached_property
    def _splits(self) -> dict[str, Inputs]:
        """All images by split; ``calibration`` has those that are not held out, up to the limit."""
        images = collect_inputs(self._given(), self._examples, self._device)
        order = np.random.default_rng(0).permutation(len(images))
        held_out = max(1, round(_HELD_OUT * len(images))) if self._holds_out else 0
        if len(images) <= 2 * held_out:
            raise ValueError(
                f"images that calibrate and score must be at least 3, got {len(images)}; give 100 "
                "or more"
            )
        rest = order[2 * held_out :][: self._settings.calibration.calibration_images]
        return {
            "search_val": images.at(order[:held_out]),
            "choose_val": images.at(order[held_out : 2 * held_out]),
            "calibration": images.at(rest),
        }

    def _all_of_few(self) -> tuple[Inputs, IntArray]:
        return self.few, np.arange(len(self.few))
