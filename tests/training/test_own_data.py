"""Data as users have it becomes the same batches as the data set that it was made of."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset
from torch.utils.data import Dataset as TorchDataset

from fppmo_ray import Transform
from fppmo_ray.training import ImageArrays, ImageFiles, PreparedInputs, interface_of, open_images
from fppmo_ray.training.own_data import Unlabelled, own_batches, own_code, own_data

HALVES = Transform(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), image_size=8, padding=0, flip=False)
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
LABELS = np.arange(40) % 4
INPUTS = torch.from_numpy(PIXELS).permute(0, 3, 1, 2) / 127.5 - 1
TENSORS = TensorDataset(INPUTS, torch.from_numpy(LABELS))


class Pictures(TorchDataset[Any]):
    """Images of Pillow with labels, as torchvision's data sets have them."""

    classes = ("ant", "bee", "crab", "deer")
    targets = LABELS.tolist()

    def __len__(self) -> int:
        return 40

    def __getitem__(self, row: int) -> tuple[Image.Image, int]:
        return Image.fromarray(PIXELS[row]), int(LABELS[row])


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(TENSORS)


class Columns:
    """The part of a Hugging Face data set that is used: columns, features, rows as mappings."""

    class _Label:
        names = ("ant", "bee", "crab", "deer")

    features: ClassVar = {"image": None, "label": _Label}
    column_names = ("image", "label")

    def with_format(self, kind: None) -> dict[str, list[int]]:
        return {"label": LABELS.tolist()}

    def __len__(self) -> int:
        return 40

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"image": Image.fromarray(PIXELS[row]), "label": int(LABELS[row])}


SOURCES: dict[str, tuple[Any, Transform | None, type]] = {
    "uint8 arrays": ((PIXELS, LABELS), HALVES, ImageArrays),
    "float arrays": ((INPUTS.numpy(), LABELS), None, PreparedInputs),
    "tensors": ((INPUTS, torch.from_numpy(LABELS)), None, PreparedInputs),
    "map-style": (TENSORS, None, PreparedInputs),
    "subset": (Subset(TENSORS, range(40)), None, PreparedInputs),
    "pictures": (Pictures(), HALVES, ImageFiles),
    "loader": (DataLoader(TENSORS, batch_size=16), None, PreparedInputs),
    "loader of a stream": (DataLoader(Stream(), batch_size=16), None, PreparedInputs),
    "stream": (Stream(), None, PreparedInputs),
    "columns": (Columns(), HALVES, ImageFiles),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_kind_serves_the_same_inputs_and_labels(name: str) -> None:
    source, transform, kind = SOURCES[name]
    found = own_data({"train": source, "test": source}, transform)
    assert not isinstance(found, Unlabelled)
    dataset = found.dataset
    assert isinstance(dataset.train, kind)
    assert (dataset.num_classes, found.splits) == (4, None)
    rows = np.array([3, 17, 38])
    [(batch, labels)] = open_images(dataset.train, rows, dataset).batches(8)
    assert torch.allclose(batch, INPUTS[rows], atol=1e-6)
    assert labels.tolist() == [3, 1, 2]
    trained = list(open_images(dataset.train, None, dataset).training_batches(20, seed=0, epoch=0))
    found_sum = sum(float(batch.double().sum()) for batch, _ in trained)
    assert found_sum == pytest.approx(float(INPUTS.double().sum()), abs=1e-2)
    is_prepared = kind is PreparedInputs
    assert (interface_of(dataset).preprocessing is None) == is_prepared
    has_names = name in ("pictures", "columns")
    assert dataset.class_names == (Pictures.classes if has_names else None)


def test_a_hugging_face_data_set_is_read_as_it_is() -> None:
    datasets = pytest.importorskip("datasets", reason="the extra huggingface is not installed")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(Pictures.classes))}
    )
    rows = {"image": [Image.fromarray(p) for p in PIXELS], "label": LABELS.tolist()}
    part = datasets.Dataset.from_dict(rows, features=features)
    found = own_data(datasets.DatasetDict(train=part, test=part), HALVES)
    assert not isinstance(found, Unlabelled)
    assert found.dataset.class_names == Pictures.classes
    [(batch, _)] = open_images(found.dataset.train, np.array([5]), found.dataset).batches(1)
    assert torch.allclose(batch, INPUTS[5:6], atol=1e-6)


