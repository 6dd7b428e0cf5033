"""The passes of a score on bare tensors, its convolutions alone, and the work around its passes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

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
        launched = replace(subject.compute, cuda_graphs=False)
        train_on_batches(instant, resting, rated, recipe, compute=launched, teacher=None)
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


@dataclass(frozen=True)
class _Convolution:
    """A layer, and what one image is to it."""

    layer: nn.Conv2d
    input_shape: torch.Size
    """(C, H, W)."""
    output_shape: torch.Size


class Convolutions:
    """Those of the extracted network, on tensors that lie ready, without autocast.

    All tensors are one piece of memory in the configured dtype, seen in the shape and layout that
    the layer meets.
    """

    def __init__(self, subject: Subject) -> None:
        network, self._batches = subject.extracted().eval(), subject.batches()
        self._layers = _convolutions(network, self._batches.scoring[0][0][:1])
        self._is_channels_last = subject.compute.channels_last
        dtype: torch.dtype = getattr(torch, subject.compute.dtype)
        network.to(dtype)
        shapes = [shape for conv in self._layers for shape in (conv.input_shape, conv.output_shape)]
        size = self._batches.rows * max(math.prod(shape) for shape in shapes)
        self._inputs, self._gradients = torch.randn(2, size, dtype=dtype, device=subject.device)

    @torch.no_grad()
    def train(self) -> None:
        """Forward and backward of all fine-tuning steps."""
        for _, labels in self._batches.training:
            self._forward(len(labels))
            self._backward(len(labels))

    @torch.no_grad()
    def look(self) -> None:
        """Forward of recalibration and scoring."""
        for _, labels in [*self._batches.recalibration, *self._batches.scoring]:
            self._forward(len(labels))

    def _forward(self, rows: int) -> None:
        for conv in self._layers:
            conv.layer(self._seen(self._inputs, rows, conv.input_shape))

    def _backward(self, rows: int) -> None:
        """Gradients of weights and inputs; the network's first layer has no use for the latter."""
        for conv in reversed(self._layers):
            layer = conv.layer
            has_bias = layer.bias is not None
            torch.ops.aten.convolution_backward(
                self._seen(self._gradients, rows, conv.output_shape),
                self._seen(self._inputs, rows, conv.input_shape),
                layer.weight,
                [layer.out_channels] if has_bias else None,
                *(layer.stride, layer.padding, layer.dilation),
                *(False, [0, 0], layer.groups),  # not transposed
                [conv is not self._layers[0], True, has_bias],
            )

    def _seen(self, memory: Tensor, rows: int, shape: torch.Size) -> Tensor:
        channels, height, width = shape
        flat = memory[: rows * math.prod(shape)]
        if self._is_channels_last:
            return flat.view(rows, height, width, channels).permute(0, 3, 1, 2)
        return flat.view(rows, channels, height, width)


@torch.no_grad()
def _convolutions(network: nn.Module, image: Tensor) -> list[_Convolution]:
    """In the order in which a forward pass of one image calls them."""
    called: list[_Convolution] = []

    def note(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        assert isinstance(layer, nn.Conv2d)
        called.append(_Convolution(layer, inputs[0].shape[1:], output.shape[1:]))

    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    network(image)
    for hook in hooks:
        hook.remove()
    return called
