"""The layers that are timed alone, and their shapes at other widths."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from fppmo_ray.distribution.costs import Width
from fppmo_ray.pruning import trace
from fppmo_ray.pruning.latency.measure import mask_at, random_masks
from fppmo_ray.pruning.latency.timing import timed_layers

NETWORK = nn.Sequential(
    *(nn.Conv2d(3, 8, 3), nn.ReLU()),
    *(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 12, 1, groups=2), nn.ReLU()),
    *(nn.Flatten(), nn.Linear(12 * 4, 10), nn.ReLU(), nn.Linear(10, 5)),
).eval()
IMAGES = torch.zeros(2, 3, 6, 6)
TRACING = trace(NETWORK, IMAGES[:1])


def test_every_convolution_and_linear_layer_that_loses_channels_is_timed() -> None:
    layers = timed_layers(NETWORK, TRACING, (IMAGES,))
    assert [(layer.name, layer.image_shape) for layer in layers] == [
        ("0", (2, 3, 6, 6)),
        ("2", (2, 8, 4, 4)),
        ("3", (2, 8, 2, 2)),
        ("6", (2, 48)),
        ("8", (2, 10)),
    ]
    # The last layer makes logits, so only what it reads can go: there it counts as it is.
    assert layers[-1].out_width == Width(constant=1)
    assert layers[0].in_width == Width(constant=1)


def test_a_layer_is_run_at_the_output_widths_of_one_mask_and_the_inputs_of_another() -> None:
    narrow, dense = mask_at(TRACING.space, 0.0), mask_at(TRACING.space, 1.0)
    shapes = {
        layer.name: [
            tuple(layer.at(out, into)()().shape)
            for out, into in [(dense, narrow), (narrow, dense), (narrow, narrow)]
        ]
        for layer in timed_layers(NETWORK, TRACING, (IMAGES,))
    }
    few = TRACING.space.with_limits().min_widths
    assert few.tolist() == [1] * len(few)
    assert shapes["0"] == [(2, 8, 4, 4), (2, 2, 4, 4), (2, 2, 4, 4)]  # two: one in each conv-group
    assert shapes["2"] == [(2, 8, 2, 2), (2, 2, 2, 2), (2, 2, 2, 2)]
    assert shapes["3"] == [(2, 12, 2, 2), (2, 2, 2, 2), (2, 2, 2, 2)]
    assert shapes["6"] == [(2, 10), (2, 1), (2, 1)]
    assert shapes["8"] == [(2, 5)] * 3


def test_masks_to_time_have_legal_widths_from_the_smallest_to_the_dense_one() -> None:
    space = TRACING.space.with_limits(min_keep=0.3, multiple=2)
    assert space.widths(mask_at(space, 1.0)).tolist() == space.dense_widths.tolist()
    assert space.widths(mask_at(space, 0.0)).tolist() == space.min_widths.tolist()
    masks = random_masks(space, 20, np.random.default_rng(0))
    widths = np.array([space.widths(keep) for keep in masks])
    assert (widths >= space.min_widths).all()
    assert ((widths % 2 == 0) | (widths == space.dense_widths)).all()
    assert len({tuple(row) for row in widths.tolist()}) > 10
