"""Training steps as CUDA graphs: captured once, then replayed with a single launch each.

The kernels of a small network finish before the next one is launched, so launching dominates the
time: a step of a ResNet-110 that distils launches about 1,900 of them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fppmo_ray.training.device import device_module

Step = Callable[[Tensor, Tensor], None]
"""Trains on a batch of images and labels. It reads no tensor's value, and keeps none for itself."""

_NUM_LAUNCHED = 3
"""Steps before the capture. They make what a capture must not: momentum, cuDNN's choices."""


@contextmanager
def replayed(step: Step, device: torch.device) -> Iterator[Step]:
    """Yield a function that trains as the step does, and replays a CUDA graph of it.

    The first three batches are trained on without a graph. Everything that the graph holds is freed
    at the end. Gradients lie in its memory, so drop them before.

    Args:
        step: The step, forward and backward pass and optimizer; all batches have equal shapes.
        device: The GPU that it computes on.

    Raises:
        ValueError: the device is no GPU.
        RuntimeError: the step cannot be captured, for instance because the network reads a tensor's
            value.
    """
    if device.type == "cpu":
        raise ValueError(
            f"CUDA graphs need a CUDA device, the images are on {device}; "
            "use a compute configuration without cuda_graphs"
        )
    graphed = _GraphedStep(step, device)
    try:
        yield graphed
    finally:
        graphed.free()


class _GraphedStep:
    def __init__(self, step: Step, device: torch.device) -> None:
        self._step = step
        self._gpu = device_module(device)
        self._stream = self._gpu.Stream()
        self._num_launched = 0
        self._graph = self._gpu.CUDAGraph()
        self._batch: tuple[Tensor, ...] = ()
        """The memory from which the graph reads images and labels."""

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        if self._num_launched < _NUM_LAUNCHED:
            self._num_launched += 1
            self._launch(images, labels)
            return
        if not self._batch:
            self._capture(images, labels)
        for own, given in zip(self._batch, (images, labels), strict=True):
            assert own.shape == given.shape  # training batches are of equal size
            own.copy_(given)
        self._graph.replay()

    def free(self) -> None:
        """Free the graph and its memory."""
        if self._batch:
            self._graph.reset()
            self._batch = ()
            # torch returns a graph's memory to other allocations only with its cache.
            self._gpu.empty_cache()

    def _launch(self, images: Tensor, labels: Tensor) -> None:
        """Take the step on the stream of the capture, where autograd's nodes then belong."""
        self._stream.wait_stream(self._gpu.current_stream())
        with self._gpu.stream(self._stream):
            self._step(images, labels)
        self._gpu.current_stream().wait_stream(self._stream)

    def _capture(self, images: Tensor, labels: Tensor) -> None:
        self._batch = images.clone(), labels.clone()
        # Other threads, such as NCCL's, may call CUDA meanwhile.
        capture = self._gpu.graph(
            self._graph, stream=self._stream, capture_error_mode="thread_local"
        )
        try:
            with _no_garbage_collection(), capture:
                self._step(*self._batch)
        except RuntimeError as error:
            raise RuntimeError(
                f"the training step cannot be captured in a CUDA graph: {error}; use a compute "
                "configuration without cuda_graphs"
            ) from error


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keep the collector from freeing another graph, which would invalidate a capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
