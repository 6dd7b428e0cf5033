"""Masks of Torch-Pruning's own pruner, and the gradients that its importances read."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from rivals.torch_pruning_masks import NEED_SLOPES, OwnCriterion, slopes_of, torch_pruning_mask
from torch import nn
from torch.nn import functional as F

from fppmo_ray.distribution import Budget
from fppmo_ray.pruning import trace
from fppmo_ray.training import build_network

IMAGES = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 4, 5])


def test_slopes_are_the_gradient_of_the_mean_loss_and_the_mean_of_squares_over_images():
    network = build_network("digits_cnn", 10, seed=1).eval()
    found = slopes_of(network, [(IMAGES[:4], LABELS[:4]), (IMAGES[4:], LABELS[4:])])
    F.cross_entropy(network(IMAGES), LABELS).backward()
    squares = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    for image, label in zip(IMAGES, LABELS, strict=True):
        loss = F.cross_entropy(network(image[None]), label[None])
        slopes = torch.autograd.grad(loss, list(network.parameters()))
        for total, slope in zip(squares.values(), slopes, strict=True):
            total += slope**2 / len(IMAGES)
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(found.mean[name], parameter.grad)
        torch.testing.assert_close(found.mean_square[name], squares[name])


@pytest.mark.parametrize("one_ratio", [False, True])
@pytest.mark.parametrize("criterion", get_args(OwnCriterion))
def test_masks_of_every_importance_come_near_the_budget_from_below(
    criterion: OwnCriterion, one_ratio: bool
):
    dense = build_network("digits_cnn", 10, seed=1).eval()
    for module in dense.modules():
        if isinstance(module, nn.BatchNorm2d):  # whose scales are equal before training
            nn.init.uniform_(module.weight, 0.5, 1.5, torch.Generator().manual_seed(0))
    tracing = trace(dense, IMAGES[:1])
    slopes = slopes_of(dense, [(IMAGES, LABELS)]) if criterion in NEED_SLOPES else None
    keep = torch_pruning_mask(
        dense,
        tracing,
        Budget.from_cut(tracing.space, 0.5),
        IMAGES[:1],
        global_pruning=not one_ratio,
        criterion=criterion,
        slopes=slopes,
    )
    share = tracing.space.macs(keep) / tracing.space.dense_macs
    assert 0.4 < share <= 0.5


def test_channels_with_the_least_of_what_an_importance_measures_go_first():
    torch.manual_seed(0)
    first, last = nn.Conv2d(1, 4, 3), nn.Linear(4, 6)
    network = nn.Sequential(
        first, nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), last
    ).eval()
    tracing = trace(network, IMAGES[:1])
    slopes = slopes_of(network, [(IMAGES, LABELS)])
    for unused, tensor in ((2, slopes.mean), (1, slopes.mean_square)):
        for name, value in tensor.items():
            value[unused if name != "5.weight" else (slice(None), unused)] = 0
    budget = Budget.from_cut(tracing.space, 0.25)
    criteria: dict[OwnCriterion, int] = {"Taylor": 2, "Hessian": 1, "OBD-C": 1, "magnitude": 3}
    for criterion, gone in criteria.items():
        if criterion == "magnitude":
            with torch.no_grad():
                first.weight[3], last.weight[:, 3] = 1e-6, 1e-6
        keep = torch_pruning_mask(
            *(network, tracing, budget, IMAGES[:1]),
            global_pruning=True,
            criterion=criterion,
            slopes=slopes,
        )
        assert [place for place, kept in enumerate(keep) if not kept] == [gone], criterion
