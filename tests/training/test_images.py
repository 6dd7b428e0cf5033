from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fppmo_ray.training import (
    Augmentation,
    Dataset,
    ImageArrays,
    ImageFiles,
    example_batch,
    open_images,
)
from fppmo_ray.training.images import crop_and_flip, derive_seed


def dataset(image_set, *, channels=3, padding=1, flip=True):
    return Dataset(
        name="made up",
        train=image_set,
        test=image_set,
        num_classes=3,
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
        augmentation=Augmentation(padding=padding, flip=flip),
    )


def arrays(count=10, side=4, channels=3):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, side, side, channels), dtype=np.uint8)
    return ImageArrays(pixels, np.arange(count) % 3)


@pytest.fixture
def files(tmp_path):
    """The same images as ``arrays()``, on disk."""
    images = arrays()
    paths = tuple(tmp_path / f"{row}.png" for row in range(10))
    for path, pixels in zip(paths, images.images, strict=True):
        Image.fromarray(pixels).save(path)
    return ImageFiles(paths, images.labels, 4, 4)


def stacked(batches):
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_batches_are_normalised_channels_first_and_in_order():
    pixels = np.zeros((2, 1, 2, 3), np.uint8)
    pixels[1, 0, 1] = (255, 51, 0)
    images = open_images(ImageArrays(pixels, np.array([2, 1])), None, dataset(arrays()))
    [(batch, labels)] = images.batches(8)
    assert batch.shape == (2, 3, 1, 2)
    assert batch.dtype == torch.float32
    assert batch[1, :, 0, 1].tolist() == pytest.approx([2.0, -1.2, -2.0], abs=1e-6)
    assert labels.tolist() == [2, 1]


def test_batches_hold_the_rows_and_positions_asked_for():
    source = arrays()
    images = open_images(source, np.array([9, 4, 5]), dataset(source))
    assert len(images) == 3
    assert images.labels.tolist() == [0, 1, 2]
    batches = list(images.batches(2))
    assert [len(labels) for _, labels in batches] == [2, 1]
    everything, _ = stacked(batches)
    chosen, labels = stacked(images.batches(2, indices=np.array([2, 0])))
    assert torch.equal(chosen, everything[[2, 0]])
    assert labels.tolist() == [2, 0]


def test_an_epoch_is_a_function_of_seed_and_epoch():
    source = arrays()
    images = open_images(source, None, dataset(source))

    def epoch(seed, number):
        return stacked(images.training_batches(4, seed=seed, epoch=number))

    first, labels = epoch(7, 0)
    again, labels_again = epoch(7, 0)
    assert torch.equal(first, again)
    assert torch.equal(labels, labels_again)
    assert not torch.equal(first, epoch(7, 1)[0])
    assert not torch.equal(first, epoch(8, 0)[0])
    assert not torch.equal(first, epoch((7, 1), 0)[0])


def test_training_leaves_torchs_own_generator_alone():
    source = arrays()
    before = torch.get_rng_state()
    list(open_images(source, None, dataset(source)).training_batches(4, seed=0, epoch=0))
    assert torch.equal(before, torch.get_rng_state())


def test_an_epoch_shows_no_image_twice_and_leaves_only_a_remainder_out():
    source = arrays()
    plain = dataset(source, padding=0, flip=False)
    images = open_images(source, None, plain)
    shown, _ = stacked(images.training_batches(4, seed=0, epoch=0))
    stored, _ = stacked(images.batches(10))
    matches = [[torch.equal(a, b) for b in stored].index(True) for a in shown]
    assert len(set(matches)) == len(matches) == 8
    assert images.num_training_batches(4) == 2


def test_a_set_smaller_than_a_batch_is_one_batch():
    source = arrays()
    images = open_images(source, None, dataset(source))
    assert images.num_training_batches(64) == 1
    [(batch, _)] = images.training_batches(64, seed=0, epoch=0)
    assert len(batch) == 10


def test_every_image_is_cropped_and_mirrored_by_its_own_move():
    pixels = torch.arange(1, 10, dtype=torch.uint8).reshape(1, 1, 3, 3).expand(4, 1, 3, 3)
    moves = torch.tensor([[1, 1, 0], [0, 1, 0], [2, 2, 0], [1, 1, 1]])
    assert crop_and_flip(pixels, moves, padding=1).squeeze(1).tolist() == [
        [[1, 2, 3], [4, 5, 6], [7, 8, 9]],
        [[0, 0, 0], [1, 2, 3], [4, 5, 6]],
        [[5, 6, 0], [8, 9, 0], [0, 0, 0]],
        [[3, 2, 1], [6, 5, 4], [9, 8, 7]],
    ]