@pytest.mark.parametrize("name", ["uint8 arrays", "float arrays", "map-style", "pictures"])
def test_a_validation_part_is_held_out_and_a_missing_test_part_is_set_aside(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    source, transform, _ = SOURCES[name]
    with caplog.at_level(logging.INFO):
        found = own_data({"train": source, "val": source}, transform)
    assert not isinstance(found, Unlabelled)
    assert "no test part: 4 of 40 images are set aside for it" in caplog.messages
    dataset, splits = found.dataset, found.splits
    assert (len(dataset.train), len(dataset.test)) == (36 + 40, 4)
    assert sorted(dataset.test.labels.tolist()) == [0, 1, 2, 3]
    assert splits is not None
    assert splits.search_train.tolist() == list(range(36))
    held_out = np.concatenate([splits.search_val, splits.choose_val])
    assert sorted(held_out.tolist()) == list(range(36, 76))
    assert len(splits.choose_val) == 16
    [(batch, labels)] = open_images(dataset.train, np.array([36 + 7]), dataset).batches(1)
    assert torch.allclose(batch, INPUTS[7:8], atol=1e-6)
    assert labels.tolist() == [3]


class Noisy(TorchDataset[Any]):
    """Items with what transforms draw: from torch, Python and numpy."""

    labels = LABELS

    def __len__(self) -> int:
        return 40

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        draws = (float(torch.rand(())), random.random(), float(np.random.rand()))  # noqa: NPY002
        return INPUTS[row] + sum(draws), int(LABELS[row])


def test_random_transforms_of_items_follow_from_seed_epoch_and_item_alone() -> None:
    found = own_data({"train": Noisy(), "test": TENSORS})
    assert not isinstance(found, Unlabelled)
    images = open_images(found.dataset.train, None, found.dataset)

    def epoch(number: int) -> torch.Tensor:
        return torch.cat([x for x, _ in images.training_batches(8, seed=1, epoch=number)])

    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = epoch(0)
    assert torch.equal(torch.get_rng_state(), before)
    random.seed(9)
    assert torch.equal(epoch(0), first)
    assert not torch.equal(epoch(1), first)
    [(a, _)] = images.batches(3, np.array([0, 1, 2]))
    [(b, _)] = images.batches(1, np.array([2]))
    assert torch.equal(a[2:], b)


@pytest.mark.parametrize("source", [INPUTS, INPUTS.numpy(), TensorDataset(INPUTS)])
def test_inputs_alone_are_unlabelled(source: Any) -> None:
    found = own_data(source)
    assert isinstance(found, Unlabelled)
    assert torch.equal(torch.cat([*found.parts]), INPUTS)


def test_a_few_inputs_are_drawn_from_all_of_them(tmp_path: Path) -> None:
    for source, transform, _ in SOURCES.values():
        if not isinstance(source, DataLoader):
            [batch] = own_batches(source, transform, 12)
            inputs = batch if isinstance(batch, torch.Tensor) else batch[0]
            assert inputs.shape == (12, 3, 8, 8)
    [masks] = own_batches(TensorDataset(INPUTS, INPUTS), None, 12)  # labels of any kind
    assert isinstance(masks, torch.Tensor)
    for part in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / part).mkdir(parents=True)
        Image.fromarray(PIXELS[0]).save(tmp_path / part / "1.png")
    [(images, _)] = own_batches(str(tmp_path), HALVES, 12)
    assert torch.allclose(images, INPUTS[[0, 0]], atol=1e-6)


def test_code_of_data_sets_is_found_to_travel_to_the_workers() -> None:
    found = own_data({"train": Noisy(), "val": Noisy()})
    assert not isinstance(found, Unlabelled)
    assert {type(item) for item in own_code(found.dataset.train)} == {Noisy}


@pytest.mark.parametrize(
    ("data", "transform", "complaint"),
    [
        (3, None, "part train of the data must be a Dataset of load_dataset, a folder .* got int"),
        ("nowhere", None, "there is no folder nowhere"),
        ({"test": TENSORS}, None, "data must have a part train, got test"),
        ((PIXELS, LABELS), None, r"normalised as in .*; give transform=Transform\(mean"),
        (Pictures(), None, r"normalised as in .*; give transform=Transform\(mean"),
        (TENSORS, HALVES, "a transform prepares images, and the data is prepared already"),
        ((INPUTS, LABELS[:-1]), None, r"labels must be 40 class numbers .* shape \(39,\); for"),
        ((INPUTS, LABELS / 2), None, "labels must be 40 class numbers from 0 on, got float64"),
        (TensorDataset(INPUTS, INPUTS), None, "labels must be 40 class numbers"),
        (TensorDataset(INPUTS, INPUTS, INPUTS), None, r"a pair \(input, label\), got 3 entries"),
        (
            *(TensorDataset(torch.from_numpy(PIXELS), torch.from_numpy(LABELS)), None),
            r"must be a tensor of floats, .* got torch.uint8; add a transform",
        ),
        ({"train": TENSORS, "test": INPUTS}, None, "part test of the data has no labels"),
        ({"train": TENSORS, "val": (PIXELS, LABELS)}, HALVES, "must be of the same kind"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(
    data: Any, transform: Transform | None, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        own_data(data, transform)


def test_items_that_are_looked_at_again_are_prepared_once() -> None:
    asked: list[int] = []

    class Noisy(TorchDataset[Any]):
        def __len__(self) -> int:
            return 12

        def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
            asked.append(row)
            return torch.randn(2, 3, 3), row % 2

    found = own_data({"train": Noisy(), "test": Noisy()})
    assert not isinstance(found, Unlabelled)
    dataset, rows = found.dataset, np.array([1, 4, 7])
    again, kept = (open_images(dataset.train, rows, dataset, keep=keep) for keep in (False, True))
    [(expected, _)] = again.batches(3)
    state = torch.get_rng_state()
    asked.clear()
    for indices in (np.array([2, 0]), None, None):
        batches = torch.cat([batch for batch, _ in kept.batches(2, indices)])
        assert torch.equal(batches, expected if indices is None else expected[indices])
    assert asked == [7, 1, 4]
    assert torch.equal(torch.get_rng_state(), state)
    first, second = (list(images.training_batches(3, seed=0, epoch=1)) for images in (again, kept))
    assert torch.equal(first[0][0], second[0][0])
    assert not torch.equal(first[0][0].sum(), expected.sum())
