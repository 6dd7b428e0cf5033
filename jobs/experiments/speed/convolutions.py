"""The convolutions of a score and nothing else: the rate that the device is capable of."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from speed.subject import Subject


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
