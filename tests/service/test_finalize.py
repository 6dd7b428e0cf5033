"""The end of a search: no network is handed out that is not the dense one without some filters."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fppmo_ray.distribution import Finalist
from fppmo_ray.pruning import trace
from fppmo_ray.service.finalists import Choice, Found
from fppmo_ray.service.finalize import finalize
from fppmo_ray.training.networks import resnet20


def test_a_chosen_network_that_is_not_exact_is_refused_before_it_is_fine_tuned() -> None:
    network, image = resnet20(shortcut="B"), torch.zeros(1, 3, 16, 16)
    tracing = trace(network, image)
    keep = np.arange(tracing.space.num_filters) % 2 == 0
    mask = Finalist(name="best", keep=keep)
    choice = Choice(chosen=mask, importance_only=mask)
    found = Found(choices=[choice], weights=None, given=None, searches=[[]])  # type: ignore[arg-type]
    for part in tracing.slices:
        if part.tensor == "bn1.running_mean":
            part.units[:2] = part.units[1::-1]
    task = SimpleNamespace(inputs=lambda: (image,))
    problem = SimpleNamespace(network=network, tracing=tracing, task=task)
    context = SimpleNamespace(problem=problem)  # without a pool nothing can be fine-tuned
    with pytest.raises(ValueError, match=r"computes something else .*: its output is off by"):
        finalize(context, found, None)  # type: ignore[arg-type]
