"""The moving average of a network's weights along its training."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fppmo_ray.training.images import Images
from fppmo_ray.training.recalibrate import recalibrate_batchnorm

_BATCH, _BATCHES = 250, 8


class WeightAverage:
    """Follows trained weights: ``average = d * average + (1 - d) * weights`` after every step.

    At step t of the whole training, counted from 0, d is ``min(decay, (1 + t) / (10 + t))``: where
    training began is soon forgotten. Training itself goes on as without it.

    Args:
        network: Its trained parameters are followed; the average starts from their values now.
        decay: In (0, 1).
        first_step: t of the next step.
    """

    def __init__(self, network: nn.Module, decay: float, first_step: int) -> None:
        self._decay, self._step = decay, first_step
        self._weights = [weight for weight in network.parameters() if weight.requires_grad]
        self._average = [weight.detach().clone() for weight in self._weights]

    def follow(self, optimizer: SGD) -> None:
        """Take in what the weights become by each of the optimizer's steps."""
        optimizer.register_step_post_hook(self._take_in)

    @torch.no_grad()
    def replace_weights(self, network: nn.Module, images: Images) -> None:
        """Put the average into its network, in place, with batch-norm statistics of its own.

        Averaged statistics would be those of the networks on the way, which differ from the
        average's the more the longer the average reaches back, so they are measured (as in
        stochastic weight averaging, 1803.05407, section 3.2).

        Args:
            network: The one that is followed.
            images: Search-train.
        """
        for weight, average in zip(self._weights, self._average, strict=True):
            weight.copy_(average)
        # Evenly from all rows, since folders of images are sorted by class.
        count = min(_BATCH * _BATCHES, len(images))
        rows = np.arange(count) * len(images) // count
        recalibrate_batchnorm(network, images.batches(_BATCH, rows))

    def _take_in(self, *_: Any) -> None:
        decay = min(self._decay, (1 + self._step) / (10 + self._step))
        take_in = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        take_in(self._average, self._weights, self._step)
        self._step += 1