def test_all_crops_and_both_sides_occur_and_digits_are_never_mirrored():
    pixels = np.zeros((2000, 3, 3, 1), np.uint8)
    pixels[:, 1, 1], pixels[:, 1, 2] = 200, 100
    source = ImageArrays(pixels, np.zeros(2000, np.int64))

    def corners(flip):
        images = open_images(source, None, dataset(source, channels=1, flip=flip))
        shown, _ = stacked(images.training_batches(2000, seed=0, epoch=0))
        return {tuple(image.flatten().tolist()) for image in shown}

    assert len(corners(flip=False)) == 9
    assert len(corners(flip=True)) == 18


def test_read_only_arrays_are_neither_written_nor_warned_about():
    source = arrays()
    source.images.flags.writeable = False
    source.labels.flags.writeable = False
    before = source.images.copy()
    images = open_images(source, None, dataset(source))
    list(images.training_batches(4, seed=0, epoch=0))
    images.labels.zero_()
    assert np.array_equal(source.images, before)
    assert source.labels[1] == 1


def test_streamed_and_resident_images_are_the_same(files):
    source = arrays()
    rows = np.array([8, 1, 2, 3, 0])
    resident = open_images(source, rows, dataset(source))
    streamed = open_images(files, rows, dataset(files))
    for ours, theirs in (
        (resident.batches(2), streamed.batches(2)),
        (
            resident.training_batches(2, seed=3, epoch=1),
            streamed.training_batches(2, seed=3, epoch=1),
        ),
    ):
        images, labels = stacked(ours)
        other_images, other_labels = stacked(theirs)
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


def test_a_broken_streamed_image_is_named_and_an_unfinished_stream_ends(files):
    files.paths[7].write_bytes(b"no image")
    images = open_images(files, None, dataset(files))
    with pytest.raises(ValueError, match=r"cannot decode .*7\.png"):
        list(images.batches(2))
    assert len(next(iter(images.batches(2)))[0]) == 2


def test_example_batches_have_the_shape_of_the_data(files):
    source = arrays(channels=1)
    assert example_batch(dataset(source, channels=1)).shape == (1, 1, 4, 4)
    black = example_batch(dataset(files))
    assert black.shape == (1, 3, 4, 4)
    assert black.unique().tolist() == [-2.0]


@pytest.mark.parametrize("rows", [[10], [-1], []])
def test_rows_outside_the_set_are_refused(rows):
    source = arrays()
    with pytest.raises(ValueError, match=r"of 10 images must be in \[0, 9\] and at least one"):
        open_images(source, np.array(rows, dtype=np.int64), dataset(source))


def test_images_of_another_data_set_are_refused():
    with pytest.raises(ValueError, match="images have 1 channels, but data set made up has a mean"):
        open_images(arrays(channels=1), None, dataset(arrays()))


def test_a_data_set_of_ones_own_is_checked_when_it_is_made():
    pixels, labels = arrays().images, arrays().labels
    with pytest.raises(ValueError, match=r"uint8 of shape \(N, H, W, C\), got float64 of shape"):
        ImageArrays(pixels / 255, labels)
    with pytest.raises(ValueError, match=r"must be int64 of shape \(10,\), got int64 of shape \(9"):
        ImageArrays(pixels, labels[1:])
    with pytest.raises(ValueError, match=r"must be int64 of shape \(10,\), got int32"):
        ImageArrays(pixels, labels.astype(np.int32))
    with pytest.raises(ValueError, match="label 3 at row 0 of made up's train set is outside"):
        dataset(ImageArrays(pixels, labels + 3))
    with pytest.raises(ValueError, match="one value per channel"):
        replace(dataset(arrays()), std=(0.2, 0.2))


def test_derived_seeds_are_fixed_for_good():
    """Checkpoints and journals of older versions depend on them."""
    assert derive_seed(0, 0) == 15793235383387715774
    assert derive_seed((0, 0)) == derive_seed(0, 0)
    assert derive_seed(0, 1) != derive_seed(1, 0)
