"""Parquet files with images are read group by group, when images are needed."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fppmo_ray import Transform
from fppmo_ray.training import open_images
from fppmo_ray.training.own_data import OwnData, own_data
from fppmo_ray.training.parquet_stream import ShardImages, open_shards
from fppmo_ray.training.prepared import Rows, shuffled_by_blocks

HALVES = Transform(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), image_size=8, padding=0, flip=False)
PIXELS = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
LABELS = np.arange(60) % 3
NAMES = ["ant", "bee", "crab"]


def write(path: Path, rows: slice) -> None:
    """Write rows of the images in row groups of five, with the hub's metadata."""
    cells = []
    for pixels in PIXELS[rows]:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        cells.append({"bytes": buffer.getvalue(), "path": None})
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(cells, kind), "label": LABELS[rows]})
    features = {"info": {"features": {"label": {"names": NAMES}}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, path, row_group_size=5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data/train-00000-of-00002.parquet", slice(0, 23))
    write(tmp_path / "data/train-00001-of-00002.parquet", slice(23, 50))
    write(tmp_path / "data/validation-00000-of-00001.parquet", slice(50, 60))
    return tmp_path


def data_of(folder: Path) -> OwnData:
    found = own_data(str(folder), HALVES)
    assert isinstance(found, OwnData)
    return found


def test_images_labels_and_class_names_are_those_of_the_files(folder: Path) -> None:
    dataset = data_of(folder).dataset
    assert dataset.class_names == tuple(NAMES)
    assert np.array_equal(dataset.train.labels, LABELS[:50])
    assert np.array_equal(dataset.test.labels, LABELS[50:])
    wanted = torch.from_numpy(PIXELS).permute(0, 3, 1, 2) / 127.5 - 1
    rows = np.array([0, 22, 23, 49, 7])
    [(batch, labels)] = open_images(dataset.train, rows, dataset).batches(8)
    assert torch.allclose(batch, wanted[rows], atol=1e-6)
    assert labels.tolist() == LABELS[rows].tolist()
    [(test, _)] = open_images(dataset.test, None, dataset).batches(10)
    assert torch.allclose(test, wanted[50:], atol=1e-6)


def test_an_epoch_serves_every_image_once_and_reads_every_row_group_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = data_of(folder).dataset
    reads: list[int] = []
    read = pq.ParquetFile.read_row_group

    def counted(file: pq.ParquetFile, index: int, **kwargs: object) -> pa.Table:
        reads.append(index)
        return read(file, index, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    images = open_images(dataset.train, None, dataset, decoding_threads=2)
    epochs = [
        torch.cat([x for x, _ in images.training_batches(10, seed=0, epoch=epoch)])
        for epoch in (0, 0, 1)
    ]
    assert len(reads) <= 3 * 11  # row groups: 5 of the first file and 6 of the second
    everything = sorted(PIXELS[:50].reshape(50, -1).sum(1).tolist())
    sums = ((epochs[0].reshape(50, -1) + 1) * 127.5).sum(1).round().long().tolist()
    assert sorted(sums) == everything
    assert sums != everything
    assert torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], epochs[2])


def test_blocks_are_shuffled_within_windows() -> None:
    blocks = np.repeat(np.arange(12), 5)
    order = shuffled_by_blocks(blocks, 3, np.random.default_rng(0))
    assert sorted(order.tolist()) == list(range(60))
    windows = [set(blocks[part].tolist()) for part in order.reshape(4, 15)]
    assert [len(window) for window in windows] == [3, 3, 3, 3]
    assert set.union(*windows) == set(range(12))
    assert any(blocks[order[i]] != blocks[order[i + 1]] for i in range(4))
    gaps = shuffled_by_blocks(np.array([7, 2, 7]), 1, np.random.default_rng(0))
    assert sorted(gaps.tolist()) == [0, 1, 2]


def test_what_was_read_does_not_travel_to_the_workers(folder: Path) -> None:
    images, _, _ = open_shards(str(folder), "train")
    first = images[0]
    there: ShardImages = pickle.loads(pickle.dumps(images))
    assert "_cache" not in vars(there)
    assert there[0] == first
    assert Rows(Rows(there, [3, 30]), [1]).blocks(np.array([0])) == [6]


def test_missing_and_broken_files_are_refused(folder: Path, tmp_path: Path) -> None:
    path = folder / "data/train-00001-of-00002.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"train-00001-of-00002.parquet is corrupt, truncated"):
        data_of(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"expected 2 of the files train-\*.parquet in .*found 1"):
        data_of(folder)
    (folder / "data/train-00000-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match=r"must hold parquet files train-\*.parquet, found valid"):
        data_of(folder)


def test_credentials_in_a_uri_are_not_shown() -> None:
    with pytest.raises(ValueError, match=r"^no://bucket/x cannot be opened") as caught:
        own_data("no://key:secret@bucket/x?token=hidden", HALVES)
    assert "secret" not in str(caught.value)
    assert "hidden" not in str(caught.value)
