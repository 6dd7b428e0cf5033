"""Peak memory of activations, from the tensors that are alive together in a pass."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fppmo_ray.pruning import extract, trace
from fppmo_ray.training import build_network


class Residual(nn.Module):
    """Sums what came in with what two convolutions make of it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 16, 3, padding=1)
        self.back = nn.Conv2d(16, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        stream = self.stem(images)
        inner = self.body(stream).relu_()
        stream = stream + self.back(inner)
        return self.head(stream.mean((2, 3)))


def test_the_peak_is_where_most_tensors_are_there_at_once() -> None:
    space = trace(Residual(), torch.zeros(1, 3, 4, 4)).space
    # While the sum is made: the image (3 x 16 numbers), the old and the new stream, what the inner
    # convolution made, which the function still names, and what is added; 4 bytes each.
    assert space.activations.total(np.array([8, 16])) == 4 * 16 * (3 + 8 + 8 + 16 + 8)
    assert space.activations.total(np.array([4, 2])) == 4 * 16 * (3 + 4 + 4 + 2 + 4)


@pytest.mark.parametrize("name", ["digits_cnn", "resnet20", "resnet20_b"])
def test_the_peak_of_a_mask_is_that_of_its_extracted_network(name: str) -> None:
    shape = (1, 1, 8, 8) if name == "digits_cnn" else (1, 3, 32, 32)
    dense = build_network(name, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # option-A shortcuts are left whole
        tracing = trace(dense, torch.zeros(shape))
        keep = np.random.default_rng(0).random(tracing.space.num_filters) < 0.5
        keep[tracing.space.offsets] = True
        smaller = trace(extract(dense, tracing, keep), torch.zeros(shape)).space
    assert tracing.space.activations.total(tracing.space.widths(keep)) == (
        smaller.activations.total(smaller.dense_widths)
    )
