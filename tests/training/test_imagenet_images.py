"""A folder like ImageNet's, as torchvision's networks see it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fppmo_ray.training import (
    Augmentation,
    Dataset,
    ImageArrays,
    ImageFiles,
    RandomResizedCrop,
    Transform,
    decoding,
    example_batch,
    load_imagenet,
    open_images,
    prepared,
)
from fppmo_ray.training.decoding import decode_view


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, six training and four validation images of 40 x 30 pixels."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 3), ("val", 2)):
        for name in ("n01", "n02"):
            (tmp_path / part / name).mkdir(parents=True)
            for row in range(count):
                pixels = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{row}.jpeg")
    (tmp_path / "test").mkdir()  # ImageNet's has no labels
    return tmp_path


def test_files_stay_on_disk_however_few_they_are(folder: Path) -> None:
    dataset = load_imagenet(folder, Transform(image_size=16, resize=20))
    assert isinstance(dataset.train, ImageFiles)
    assert isinstance(dataset.test, ImageFiles)
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.test.labels.tolist() == [0, 0, 1, 1]
    assert dataset.num_classes == 2
    assert example_batch(dataset).shape == (1, 3, 16, 16)


def test_networks_see_what_torchvisions_evaluation_shows_them(folder: Path) -> None:
    from torchvision import transforms

    dataset = load_imagenet(folder, Transform(image_size=16, resize=20))
    [(ours, _)] = open_images(dataset.test, None, dataset).batches(4)
    look = transforms.Compose(
        [
            transforms.Resize(20),
            transforms.CenterCrop(16),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    theirs = torch.stack([look(Image.open(path)) for path in dataset.test.paths])
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_an_epoch_of_random_parts_is_a_function_of_seed_and_epoch_not_of_threads(
    folder: Path,
) -> None:
    dataset = load_imagenet(folder, Transform(image_size=16, resize=20))

    def epoch(seed: int, number: int, threads: int) -> torch.Tensor:
        images = open_images(dataset.train, None, dataset, decoding_threads=threads)
        batches = images.training_batches(2, seed=seed, epoch=number)
        return torch.cat([pixels for pixels, _ in batches])

    first = epoch(7, 0, threads=1)
    assert first.shape == (6, 3, 16, 16)
    assert torch.equal(first, epoch(7, 0, threads=4))
    assert not torch.equal(first, epoch(7, 1, threads=4))
    assert not torch.equal(first, epoch(8, 0, threads=4))


def test_training_shows_other_parts_than_the_middle(folder: Path) -> None:
    dataset = load_imagenet(folder, Transform(image_size=16, resize=20))
    images = open_images(dataset.train, np.array([0]), dataset)
    [(middle, _)] = images.batches(1)
    parts = [next(images.training_batches(1, seed=0, epoch=epoch))[0] for epoch in range(4)]
    assert len({float(part.mean()) for part in (middle, *parts)}) == 5


def test_folders_and_sizes_that_do_not_fit_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="at least the 16 pixels of the centre crop, got 15"):
        load_imagenet(folder, Transform(image_size=16, resize=15))
    with pytest.raises(ValueError, match="image_size must be at least 1 pixel, got 0"):
        Transform(image_size=0)
    (folder / "val").rename(folder / "validation")
    with pytest.raises(ValueError, match="needs a folder val beside train"):
        load_imagenet(folder)


def test_random_parts_of_images_in_memory_are_refused() -> None:
    images = ImageArrays(np.zeros((2, 4, 4, 3), np.uint8), np.array([0, 1]))
    small = Dataset(
        name="small",
        train=images,
        test=images,
        num_classes=2,
        mean=(0.5,) * 3,
        std=(0.2,) * 3,
        augmentation=Augmentation(padding=1, flip=True),
    )
    with pytest.raises(ValueError, match="small holds its training images in memory"):
        replace(small, augmentation=RandomResizedCrop())


def test_images_that_are_looked_at_again_are_decoded_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = load_imagenet(folder, Transform(image_size=16, resize=20))
    decoded: list[str] = []

    def view(path: Path, name: str, *size: Any) -> Any:
        decoded.append(name)
        return decode_view(path, name, *size)

    monkeypatch.setattr(decoding, "decode_view", view)
    rows = np.array([0, 2, 3, 5])
    again, kept = (open_images(dataset.train, rows, dataset, keep=keep) for keep in (False, True))
    [(expected, _)] = again.batches(4)
    for images, wanted in ((again, 8), (kept, 4)):
        decoded.clear()
        for indices in (None, np.array([1, 3]), None):
            found = torch.cat([batch for batch, _ in images.batches(3, indices)])
            assert torch.equal(found, expected if indices is None else expected[indices])
        assert len(decoded) == wanted + (images is again) * 2
    first, second = (list(images.training_batches(2, seed=0, epoch=0)) for images in (again, kept))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, second, strict=True))
    monkeypatch.setattr(prepared, "_MAX_KEPT", 4 * 16 * 16 * 3 - 1)
    assert open_images(dataset.train, rows, dataset, keep=True).pixels.kept is None
