"""Parts of batches: together they are the whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from fppmo_ray.testing.pretended_gpu import PretendedGpu
from fppmo_ray.training import (
    Images,
    Shard,
    Transform,
    ddp,
    load_dataset,
    load_imagenet,
    open_images,
)


def digits() -> Images:
    dataset = load_dataset("digits")
    return open_images(dataset.train, np.arange(50), dataset)


def random_parts(folder: Path) -> Images:
    for part in ("train", "val"):
        (folder / part / "only").mkdir(parents=True)
        for row in range(10):
            pixels = np.full((12, 12, 3), 20 * row, np.uint8)
            Image.fromarray(pixels).save(folder / part / "only" / f"{row}.png")
    dataset = load_imagenet(folder, Transform(image_size=8, resize=9))
    return open_images(dataset.train, None, dataset)


@pytest.mark.parametrize("kind", ["in memory", "random parts of files"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_all_parts_of_a_batch_together_are_the_whole(kind: str, count: int, tmp_path: Path) -> None:
    images, batch_size = (digits(), 16) if kind == "in memory" else (random_parts(tmp_path), 4)
    whole = list(images.training_batches(batch_size, seed=3, epoch=1))
    parts = [
        images.training_batches(batch_size, seed=3, epoch=1, shard=Shard(index, count))
        for index in range(count)
    ]
    assert len(whole) == images.num_training_batches(batch_size)
    for (pixels, labels), *shares in zip(whole, *parts, strict=True):
        assert {len(of_part) for _, of_part in shares} == {batch_size // count}
        assert torch.equal(torch.cat([share for share, _ in shares]), pixels)
        assert torch.equal(torch.cat([share for _, share in shares]), labels)


def gradients(network: nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    network.zero_grad()
    F.cross_entropy(network(pixels), labels).backward()
    return torch.cat([parameter.grad.flatten() for parameter in network.parameters()])


def test_the_mean_of_the_parts_gradients_is_that_of_the_whole_batch() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    images = digits()
    [(pixels, labels), *_] = images.training_batches(48, seed=0, epoch=0)
    of_parts = [
        gradients(network, *next(images.training_batches(48, seed=0, epoch=0, shard=Shard(i, 3))))
        for i in range(3)
    ]
    assert torch.allclose(
        torch.stack(of_parts).mean(0), gradients(network, pixels, labels), rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize(("batch_size", "kind"), [(16, nn.SyncBatchNorm), (128, nn.BatchNorm2d)])
def test_small_parts_on_gpus_share_the_statistics_of_their_batch(
    gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch, batch_size: int, kind: type[nn.Module]
) -> None:
    monkeypatch.setattr(ddp, "DistributedDataParallel", lambda network, **_: network)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).to(gpu.device)
    before = dict(network.state_dict())
    wrapped = ddp.wrap_ddp(network, Shard(0, 2), batch_size)
    assert type(wrapped[1]) is kind
    assert wrapped is network  # whose state is what is kept
    assert network.state_dict().keys() == before.keys()


def test_batches_that_cannot_be_parted_evenly_are_refused() -> None:
    with pytest.raises(ValueError, match=r"among 3 workers, got 16 images; .* a multiple of 3"):
        next(digits().training_batches(16, seed=0, epoch=0, shard=Shard(0, 3)))
