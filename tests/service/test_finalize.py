"""The end of a search: no network is handed out that is not the dense one without some filters."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fppmo_ray import SearchSettings
from fppmo_ray.distribution import Finalist
from fppmo_ray.pruning import trace
from fppmo_ray.service.choices import Choice, Found
from fppmo_ray.service.finalize import finalize
from fppmo_ray.service.image_task import image_classification
from fppmo_ray.service.problem import build_problem
from fppmo_ray.training import build_network, load_dataset
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


def test_a_problem_travels_with_plain_weights_and_without_gradients_of_kept_activations() -> None:
    network = build_network("digits_cnn", 10, seed=0)
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    nn.utils.parametrizations.weight_norm(first)
    network.register_forward_hook(lambda module, _, output: setattr(module, "kept", output))
    task = image_classification(load_dataset("digits"))
    [image] = task.inputs()
    expected = network.eval()(image)
    with pytest.warns(UserWarning, match="become plain parameters"):
        problem = build_problem(network, task, SearchSettings(macs_cut=0.5))
    problem.network._forward_hooks.clear()  # a lambda does not travel by pickle
    arrived = pickle.loads(pickle.dumps(problem.network))
    torch.testing.assert_close(arrived.eval()(image), expected)
    assert "weight" in dict(arrived.named_modules())[_name_of(network, first)]._parameters


def _name_of(network: nn.Module, layer: nn.Module) -> str:
    return next(name for name, module in network.named_modules() if module is layer)
