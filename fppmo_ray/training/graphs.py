"""Training passes that a GPU replays as a whole, instead of being told kernel by kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fppmo_ray.training.compute import DType
from fppmo_ray.training.modes import in_mode


@contextmanager
def captured_passes(network: nn.Module, images: Tensor, dtype: DType) -> Iterator[None]:
    """For a while, calls in training mode replay a captured forward and backward pass.

    A small network's kernels are over before the next one is launched, so launching is what takes
    the time. Evaluation is not affected. Batch-norm statistics move as in three training passes;
    torch's generators are left alone.

    Args:
        network: On a GPU, without hooks.
        images: A batch of the size of all that follow, on the same GPU; its numbers do not matter.
        dtype: Of the passes.

    Raises:
        ValueError: the images are not on a GPU, or the network has hooks.
        RuntimeError: something in the network cannot be captured, such as a look at a number.
    """
    if images.device.type != "cuda":
        raise ValueError(
            f"CUDA graphs need a CUDA device, the images are on {images.device}; "
            "use a compute configuration without cuda_graphs"
        )
    try:
        with torch.random.fork_rng([images.device]), in_mode(network, training=True):
            _capture(network, images, dtype)
        yield
    finally:
        # It stands in front of the class's own, holds the graphs' memory, and refers to the network
        # in a circle.
        network.__dict__.pop("forward", None)


def _capture(network: nn.Module, images: Tensor, dtype: DType) -> None:
    is_bfloat16 = dtype == "bfloat16"
    # What autocast would cache here could not be computed anew when it is replayed.
    with torch.autocast("cuda", torch.bfloat16, enabled=is_bfloat16, cache_enabled=False):
        try:
            torch.cuda.make_graphed_callables(network, (images,))
        except AssertionError as error:  # torch's word for a network with hooks
            raise ValueError(f"the network's passes cannot be captured: {error}") from error
