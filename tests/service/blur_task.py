"""A task without images: a small network learns to blur, by plain functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fppmo_ray import (
    FunctionTask,
    Resources,
    Sampler,
    Scoring,
    SearchSettings,
    recalibrate_batchnorm,
)
from fppmo_ray.service.problem import Problem
from fppmo_ray.service.worker_protocol import WeightsSnapshot, digest, to_arrays

SETTINGS = SearchSettings(
    macs_cut=0.4,
    proposals=8,
    seed=3,
    sampler=Sampler(population=4, importance="l1"),
    scoring=Scoring(rescore_seeds=2),
)


FEW_WORKERS = Resources(workers=1)


def blurred(images: Tensor) -> Tensor:
    return nn.functional.avg_pool2d(images, 3, stride=1, padding=1)


def images(seed: int) -> Tensor:
    return torch.rand(16, 1, 6, 6, generator=torch.Generator().manual_seed(seed % 1000))


def minus_error(network: nn.Module, seed: int) -> float:
    assert not network.training
    given = images(seed)
    with torch.no_grad():
        return -float((network(given) - blurred(given)).square().mean())


def train(network: nn.Module) -> None:
    assert network.training
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for step in range(40):
        given = images(step)
        loss = (network(given) - blurred(given)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def recalibrate(network: nn.Module) -> None:
    recalibrate_batchnorm(network, [(images(0), torch.zeros(16))])


def blur() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Conv2d(8, 1, 3, padding=1),
    )
    train(network.train())
    return network


def task(**changed: Any) -> FunctionTask:
    given: dict[str, Any] = {
        "example_inputs": torch.zeros(1, 1, 6, 6),
        "score": minus_error,
        "fine_tune": train,
        "recalibrate": recalibrate,
        "measure": "minus error",
    }
    return FunctionTask(**(given | changed))


def weights_of(network: nn.Module, problem: Problem) -> WeightsSnapshot:
    arrays = to_arrays(network)
    return WeightsSnapshot(sha256=digest(arrays), arrays=arrays, compute=problem.compute)
