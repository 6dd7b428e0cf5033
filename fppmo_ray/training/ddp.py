"""Data-parallel training: processes that hold a replica of the network each and share batches.

Every process trains on its part of every batch. DistributedDataParallel averages the gradients
before each step, so weights and momentum are equal everywhere and are those of one process with the
whole batch. Batch norm differs: it normalises by the statistics of the replica's own part, as most
ImageNet recipes do, which needs about 32 images per part. Of smaller parts on GPUs it takes the
statistics of the whole batch, which the replicas exchange in every layer. The running statistics,
which evaluation uses, are averaged over the replicas at the end of an epoch.
The distance of two networks' features differs too, by a little: it is relative to the variance of
the replica's own part.

With one process all functions here return their input unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Shard:
    """The part of every batch that one process trains on."""

    index: int
    """Number of the part, in [0, count)."""
    count: int
    """Number of equal parts, which is the number of processes."""

    def batch_size(self, whole: int) -> int:
        """Return the number of images in this part of a batch.

        Args:
            whole: Number of images in the whole batch.

        Raises:
            ValueError: the batch cannot be divided evenly.
        """
        if whole % self.count or not whole:
            raise ValueError(
                f"a batch must divide evenly among {self.count} workers, got {whole} images; "
                f"choose a batch_size that is a multiple of {self.count}"
            )
        return whole // self.count

    def rows(self, num_images: int, batch_size: int) -> Tensor:
        """Return the positions of this part's images in an epoch's order, batch by batch, int64.

        Args:
            num_images: Images of the epoch: a multiple of ``batch_size``, or fewer than one batch.
            batch_size: Images of a whole batch.

        Raises:
            ValueError: a batch cannot be divided evenly.
        """
        whole = min(batch_size, num_images)
        part = self.batch_size(whole)
        of_batches = torch.arange(num_images).reshape(-1, whole)
        return of_batches[:, self.index * part : (self.index + 1) * part].flatten()


WHOLE = Shard(0, 1)
"""The shard of a single process: all images of every batch."""


ENOUGH_IMAGES = 32
"""Images whose statistics are steady enough for a batch norm to normalise by."""


def wrap_ddp(network: nn.Module, shard: Shard, batch_size: int) -> nn.Module:
    """Wrap a network so that its gradients are averaged over the processes.

    All replicas start from the weights and buffers of process 0. Training the wrapper trains
    ``network`` itself, whose batch norms are replaced by synchronised ones, in place, where parts
    are small and on a GPU.

    Args:
        network: The network to train.
        shard: The part of this process; with a single process, the network is returned unwrapped.
        batch_size: Images of a whole batch.
    """
    if shard.count == 1:
        return network
    on_gpu = any(parameter.device.type != "cpu" for parameter in network.parameters())
    if on_gpu and shard.batch_size(batch_size) < ENOUGH_IMAGES:
        convert: Any = nn.SyncBatchNorm.convert_sync_batchnorm
        network = convert(network)
    # Buffers are averaged once per epoch; the wrapper would broadcast replica 0's at every step.
    return DistributedDataParallel(network, broadcast_buffers=False)


@torch.no_grad()
def average_buffers(network: nn.Module, shard: Shard) -> None:
    """Set the running statistics of every replica to their mean over all replicas, in place.

    Args:
        network: This process's replica.
        shard: The part of this process.
    """
    if shard.count > 1:
        for buffer in network.buffers():
            if buffer.is_floating_point():
                distributed.all_reduce(buffer)
                buffer /= shard.count


def mean_over_replicas(
    values: Sequence[float], shard: Shard, device: torch.device
) -> tuple[float, ...]:
    """Return the mean of each value over the processes, whose parts are of equal size.

    Args:
        values: This process's values.
        shard: The part of this process.
        device: Device on which the processes exchange the values.
    """
    if shard.count == 1:
        return tuple(values)
    sums = torch.tensor(values).to(device)
    distributed.all_reduce(sums)
    return tuple((sums / shard.count).tolist())
