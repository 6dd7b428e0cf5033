"""Parts of batches, for processes that share a training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
