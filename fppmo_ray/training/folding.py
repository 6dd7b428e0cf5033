"""Batch norms folded into the convolutions before them."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

# Exactly these: a subclass may do something else with its weight.
_CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d
_NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d


@torch.no_grad()
def fold_batchnorm(network: nn.Module) -> nn.Module:
    """The same function in evaluation mode, without the batch norms that follow a convolution.

    A batch norm with fixed statistics is linear, so it goes into the weights and the bias of the
    convolution before it (Jacob et al. 2018, 1712.05877, section 3.2). Where the convolution's
    output is used elsewhere too, or the convolution more than once, its batch norm stays.

    Args:
        network: In evaluation mode. Left as it is; the result shares what is not folded.

    Raises:
        ValueError: the network is in training mode, or torch.fx cannot follow its ``forward``.
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
    # What a forward makes of tensors without numbers can be any of these.
    except (fx.proxy.TraceError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ValueError(f"torch.fx cannot follow the network's forward: {error!r}") from error


def _convolution_before(node: fx.Node, network: nn.Module) -> fx.Node | None:
    """The convolution whose output only this node, a batch norm, looks at."""
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
    """A convolution with parameters of its own that does what the two do."""
    fused: nn.Module = copy.copy(conv)
    fused._parameters = dict(conv._parameters)
    fused.weight, fused.bias = fuse_conv_bn_weights(
        *(conv.weight, conv.bias, norm.running_mean, norm.running_var),
        *(norm.eps, norm.weight, norm.bias),
    )
    return fused
