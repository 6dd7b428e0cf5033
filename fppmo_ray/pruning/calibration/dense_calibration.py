"""The calibration of a dense network in one process, computed once for all its pruned networks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fppmo_ray.distribution.space import BoolArray, IntArray
from fppmo_ray.pruning.calibration.grams import Calibration, calibrate
from fppmo_ray.pruning.calibration.least_squares import Refit
from fppmo_ray.pruning.calibration.reconstruction import LayerTargets, layer_targets, reconstruct
from fppmo_ray.pruning.extract import Tracing
from fppmo_ray.training.images import Images
from fppmo_ray.training.inputs import Inputs, inputs_of

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
        self._targets: dict[int, LayerTargets | None] = {}
        """The last dense network's outputs, by number of images."""

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

    def reconstruct(
        self, dense: nn.Module, network: nn.Module, keep: BoolArray, num_images: int | None = None
    ) -> None:
        """Correct the layers of a pruned network, in place; see ``reconstruct``.

        With fewer than ten images, or memory for fewer, it stays as it is.

        Args:
            dense: The dense network that it is cut from.
            network: The pruned network, refitted and recalibrated.
            keep: The mask, ``(num_filters,)``.
            num_images: How many of the images to use; None: all.
        """
        self._results(dense)
        images, drawn = self._images()
        count = len(drawn) if num_images is None else min(num_images, len(drawn))
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        if count not in self._targets:
            batches = images.batches(_BATCH, drawn[:count])
            parts = zip(*(inputs_of(batch, self._num_inputs) for batch in batches), strict=True)
            inputs = [torch.cat(part) for part in parts]
            self._targets[count] = layer_targets(dense, self._tracing, inputs)
        targets = self._targets[count]
        if targets is not None:
            reconstruct(network, self._tracing, keep, targets)
        torch.set_num_threads(before)

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
            self._targets = {}
        return self._last
