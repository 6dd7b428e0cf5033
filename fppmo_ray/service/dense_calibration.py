"""The calibration of a dense network on a worker, computed once for all scores."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fppmo_ray.distribution import IntArray
from fppmo_ray.pruning import Tracing
from fppmo_ray.pruning.calibration import Calibration, Refit, calibrate
from fppmo_ray.training import Images
from fppmo_ray.training.inputs import Inputs

_BATCH = 50  # twice as fast on CPUs as 250, and the patches used vary more often


class DenseCalibration:
    """Calibrates the dense network that it is given, and remembers the last one's results.

    Every worker calibrates by itself and the same images: a worker that replaces a lost one or
    resumes a search needs nothing but the weights, and Gram matrices, which can take gigabytes,
    neither fill Ray's object store nor travel. The pass is computed in float32 with the threads
    that the worker holds, whatever the compute configuration of the search, so that all workers on
    equal processors find the same.

    Args:
        tracing: Tracing of the dense network.
        images: Returns images on the worker's device, and the positions of those to look at.
        threads: CPUs that the worker holds.
        num_inputs: How many tensors the network's forward takes.
    """

    def __init__(
        self,
        tracing: Tracing,
        images: Callable[[], tuple[Images | Inputs, IntArray]],
        *,
        threads: int,
        num_inputs: int = 1,
    ) -> None:
        self._tracing = tracing
        self._images = images
        self._threads = threads
        self._num_inputs = num_inputs
        self._last: tuple[nn.Module, Calibration, Refit] | None = None

    def of(self, dense: nn.Module) -> Calibration:
        """Return the calibration of a dense network.

        Args:
            dense: The dense network; another object must be given after a change of its weights.
        """
        return self._results(dense)[1]

    def refit(self, dense: nn.Module) -> Refit:
        """Return the function that refits pruned networks, with all that it has solved before.

        Args:
            dense: The dense network that they are cut from.
        """
        return self._results(dense)[2]

    def _results(self, dense: nn.Module) -> tuple[nn.Module, Calibration, Refit]:
        if self._last is None or self._last[0] is not dense:
            images, drawn = self._images()
            before = torch.get_num_threads()
            torch.set_num_threads(self._threads)
            found = calibrate(
                dense,
                self._tracing,
                images.batches(_BATCH, drawn),
                num_images=len(drawn),
                num_inputs=self._num_inputs,
            )
            torch.set_num_threads(before)
            self._last = dense, found, Refit(dense, self._tracing, found)
        return self._last
