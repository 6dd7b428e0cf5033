"""Batch norm: re-estimate its statistics, or fold it into the convolutions before it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from fppmo_ray.training.compute import DType, autocast, in_mode, lowered_weights
from fppmo_ray.training.inputs import inputs_of

# Only these exact types can be folded: a subclass may use its weight differently.
_CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d
_NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d


@torch.no_grad()
def recalibrate_batchnorm(
    network: nn.Module,
    batches: Iterable[Any],
    *,
    dtype: DType = "float32",
    num_inputs: int = 1,
) -> None:
    """Re-estimate every BatchNorm's running statistics, in place (EagleEye, 2007.02491).

    The new statistics are the plain mean over all batches, so batches should be of equal size. All
    other modules, such as dropout, stay in evaluation mode. A network without BatchNorm is not
    changed. If a forward pass raises, the old statistics are restored; modes and momenta are
    restored in any case.

    Args:
        network: A network on the batches' device.
        batches: Normalised images (n, C, H, W), or tuples that begin with the network's inputs,
            such as images and labels. Use search-train images, never images that score the network.
        dtype: Number format of the forward passes; statistics are float32.
        num_inputs: How many tensors the network's forward takes.

    Raises:
        ValueError: there are no batches.
    """
    norms = [
        module
        for module in network.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    ]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    before = [[buffer.clone() for buffer in norm.buffers()] for norm in norms]
    try:
        with in_mode(network, training=False), lowered_weights(network, dtype):
            for norm in norms:
                norm.train()
                norm.reset_running_stats()
            _run(network, norms, batches, dtype, num_inputs)
    except BaseException:
        for norm, buffers in zip(norms, before, strict=True):
            for buffer, old in zip(norm.buffers(), buffers, strict=True):
                buffer.copy_(old)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


@contextmanager
def batches_counted_at_end(network: nn.Module, count: Callable[[], int]) -> Iterator[None]:
    """Keep batch norms from counting batches in training; add their number once, at the end.

    Every batch norm would launch a kernel in every step to add 1 to a number that is not used.

    Args:
        network: The network, in training mode.
        count: Returns the number of batches that it was trained on since.
    """
    norms = [
        module
        for module in network.modules()
        if isinstance(module, _BatchNorm)
        and module.training
        and module.momentum is not None
        and not isinstance(module, nn.SyncBatchNorm)  # which insists on counting
    ]
    counters = [norm.num_batches_tracked for norm in norms]
    for norm in norms:
        norm.num_batches_tracked = None
    try:
        yield
    finally:
        for norm, counter in zip(norms, counters, strict=True):
            norm.num_batches_tracked = None if counter is None else counter.add_(count())


def _run(
    network: nn.Module,
    norms: Sequence[_BatchNorm],
    batches: Iterable[Any],
    dtype: DType,
    num_inputs: int,
) -> None:
    num_batches = 0
    for batch in batches:
        inputs = inputs_of(batch, num_inputs)
        num_batches += 1
        for norm in norms:
            # This momentum makes a cumulative average. With momentum None, torch does the same but
            # waits for the GPU at every layer to read its batch counter.
            norm.momentum = 1 / num_batches
        with autocast(inputs[0].device, dtype):
            network(*inputs)
    if not num_batches:
        raise ValueError("a recalibration needs images, got no batches")


@torch.no_grad()
def fold_batchnorm(network: nn.Module) -> nn.Module:
    """Return an equal network for evaluation, with batch norms folded into convolutions.

    A batch norm with fixed statistics is linear, so the weights and the bias of the convolution
    before it can absorb it (Jacob et al. 2018, 1712.05877, section 3.2). A batch norm stays where
    the convolution's output has another consumer, or where the convolution is called more than
    once.

    Args:
        network: A network in evaluation mode. It is not changed; the result shares all other
            layers.

    Raises:
        ValueError: the network is in training mode, or torch.fx cannot trace its ``forward``.
    """
    if network.training:
        raise ValueError("a network in training mode cannot be folded; call eval() first")
    graph = _traced(network)
    uses = Counter(node.target for node in graph.nodes if node.op == "call_module")
    fused: dict[str, nn.Module] = {}
    for node in list(graph.nodes):
        conv = _convolution_before(node, network)
        if conv is not None and uses[conv.target] == 1:
            layers = [network.get_submodule(str(item.target)) for item in (conv, node)]
            fused[str(conv.target)] = _fuse(*layers)
            node.replace_all_uses_with(conv)
            graph.erase_node(node)
    folded = fx.GraphModule(network, graph)
    for name, layer in fused.items():
        parent, _, leaf = name.rpartition(".")
        setattr(folded.get_submodule(parent), leaf, layer)
    return folded


def _traced(network: nn.Module) -> fx.Graph:
    try:
        return fx.Tracer().trace(network)
    # A forward that reads the values of fx's proxies can raise any of these.
    except (fx.proxy.TraceError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ValueError(f"torch.fx cannot follow the network's forward: {error!r}") from error


def _convolution_before(node: fx.Node, network: nn.Module) -> fx.Node | None:
    """Return the convolution whose output only this batch-norm node consumes, or None."""
    if not _is_call_of(node, network, _NORMS) or len(node.args) != 1:
        return None
    before = node.args[0]
    if not isinstance(before, fx.Node) or not _is_call_of(before, network, _CONVOLUTIONS):
        return None
    has_statistics = network.get_submodule(str(node.target)).running_var is not None
    return before if has_statistics and len(before.users) == 1 else None


def _is_call_of(node: fx.Node, network: nn.Module, types: tuple[type[nn.Module], ...]) -> bool:
    return node.op == "call_module" and type(network.get_submodule(str(node.target))) in types


def _fuse(conv: Any, norm: Any) -> nn.Module:
    """Return a new convolution that computes the convolution followed by the batch norm."""
    fused: nn.Module = copy.copy(conv)
    fused._parameters = dict(conv._parameters)
    fused.weight, fused.bias = fuse_conv_bn_weights(
        *(conv.weight, conv.bias, norm.running_mean, norm.running_var),
        *(norm.eps, norm.weight, norm.bias),
    )
    return fused
