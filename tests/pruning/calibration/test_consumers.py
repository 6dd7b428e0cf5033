"""Layers as products of matrices: patches times the matrix are what the layer computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fppmo_ray.pruning.calibration.consumers import input_patches, weight_matrix, write_matrix

LAYERS = {
    "3x3": (nn.Conv2d(4, 6, 3, padding=1), (9, 7)),
    "1x1": (nn.Conv2d(4, 6, 1, bias=False), (5, 5)),
    "strided": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (8, 7)),
    "uneven": (nn.Conv2d(4, 6, (3, 2), stride=(1, 2), dilation=(2, 1), padding=(2, 0)), (9, 8)),
    "same": (nn.Conv2d(4, 6, (3, 5), padding="same"), (6, 6)),
    "reflected": (nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"), (6, 6)),
    "grouped": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (6, 6)),
    "1-d": (nn.Conv1d(4, 6, 5, stride=2, padding=2), (11,)),
    "3-d": (nn.Conv3d(4, 6, (2, 3, 1), padding=(0, 1, 0)), (4, 5, 3)),
    "transposed": (nn.ConvTranspose2d(4, 6, 2, stride=2), (5, 4)),
    "transposed, odd": (
        nn.ConvTranspose2d(4, 6, (3, 4), stride=(2, 3), padding=(1, 2), output_padding=(1, 0)),
        (5, 4),
    ),
    "transposed, dilated": (nn.ConvTranspose2d(4, 6, 3, dilation=2, padding=5), (9, 9)),
    "transposed, grouped": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2), (5, 4)),
    "transposed, 1-d": (nn.ConvTranspose1d(4, 6, 3, stride=2), (6,)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_patches_times_the_matrix_are_the_convolution(kind):
    layer, size = LAYERS[kind]
    layer = layer.double()
    images = torch.randn(3, 4, *size, dtype=torch.float64)
    output = layer(images)
    patches = input_patches(layer, images, output, None)
    product = torch.einsum("pgc,goc->pgo", patches, weight_matrix(layer)).flatten(1)
    if layer.bias is not None:
        product = product + layer.bias
    assert torch.allclose(product, output.movedim(1, -1).flatten(0, -2), atol=1e-12)


@pytest.mark.parametrize("shape", [(5, 4), (5, 3, 4)])
def test_vectors_times_the_matrix_are_the_linear_layer(shape):
    layer = nn.Linear(4, 6).double()
    inputs = torch.randn(shape, dtype=torch.float64)
    output = layer(inputs)
    patches = input_patches(layer, inputs, output, None)
    product = patches[:, 0] @ weight_matrix(layer)[0].T + layer.bias
    assert torch.allclose(product, output.reshape(-1, 6), atol=1e-12)


def test_an_image_without_a_batch_axis_is_a_batch_of_one():
    layer = nn.Conv2d(4, 6, 3)
    image = torch.randn(4, 7, 7)
    patches = input_patches(layer, image, layer(image), None)
    assert torch.equal(patches, input_patches(layer, image[None], layer(image[None]), None))


@pytest.mark.parametrize("kind", LAYERS)
def test_writing_a_matrix_undoes_reading_it(kind):
    layer = LAYERS[kind][0].double()
    before = layer.weight.detach().clone()
    write_matrix(layer, weight_matrix(layer).clone())
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("kind", ["3x3", "strided", "uneven", "1-d", "3-d"])
def test_the_lattices_of_successive_batches_cover_all_positions_once(kind):
    layer, size = LAYERS[kind]
    layer = layer.double()
    images = torch.randn(2, 4, *size, dtype=torch.float64)
    output = layer(images)
    everything = input_patches(layer, images, output, None)
    few = [input_patches(layer, images, output, len(everything) // 4, i) for i in range(4)]
    assert all(len(part) < len(everything) / 2 for part in few)
    assert torch.allclose(
        torch.cat(few).flatten(1).sort(dim=0).values, everything.flatten(1).sort(dim=0).values
    )
