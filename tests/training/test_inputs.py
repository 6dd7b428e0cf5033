"""Unlabelled inputs: what is taken from batches, in which order it is served, what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fppmo_ray.training.inputs import collect_inputs, inputs_of

IMAGE = torch.zeros(1, 2, 3)


def numbered(begin: int, end: int) -> torch.Tensor:
    return torch.arange(begin, end).float()[:, None, None].expand(-1, 2, 3).clone()


def test_batches_of_tensors_and_of_images_with_labels_give_the_same_images() -> None:
    labels = torch.zeros(4)
    found = collect_inputs([numbered(0, 3), (numbered(3, 7), labels), [numbered(7, 8)]], [IMAGE])
    assert len(found) == 8
    assert found.tensors[0][:, 0, 0].tolist() == list(range(8))
    served = [batch[0][:, 0, 0].tolist() for batch in found.batches(3, np.array([7, 1, 4, 2]))]
    assert served == [[7, 1, 4], [2]]


def test_a_network_of_two_inputs_gets_both_of_the_same_example() -> None:
    batches = [(numbered(0, 5), 10 * numbered(0, 5), "a name")]
    found = collect_inputs(batches, [IMAGE, IMAGE])
    assert [len(part) for part in inputs_of(batches[0], 2)] == [5, 5]
    for left, right in found.training_batches(2, seed=0, epoch=0):
        assert torch.equal(right, 10 * left)


def test_an_epoch_serves_full_batches_in_another_order_than_the_last() -> None:
    found = collect_inputs([numbered(0, 7)], [IMAGE])

    def served(epoch: int, batch_size: int = 3) -> list[list[float]]:
        batches = found.training_batches(batch_size, seed=5, epoch=epoch)
        return [batch[0][:, 0, 0].tolist() for batch in batches]

    assert [len(batch) for batch in served(0)] == [3, 3]
    assert len({number for batch in served(0) for number in batch}) == 6
    assert served(0) == served(0) != served(1)
    assert [sorted(batch) for batch in served(0, batch_size=20)] == [list(range(7))]


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "expected batches of images without labels, got none"),
        (
            [numbered(0, 0)],
            r"like the example inputs of shape \[\(1, 2, 3\)\], got \[\(0, 2, 3\)\]",
        ),
        ([torch.zeros(4)], r"got \[\(4,\)\]"),
        ([{"image": IMAGE}], r"got \['dict'\]"),
        ([("path", IMAGE)], r"got \['str'\]"),
        ([IMAGE, torch.zeros(1, 2, 4)], r"shape of those in the first batch, .* crop or resize"),
    ],
)
def test_batches_that_do_not_fit_are_refused(batches: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collect_inputs(batches, [IMAGE])
