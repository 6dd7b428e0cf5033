from __future__ import annotations

import io
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fppmo_ray.training import (
    Augmentation,
    CentreCrop,
    Dataset,
    ImageArrays,
    ImageFiles,
    Transform,
    build_network,
    evaluate,
    load_dataset,
    load_weights,
    open_images,
)
from fppmo_ray.training.decoding import decode_view
from fppmo_ray.training.parquet import find_shards, read_parquet_images


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def random_pixels(count: int, side: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def write_parquet(path, images, labels, *, image="img", label="label"):
    cells = [encoded and {"bytes": encoded, "path": None} for encoded in images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({image: pa.array(cells, kind), label: labels}), path)


@pytest.fixture
def cifar(tmp_path):
    """Six training images in two shards and three test images; returns folder and pixels."""
    pixels = random_pixels(9)
    encoded = [png(image) for image in pixels]
    write_parquet(tmp_path / "train-00000-of-00002.parquet", encoded[:4], [0, 1, 2, 3])
    write_parquet(tmp_path / "train-00001-of-00002.parquet", encoded[4:6], [9, 8])
    write_parquet(tmp_path / "test-00000-of-00001.parquet", encoded[6:], [5, 5, 5])
    return tmp_path, pixels


def test_digits_are_real_stratified_and_of_the_whole_byte_range():
    digits = load_dataset("digits")
    assert digits.train.images.shape == (1438, 8, 8, 1)
    assert digits.test.images.shape == (359, 8, 8, 1)
    assert digits.train.images.max() == 255
    shares = np.bincount(digits.test.labels) / np.bincount(digits.train.labels)
    assert shares.min() > 0.24
    assert shares.max() < 0.26
    assert not digits.augmentation.flip
    again = load_dataset("digits")
    assert np.array_equal(digits.test.images, again.test.images)


def test_parquet_shards_are_read_in_order(cifar):
    folder, pixels = cifar
    dataset = load_dataset("cifar10", folder)
    assert np.array_equal(dataset.train.images, pixels[:6])
    assert dataset.train.labels.tolist() == [0, 1, 2, 3, 9, 8]
    assert np.array_equal(dataset.test.images, pixels[6:])
    assert (dataset.num_classes, dataset.augmentation.padding) == (10, 4)


def test_a_subfolder_as_on_the_hub_and_the_other_column_names_are_found(tmp_path):
    folder = tmp_path / "cifar100"
    folder.mkdir()
    for part in ("train", "test"):
        write_parquet(
            folder / f"{part}-00000-of-00001.parquet",
            [png(image) for image in random_pixels(2)],
            [99, 0],
            image="image",
            label="fine_label",
        )
    assert load_dataset("cifar100", tmp_path).train.labels.tolist() == [99, 0]


def test_grey_images_become_three_equal_channels(cifar):
    folder, pixels = cifar
    grey = pixels[0, :, :, 0]
    write_parquet(folder / "test-00000-of-00001.parquet", [png(grey)], [0])
    images = load_dataset("cifar10", folder).test.images
    assert np.array_equal(images[0], np.stack([grey] * 3, axis=-1))


def test_a_missing_shard_is_refused(cifar):
    folder, _ = cifar
    (folder / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match=r"speak of 2 files, found 1; fetch the missing ones"):
        load_dataset("cifar10", folder)


@pytest.mark.parametrize("share", [0, 0.3, 0.7, 0.99])
def test_a_truncated_parquet_file_is_refused_by_name(cifar, share):
    path = cifar[0] / "train-00001-of-00002.parquet"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"train-00001-of-00002.parquet is corrupt, truncated"):
        load_dataset("cifar10", cifar[0])


def test_a_parquet_file_with_overwritten_pages_is_refused_by_name(cifar):
    path = cifar[0] / "train-00001-of-00002.parquet"
    content = bytearray(path.read_bytes())
    content[4:400] = bytes(396)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-00001-of-00002.parquet"):
        load_dataset("cifar10", cifar[0])


@pytest.mark.parametrize(
    ("labels", "complaint"),
    [
        ([0, 10, 3], r"label 10 at row 1 of .*test-.* is outside the classes 0 to 9 \(1 such"),
        ([0, 1, -1], "label -1 at row 2"),
        ([0, None, 3], "the label in row 1 of .* is missing"),
        (["a", "b", "c"], "column label of .* must hold integers, got string"),
    ],
)
def test_wrong_labels_are_refused(cifar, labels, complaint):
    folder, pixels = cifar
    images = [png(image) for image in pixels[:3]]
    write_parquet(folder / "test-00000-of-00001.parquet", images, labels)
    with pytest.raises(ValueError, match=complaint):
        load_dataset("cifar10", folder)


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        (b"no image", "cannot decode the image in row 1 of .*test-"),
        (png(random_pixels(1)[0])[:500], "cannot decode the image in row 1 of .*test-"),
        (png(random_pixels(1, side=28)[0]), "row 1 of .* is 28 x 28 pixels, expected 32 x 32"),
        (None, "the image in row 1 of .* is missing"),
    ],
)
def test_wrong_images_are_refused(cifar, image, complaint):
    folder, pixels = cifar
    write_parquet(folder / "test-00000-of-00001.parquet", [png(pixels[0]), image], [0, 1])
    with pytest.raises(ValueError, match=complaint):
        load_dataset("cifar10", folder)


