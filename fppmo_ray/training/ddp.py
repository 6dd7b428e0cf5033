"""Training shared by processes that hold a replica of the network each.

Every process trains on its part of every batch, and gradients are averaged before each step (by
torch's DistributedDataParallel), so weights and momentum stay the same everywhere and are those of
one process with the whole batch. Batch norm is the exception: it normalises by the statistics of a
replica's own part, as most ImageNet recipes do, which wants 32 images or so in each. The running
statistics, which evaluation uses, are averaged over the replicas when an epoch ends.

Nothing here is done where there is one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Shard:
    """Which part of every batch a process trains on: part ``index`` of ``count`` equal ones."""

    index: int
    count: int

    def batch_size(self, whole: int) -> int:
        """Images of this part of a batch.

        Raises:
            ValueError: the batch cannot be parted evenly.
        """
        if whole % self.count or not whole:
            raise ValueError(
                f"a batch must part evenly among {self.count} workers, got {whole} images; choose "
                f"a batch_size that is a multiple of {self.count}"
            )
        return whole // self.count

    def rows(self, num_images: int, batch_size: int) -> Tensor:
        """Positions of this part's images in an epoch's order, batch by batch, int64.

        Args:
            num_images: Of the epoch: whole batches, or less than one.
            batch_size: Of a whole batch.

        Raises:
            ValueError: a batch cannot be parted evenly.
        """
        whole = min(batch_size, num_images)
        part = self.batch_size(whole)
        of_batches = torch.arange(num_images).reshape(-1, whole)
        return of_batches[:, self.index * part : (self.index + 1) * part].flatten()


WHOLE = Shard(0, 1)
"""The only one: all of every batch."""


def wrap_ddp(network: nn.Module, shard: Shard) -> nn.Module:
    """The network, wrapped so that its gradients are averaged over the processes.

    All begin with the weights and buffers of the first. What is trained is ``network`` itself.
    """
    if shard.count == 1:
        return network
    # Buffers are averaged at the end; the wrapper would copy the first replica's at every step.
    return DistributedDataParallel(network, broadcast_buffers=False)


@torch.no_grad()
def average_buffers(network: nn.Module, shard: Shard) -> None:
    """Give every replica the mean of all replicas' running statistics, in place."""
    if shard.count > 1:
        for buffer in network.buffers():
            if buffer.is_floating_point():
                distributed.all_reduce(buffer)
                buffer /= shard.count


def mean_over_replicas(
    values: Sequence[float], shard: Shard, device: torch.device
) -> tuple[float, ...]:
    """The mean of each value over the processes, whose parts are of equal size."""
    if shard.count == 1:
        return tuple(values)
    sums = torch.tensor(values, device=device)
    distributed.all_reduce(sums)
    return tuple((sums / shard.count).tolist())
