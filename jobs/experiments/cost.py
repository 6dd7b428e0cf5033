"""What pruning costs: seconds of one core from the loaded network to the pruned one.

    python jobs/experiments/cost.py --networks resnet20 resnet56 resnet50

Weights and images are random, since neither changes the time. Torch-Pruning gets its graph, its
magnitude pruner at one ratio, and the recalibration of the batch norms that everybody gets; the
search of its ratio for a budget is left out. With ``--fastnas``, FastNAS of NVIDIA's Model
Optimizer searches too; its scores see as many images as ours, and re-estimate batch norms on as
many. How often it scores depends on the answers, so 153 scores are counted, which a trained
ResNet-20 took it. A score is that of a search's proposal, on images as many as the defaults take;
48 of them are what a search adds to ``prune``. Times are of the processor, so that other work on
the machine hardly changes them.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch_pruning
from rich.console import Console
from rich.table import Table
from rivals.fastnas import BATCHES, require_fastnas, searched
from torch import Tensor, nn
from torch.nn import functional as F

from fppmo_ray.job import run_job
from fppmo_ray.own_network import open_network
from fppmo_ray.pruning import extract
from fppmo_ray.pruning.calibration import Refit, calibrate, layer_targets, reconstruct
from fppmo_ray.pruning.calibration.divergence import answers, divergence
from fppmo_ray.pruning.one_call import PruneReport, prune_with_report
from fppmo_ray.training import evaluate, recalibrate_batchnorm
from fppmo_ray.training.networks import NETWORKS

_BATCH = 50
_PROPOSALS = 48
_ITS_SCORES = 153  # of FastNAS
_SCORED_ON, _RECALIBRATED_ON, _RECONSTRUCTED_ON = 500, 250, 100  # images of a score


@dataclass
class Clock:
    """Processor seconds by name, and what is running."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Add the processor's time inside to a name.

        Args:
            name: What is done.
        """
        began = time.process_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - began


def main(
    networks: tuple[str, ...] = ("resnet20", "resnet56", "resnet50"),
    *,
    macs_cut: float = 0.5,
    images: int = 1000,
    large_images: int = 100,
    ignore: tuple[str, ...] = ("conv1",),
    fastnas: bool = False,
    threads: int = 1,
) -> None:
    """Print a line for every network.

    Args:
        networks: Names, as in ``fppmo-ray prune --network``.
        macs_cut: Share of MACs to remove.
        images: Calibration images of this package's networks, of 32 x 32 pixels.
        large_images: Those of other networks, of 224 x 224 pixels.
        ignore: Layers that stay whole, for both.
        fastnas: Whether FastNAS takes part. It takes minutes.
        threads: Threads of torch.
    """
    torch.set_num_threads(threads)
    if fastnas:
        require_fastnas()
    table = Table(
        *(
            "network",
            "images",
            "Torch-Pruning, s",
            f"FastNAS, {_ITS_SCORES} scores, s",
            "prune, s",
            "ratio",
        ),
        *("a score, s", f"{_PROPOSALS} scores, s"),
    )
    for name in networks:
        dense, _ = open_network(name, None, 10)
        count, pixels = (images, 32) if name in NETWORKS else (large_images, 224)
        inputs = _smooth_images(count, pixels)
        dense = _with_statistics(dense, inputs[:_BATCH])
        rival = _torch_pruning_seconds(dense, inputs, macs_cut, ignore)
        of_fastnas = ""
        if fastnas:
            of_fastnas = f"{_ITS_SCORES * _fastnas_seconds(dense, inputs, macs_cut):.0f}"
        clock = Clock()
        with clock.of("prune"):
            report = prune_with_report(dense, inputs[:1], inputs, macs_cut=macs_cut, ignore=ignore)
        score = _score_seconds(dense, inputs, report)
        spent = clock.seconds["prune"]
        table.add_row(
            *(name, f"{count:,}", f"{rival:.1f}", of_fastnas, f"{spent:.1f}"),
            *(f"{spent / rival:.1f}", f"{score:.2f}", f"{_PROPOSALS * score:.0f}"),
        )
        Console(width=160).print(table)


def _smooth_images(count: int, pixels: int) -> Tensor:
    """Random images whose neighbouring pixels resemble each other, as those of photographs do."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, 3, 8, 8, generator=generator)
    fine = torch.randn(count, 3, pixels, pixels, generator=generator)
    return F.interpolate(coarse, pixels, mode="bilinear") + 0.3 * fine


@torch.no_grad()
def _with_statistics(network: nn.Module, images: Tensor) -> nn.Module:
    """Return the network with batch-norm statistics of some images, in eval mode."""
    recalibrate_batchnorm(network, [(images, torch.zeros(len(images), dtype=torch.long))])
    return network.eval()


def _torch_pruning_seconds(
    dense: nn.Module, images: Tensor, macs_cut: float, ignore: tuple[str, ...]
) -> float:
    """Seconds of Torch-Pruning's graph, one step at one ratio, and the recalibration."""
    network, clock = copy.deepcopy(dense), Clock()
    with clock.of("prune"):
        pruner = torch_pruning.pruner.MagnitudePruner(
            network,
            images[:1],
            importance=torch_pruning.importance.MagnitudeImportance(p=2),
            pruning_ratio=1 - (1 - macs_cut) ** 0.5,
            ignored_layers=[m for m in network.modules() if isinstance(m, nn.Linear)]
            + [m for name, m in network.named_modules() if name in ignore],
        )
        pruner.step()
        batches = ((batch, torch.zeros(len(batch))) for batch in torch.split(images, _BATCH))
        recalibrate_batchnorm(network, batches)
    return clock.seconds["prune"]


def _fastnas_seconds(dense: nn.Module, images: Tensor, macs_cut: float) -> float:
    """Seconds of one of its scores, with the batch norms re-estimated for it."""
    labels = torch.arange(len(images)) % 10
    parts = (torch.split(part[:_SCORED_ON], _BATCH) for part in (images, labels))
    scored = list(zip(*parts, strict=True))
    ends: list[float] = []

    def score(network: nn.Module) -> float:
        loss = evaluate(network.eval(), scored).loss
        ends.append(time.process_time())
        return -loss

    searched(
        dense,
        images[:1],
        share=1 - macs_cut,
        score=score,
        calibration=images[:_RECALIBRATED_ON].chunk(BATCHES),
    )
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def _score_seconds(dense: nn.Module, images: Tensor, report: PruneReport) -> float:
    """Seconds of a score, once the dense network's part is done."""
    tracing, clock = report.tracing, Clock()
    few = images[:_RECONSTRUCTED_ON]
    batches = list(torch.split(images, _BATCH))
    calibration = calibrate(dense, tracing, batches, num_images=len(images))
    refit = Refit(dense, tracing, calibration)
    targets = layer_targets(dense, tracing, [few])
    scored = list(torch.split(images[:_SCORED_ON], _BATCH))
    wished = answers(dense, scored)
    with clock.of("score"):
        network = extract(dense, tracing, report.keep).eval()
        refit(network, report.keep)
        some = images[:_RECALIBRATED_ON]
        recalibrate_batchnorm(network, [(some, torch.zeros(len(some)))])
        if targets is not None:
            reconstruct(network, tracing, report.keep, targets)
        divergence(network, scored, wished)
    return clock.seconds["score"]


if __name__ == "__main__":
    run_job(main)