def test_missing_columns_are_refused_by_naming_those_there(cifar):
    folder, _ = cifar
    path = folder / "test-00000-of-00001.parquet"
    pq.write_table(pa.table({"pixels": [1], "label": [1]}), path)
    with pytest.raises(ValueError, match=r"needs a column img or image .* got pixels, label"):
        load_dataset("cifar10", folder)
    pq.write_table(pa.table({"img": [1], "label": [1]}), path)
    with pytest.raises(ValueError, match="must be a struct with bytes, got int64"):
        load_dataset("cifar10", folder)
    write_parquet(path, [], pa.array([], pa.int64()))
    with pytest.raises(ValueError, match="holds no rows"):
        load_dataset("cifar10", folder)


def test_what_is_no_data_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must be one of .*, got 'mnist'"):
        load_dataset("mnist")
    with pytest.raises(ValueError, match="needs the folder that holds it, got None"):
        load_dataset("cifar10")
    with pytest.raises(ValueError, match="needs the folder that holds it"):
        load_dataset("cifar10", tmp_path / "absent")
    with pytest.raises(ValueError, match=r"expected train-\*\.parquet or the folder cifar-10-"):
        load_dataset("cifar10", tmp_path)


def test_torchvisions_folder_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = random_pixels(6)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for row, name in enumerate(names):
        planes = pixels[row].transpose(2, 0, 1).reshape(1, -1)
        (folder / name).write_bytes(pickle.dumps({"data": planes, "labels": [row]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    dataset = load_dataset("cifar10", tmp_path)
    assert np.array_equal(dataset.train.images, pixels[:5])
    assert dataset.test.labels.tolist() == [5]
    assert np.array_equal(load_dataset("cifar10", folder).test.images, pixels[5:])


def test_a_broken_torchvision_folder_is_refused(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(ValueError, match="cifar-10-batches-py is incomplete or corrupt"):
        load_dataset("cifar10", tmp_path)


@pytest.fixture
def folder(tmp_path):
    """Two classes, three training and two validation images of 16 x 16 pixels."""
    for row, name in enumerate(
        ["train/cat/1.png", "train/cat/2.png", "train/dog/1.PNG", "val/cat/3.png", "val/dog/3.png"]
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(np.full((16, 16, 3), 10 * row, np.uint8)))
    (tmp_path / "train/cat/notes.txt").write_text("no image")
    return tmp_path


def test_a_small_image_folder_becomes_arrays(folder):
    dataset = load_dataset("image_folder", folder, Transform(image_size=16))
    assert isinstance(dataset.train, ImageArrays)
    assert dataset.train.images[:, 0, 0, 0].tolist() == [0, 10, 20]
    assert dataset.train.labels.tolist() == [0, 0, 1]
    assert dataset.test.labels.tolist() == [0, 1]
    assert dataset.num_classes == 2


def test_a_large_image_folder_stays_on_disk(folder):
    limit = 3 * 16 * 16 * 3
    assert isinstance(
        load_dataset("image_folder", folder, Transform(image_size=16), byte_limit=limit).train,
        ImageArrays,
    )
    train = load_dataset(
        "image_folder", folder, Transform(image_size=16), byte_limit=limit - 1
    ).train
    assert isinstance(train, ImageFiles)
    assert [path.name for path in train.paths] == ["1.png", "2.png", "1.PNG"]


def test_images_are_resized_by_the_shorter_side_and_cropped_in_the_centre():
    wide = np.zeros((64, 128, 3), np.uint8)
    wide[:, 32:96] = 200  # the middle half
    cropped = decode_view(png(wide), "wide", 28, 28, CentreCrop())
    assert cropped.shape == (28, 28, 3)
    assert cropped.min() == 200
    exact = random_pixels(1, side=28)[0]
    assert np.array_equal(decode_view(png(exact), "exact", 28, 28, CentreCrop()), exact)


def test_broken_image_folders_are_refused(folder):
    def refused(complaint):
        with pytest.raises(ValueError, match=complaint):
            load_dataset("image_folder", folder, Transform(image_size=16))

    (folder / "val/bird").mkdir()
    refused(r"val has classes that .*train lacks: \['bird'\]")
    (folder / "train/bird").mkdir()
    refused("class folder .*train/bird holds no images")
    (folder / "train/bird").rmdir()
    (folder / "val/bird").rmdir()
    (folder / "train/cat/2.png").write_bytes(b"no image")
    refused("cannot decode .*train/cat/2.png")
    (folder / "val").rename(folder / "elsewhere")
    refused("needs a folder test or val beside train")
    (folder / "train").rename(folder / "gone")
    refused("there is no folder .*train")


def test_a_trained_resnet_reads_real_images_as_published(shared_data):
    """87.56 % on all of test, with the normalisation of the public ResNets."""
    [shard] = find_shards(shared_data / "cifar10-jpeg", "test")
    test = read_parquet_images([shard], num_classes=10, height=32, width=32)
    assert test.images.shape == (10000, 32, 32, 3)
    assert np.bincount(test.labels).tolist() == [1000] * 10
    dataset = Dataset(
        name="cifar10",
        train=test,
        test=test,
        num_classes=10,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        augmentation=Augmentation(padding=4, flip=True),
    )
    network = build_network("resnet20", 10)
    load_weights(network, shared_data / "pretrained" / "resnet20-cifar10jpeg-rows0-44999.pt")
    images = open_images(test, np.arange(0, 10000, 10), dataset)
    assert evaluate(network, images.batches(250)).accuracy == pytest.approx(0.8756, abs=0.02)
