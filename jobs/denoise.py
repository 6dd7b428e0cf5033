"""Prune a network that classifies nothing: DnCNN, which takes the noise out of images.

    python jobs/denoise.py --data DIR --weights dncnn.pt --macs-cut 0.5 --run-dir runs/dncnn
    python jobs/denoise.py ... --importance obs --start allocation --refit True --proposals 0
    fppmo-ray submit jobs/denoise.py ... --run-dir s3://BUCKET/PATH --address http://HEAD:8265

A pattern for tasks of your own: what scores and what fine-tunes a network are plain methods here.
The second command finds the widths without a score, from noisy images alone.
The network is that of Zhang et al. 2017 (1608.03981), smaller by default; images have Gaussian
noise of standard deviation 25 of 255, and a network's score is its PSNR in dB.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fppmo_ray import (
    FunctionTask,
    ImageArrays,
    Resources,
    SearchSettings,
    load_dataset,
    recalibrate_batchnorm,
    run_search,
)
from fppmo_ray.durable_files import write_whole
from fppmo_ray.job import resume_mode, run_job, show_result
from fppmo_ray.training import DatasetName, load_weights

_SIGMA = 25 / 255
_BATCH = 64
_HELD_OUT = 1000
_SCORE_IMAGES = 250
_CALIBRATION_IMAGES = 1000
_LEARNING_RATE = 1e-3


class DnCNN(nn.Module):
    """A network that estimates the noise of an image and subtracts it.

    Args:
        channels: Channels of an image.
        width: Filters of each inner layer.
        depth: Number of convolutions.
    """

    def __init__(self, channels: int, width: int, depth: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 2):
            conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
        self.noise = nn.Sequential(*layers, nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, noisy: Tensor) -> Tensor:
        """Return noisy images ``(N, C, H, W)`` without their noise."""
        clean: Tensor = noisy - self.noise(noisy)
        return clean


@dataclass(frozen=True, kw_only=True, eq=False)
class Denoising:
    """The task with its images, uint8 ``(N, H, W, C)``; workers call its methods."""

    train: NDArray[np.uint8]
    held_out: NDArray[np.uint8]
    test: NDArray[np.uint8]
    steps: int
    """Steps of a whole training."""

    def images(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield noisy training images, which calibrate the network; the clean ones are not used."""
        return _noisy(self.train[:_CALIBRATION_IMAGES], seed=1)

    def recalibrate(self, network: nn.Module) -> None:
        """Re-estimate the batch-norm statistics of a pruned network on training images."""
        recalibrate_batchnorm(network, _noisy(self.train[:256], seed=0, device=_device(network)))

    def score(self, network: nn.Module, seed: int) -> float:
        """Return the PSNR in dB on some of the held-out images.

        Args:
            network: A network on its device.
            seed: Seed of the choice of images and of their noise.
        """
        order = np.random.default_rng(seed).permutation(len(self.held_out))
        return _psnr(network, self.held_out[order[:_SCORE_IMAGES]], seed)

    def last_look(self, network: nn.Module) -> float:
        """Return the PSNR in dB on the test images."""
        return _psnr(network, self.test, seed=0)

    def fine_tune(self, network: nn.Module) -> None:
        """Train by Adam on the squared error; the learning rate falls to 0 along a cosine."""
        optimizer = torch.optim.Adam(network.parameters(), lr=_LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        for rows in _rows(len(self.train), self.steps):
            batch = self.train[rows]
            noisy, clean = next(_noisy(batch, seed=int(rows[0]), device=_device(network)))
            loss = F.mse_loss(network(noisy), clean)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()


def main(
    run_dir: str,
    weights: Path,
    settings: SearchSettings,
    resources: Resources,
    *,
    dataset: DatasetName = "cifar10",
    data: Path | None = None,
    width: int = 32,
    depth: int = 8,
    steps: int = 1000,
    resume: bool = False,
    resume_or_start: bool = False,
) -> None:
    """Search, choose, fine-tune, report.

    Args:
        run_dir: Folder or URI for all that the search leaves.
        weights: File of the dense network's weights; where there is none, the network is trained
            first, here, and the file written.
        settings: What to search for.
        resources: Where it runs.
        dataset: Where the images are from.
        data: The data set's folder.
        width: Filters of each layer; the paper has 64.
        depth: Convolutions; the paper has 17.
        steps: Of 64 images, in each training.
        resume: Go on with the search in the run directory.
        resume_or_start: The same, but begin it where there is none yet.
    """
    resuming = resume_mode(run_dir, resume=resume, resume_or_start=resume_or_start)
    denoising = _denoising(dataset, data, steps)
    channels = denoising.train.shape[3]
    torch.manual_seed(settings.seed)
    dense = DnCNN(channels, width, depth)
    if weights.exists():
        load_weights(dense, weights)
    else:
        denoising.fine_tune(dense)
        state = io.BytesIO()
        torch.save(dense.state_dict(), state)
        write_whole(weights, state.getvalue())
    task = FunctionTask(
        example_inputs=torch.zeros(1, channels, *denoising.train.shape[1:3]),
        score=denoising.score,
        images=denoising.images,
        fine_tune=denoising.fine_tune,
        test=denoising.last_look,
        recalibrate=denoising.recalibrate,
        measure="PSNR, dB",
    )
    run_search(dense, task, settings, run_dir=run_dir, resources=resources, resume=resuming)
    show_result(run_dir)


def _denoising(name: DatasetName, data: Path | None, steps: int) -> Denoising:
    dataset = load_dataset(name, data)
    train, test = dataset.train, dataset.test
    if not isinstance(train, ImageArrays) or not isinstance(test, ImageArrays):
        raise ValueError(f"this job holds its images in memory, and {name} is too large for that")
    order = np.random.default_rng(0).permutation(len(train))
    held_out = min(_HELD_OUT, len(train) // 5)
    return Denoising(
        train=train.images[order[held_out:]],
        held_out=train.images[order[:held_out]],
        test=test.images[:2000],
        steps=steps,
    )


def _rows(num_images: int, steps: int) -> Iterator[NDArray[np.int64]]:
    """The rows of every step's batch, drawn anew."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        yield rng.integers(num_images, size=_BATCH)


def _noisy(
    images: NDArray[np.uint8], *, seed: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches with noise and without, (n, C, H, W), on a device."""
    generator = torch.Generator().manual_seed(seed)
    for begin in range(0, len(images), _BATCH):
        pixels = torch.tensor(images[begin : begin + _BATCH]).permute(0, 3, 1, 2)
        clean = pixels.float() / 255
        noise = _SIGMA * torch.randn(clean.shape, generator=generator)
        yield (clean + noise).to(device), clean.to(device)


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


@torch.no_grad()
def _psnr(network: nn.Module, images: NDArray[np.uint8], seed: int) -> float:
    """The mean over images of -10 log10 of the mean squared error, pixels in [0, 1]."""
    found = [
        -10 * (network(noisy) - clean).square().mean(dim=(1, 2, 3)).log10()
        for noisy, clean in _noisy(images, seed=seed, device=_device(network))
    ]
    return float(torch.cat(found).mean())


if __name__ == "__main__":
    run_job(main)
