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

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fppmo_ray.training.shards import Shard


def replicated(network: nn.Module, shard: Shard) -> nn.Module:
    """The network, wrapped so that its gradients are averaged over the processes.

    All begin with the weights and buffers of the first. What is trained is ``network`` itself.
    """
    if shard.count == 1:
        return network
    # Buffers are averaged at the end; the wrapper would copy the first replica's at every step.
    return DistributedDataParallel(network, broadcast_buffers=False)


@torch.no_grad()
def average_statistics(network: nn.Module, shard: Shard) -> None:
    """Give every replica the mean of all replicas' running statistics, in place."""
    if shard.count > 1:
        for buffer in network.buffers():
            if buffer.is_floating_point():
                distributed.all_reduce(buffer)
                buffer /= shard.count


def means_over_replicas(
    values: Sequence[float], shard: Shard, device: torch.device
) -> tuple[float, ...]:
    """The mean of each value over the processes, whose parts are of equal size."""
    if shard.count == 1:
        return tuple(values)
    sums = torch.tensor(values, device=device)
    distributed.all_reduce(sums)
    return tuple((sums / shard.count).tolist())
