"""The masks of Torch-Pruning's own pruner at a budget, by its own API."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fppmo_ray.distribution import BoolArray, Budget
from fppmo_ray.pruning import Tracing, extract

_HALVINGS = 12  # of the ratio: finer than a filter of 4,096

OwnCriterion = Literal[
    "magnitude", "LAMP", "FPGM", "batch-norm scale", "Taylor", "Hessian", "OBD-C"
]
"""Importances of Torch-Pruning."""
NEED_SLOPES: tuple[OwnCriterion, ...] = ("Taylor", "Hessian", "OBD-C")
"""Those that read gradients, and so need labels."""


@dataclass(frozen=True, kw_only=True)
class Slopes:
    """Gradients of the loss with regard to every parameter, over labelled images."""

    mean: Mapping[str, Tensor]
    mean_square: Mapping[str, Tensor]
    """Mean over images of the squared gradient of an image."""


def slopes_of(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Slopes:
    """Differentiate the cross-entropy of every image.

    Args:
        network: In eval mode; left as it is.
        batches: Images (n, C, H, W) and labels (n,).
    """
    network = copy.deepcopy(network).eval()
    parameters = dict(network.named_parameters())
    mean = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    square = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    count = 0
    singles = ((image, label) for pair in batches for image, label in zip(*pair, strict=True))
    for image, label in singles:
        loss = F.cross_entropy(network(image[None]), label[None])
        found = torch.autograd.grad(loss, list(parameters.values()))
        for name, slope in zip(parameters, found, strict=True):
            mean[name] += slope
            square[name] += slope**2
        count += 1
    return Slopes(
        mean={name: total / count for name, total in mean.items()},
        mean_square={name: total / count for name, total in square.items()},
    )


def torch_pruning_mask(
    dense: nn.Module,
    tracing: Tracing,
    budget: Budget,
    image: Tensor,
    *,
    global_pruning: bool,
    criterion: OwnCriterion = "magnitude",
    slopes: Slopes | None = None,
) -> BoolArray:
    """The mask of its own pruner with one of its importances, the ratio bisected to the MACs.

    Layers outside the space, such as the residual stream of option-A ResNets, go into
    ``ignored_layers``: Torch-Pruning would cut them and the network would not run. A uniform ratio
    moves many layers at once, so as many of the first layers as fit keep the next step's.

    Args:
        dense: The trained network; left as it is.
        tracing: Of it.
        budget: Of its space.
        image: One image ``(1, C, H, W)``.
        global_pruning: Whether all layers share one threshold instead of one ratio.
        criterion: Its importance, with its own defaults.
        slopes: Of the dense network, for criteria that need labels.

    Raises:
        RuntimeError: what it pruned is no mask of the space.
    """
    layers = [group.name for group in tracing.space.groups]

    prune = partial(
        _pruned,
        *(dense, tracing, image),
        global_pruning=global_pruning,
        criterion=criterion,
        slopes=slopes,
    )

    def fits(keep: BoolArray) -> bool:
        return tracing.space.macs(keep) <= budget.max_macs

    over, under = 0.0, 1 - 1 / max(group.num_filters for group in tracing.space.groups)
    for _ in range(_HALVINGS):
        middle = (over + under) / 2
        if fits(prune(dict.fromkeys(layers, middle))):
            under = middle
        else:
            over = middle
    best = prune(dict.fromkeys(layers, under))
    if not global_pruning:
        best = _widened(best, layers, over, under, prune, fits)
    return best


def _widened(
    best: BoolArray,
    layers: Sequence[str],
    over: float,
    under: float,
    prune: Callable[[Mapping[str, float]], BoolArray],
    fits: Callable[[BoolArray], bool],
) -> BoolArray:
    """The mask with the next step's ratio in as many layers, one after the other, as fit."""
    ratios = dict.fromkeys(layers, under)
    for layer in layers:
        keep = prune(ratios | {layer: over})
        if fits(keep):
            best, ratios = keep, ratios | {layer: over}
    return best


def _pruned(
    dense: nn.Module,
    tracing: Tracing,
    image: Tensor,
    ratios: Mapping[str, float],
    *,
    global_pruning: bool,
    criterion: OwnCriterion,
    slopes: Slopes | None,
) -> BoolArray:
    import torch_pruning

    network = _numbered(dense)
    importance = _importance(network, criterion, slopes)
    modules = dict(network.named_modules())
    # A ratio for all is what it calls uniform; only different ones need to be told by layer.
    by_layer = {} if len(set(ratios.values())) == 1 else {modules[k]: r for k, r in ratios.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = torch_pruning.pruner.MagnitudePruner(
            network,
            image,
            importance=importance,
            global_pruning=global_pruning,
            pruning_ratio=next(iter(ratios.values())),
            pruning_ratio_dict=by_layer,
            ignored_layers=_ignored(network, tracing),
        )
        pruner.step()
    keep = _kept(network, tracing)
    _require_same(network, dense, tracing, keep)
    return keep


def _importance(network: nn.Module, criterion: OwnCriterion, slopes: Slopes | None) -> Any:
    """Make the importance, and give the network the gradients that it reads."""
    from torch_pruning import importance

    if criterion in NEED_SLOPES:
        assert slopes is not None
        given = slopes.mean if criterion == "Taylor" else slopes.mean_square
        for name, parameter in network.named_parameters():
            parameter.grad = given[name].clone()
    if criterion == "OBD-C":
        made = importance.OBDCImportance()
        made.steps = 1
        made.modules = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        made.Fisher = {m: m.weight.grad.flatten(1) for m in made.modules}
        return made
    return {
        "magnitude": importance.MagnitudeImportance,
        "LAMP": importance.LAMPImportance,
        "FPGM": importance.FPGMImportance,
        "batch-norm scale": importance.BNScaleImportance,
        "Taylor": importance.TaylorImportance,
        "Hessian": importance.HessianImportance,
    }[criterion]()


def _ignored(network: nn.Module, tracing: Tracing) -> list[nn.Module]:
    """The layers whose outputs are in no group of the space."""
    prunable = {part.layer for part in tracing.slices if part.side == "output"}
    return [
        module
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and name not in prunable
    ]


@torch.no_grad()
def _numbered(dense: nn.Module) -> nn.Module:
    """A copy whose batch norms hold their channels' numbers, which are pruned with the channels."""
    network = copy.deepcopy(dense)
    for module in network.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            module.running_mean.copy_(torch.arange(len(module.running_mean)))
    return network


def _kept(network: nn.Module, tracing: Tracing) -> BoolArray:
    """The mask, read from the numbers that remain."""
    keep = np.ones(tracing.space.num_filters, dtype=bool)
    buffers = dict(network.named_buffers())
    for part in tracing.slices:
        if part.tensor.endswith(".running_mean"):
            left = buffers[part.tensor].long().numpy()
            gone = np.setdiff1d(np.arange(len(part.units)), left)
            units = part.units[gone]
            keep[units[units >= 0]] = False
    return keep


def _require_same(network: nn.Module, dense: nn.Module, tracing: Tracing, keep: BoolArray) -> None:
    ours = extract(dense, tracing, keep).state_dict()
    theirs = network.state_dict()
    for name, tensor in ours.items():
        if name.endswith("running_mean"):
            continue
        if tensor.shape != theirs[name].shape or not torch.equal(tensor, theirs[name]):
            raise RuntimeError(
                f"torch-pruning cut {name} to {tuple(theirs[name].shape)} in a way that is no mask "
                f"of the traced space, whose is {tuple(tensor.shape)}"
            )
