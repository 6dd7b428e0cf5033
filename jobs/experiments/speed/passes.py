"""The passes of a score on bare tensors, and the work of a score around its passes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fppmo_ray.training import autocast, evaluate, fold_batchnorm, recalibrate_batchnorm
from fppmo_ray.training.sgd import make_optimizer, train_on_batches
from speed.subject import Batches, Subject

Run = Callable[[], object]


def bare_passes(subject: Subject) -> Run:
    """Forward and backward of the extracted network, as torch does them: no loss, no optimizer."""
    network, batches = subject.extracted(), subject.batches()

    def run() -> None:
        network.train()
        for images, _ in batches.training:
            with autocast(subject.device, subject.compute.dtype):
                logits = network(images)
            logits.sum().backward()
            network.zero_grad()
        with torch.no_grad(), autocast(subject.device, subject.compute.dtype):
            for images, _ in batches.recalibration:
                network(images)
            network.eval()
            for images, _ in batches.scoring:
                network(images)

    return run


def device_seconds(run: Run) -> float:
    """Seconds that a GPU works for a run: what is left of its time, the host needs to launch."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    events = recorded.key_averages()  # in microseconds
    times = [event.self_device_time_total for event in events if event.device_type.name == "CUDA"]
    return 1e-6 * float(sum(times))


def work_around(subject: Subject) -> dict[str, Run]:
    """Everything of a score but its passes: the package's own functions on the score's batches.

    - ``extract``: build the smaller network and lay it out.
    - ``copy``: gather, augment and normalise all batches on the device.
    - ``BN``: what a recalibration does besides its passes, and folding where it is configured.
    - ``metrics``: losses and accuracies, of training steps too.
    - ``optimizer``: its steps, on gradients that lie ready.
    """
    network, batches = subject.extracted(), subject.batches()
    instant = _Instant(network, batches)
    recipe, dtype = subject.recipe, subject.compute.dtype
    resting = make_optimizer(network, recipe)  # steps without gradients do nothing

    def take_statistics() -> None:
        recalibrate_batchnorm(instant, batches.recalibration, dtype=dtype)
        if subject.compute.fold_batchnorm:
            fold_batchnorm(network.eval())

    def take_metrics() -> None:
        rated = ((0.0, batch) for batch in batches.training)
        train_on_batches(instant, resting, rated, recipe, dtype=dtype, teacher=None)
        evaluate(instant, batches.scoring, dtype=dtype)

    return {
        "extract": subject.extracted,
        "copy": subject.batches,
        "BN": take_statistics,
        "metrics": take_metrics,
        "optimizer": _optimizer_steps(subject),
    }


class _Instant(nn.Module):
    """A network whose passes take no time, so that what is left is the work around them."""

    def __init__(self, network: nn.Module, batches: Batches) -> None:
        super().__init__()
        self.network = network  # with batch norms to be recalibrated
        images, _ = batches.scoring[0]
        with torch.no_grad():
            classes = network(images[:1]).shape[1]
        self._logits = torch.zeros(batches.rows, classes, device=images.device, requires_grad=True)

    def forward(self, images: Tensor) -> Tensor:
        """Logits that were there before."""
        return self._logits[: len(images)]


def _optimizer_steps(subject: Subject) -> Run:
    network = subject.extracted()
    optimizer = make_optimizer(network, subject.recipe)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def run() -> None:
        for _ in range(subject.fidelity.steps):
            optimizer.step()

    return run
