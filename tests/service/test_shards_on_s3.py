"""Parquet files in a bucket are a data set."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from pyarrow.fs import FileSystem

from fppmo_ray import Transform
from fppmo_ray.training import open_images
from fppmo_ray.training.own_data import OwnData, own_data


def test_images_are_read_from_a_bucket(s3_run_dir: Callable[[], str]) -> None:
    uri, shades = s3_run_dir(), np.arange(0, 240, 10, dtype=np.uint8)
    filesystem, base = FileSystem.from_uri(uri)
    cells = []
    for shade in shades:
        buffer = io.BytesIO()
        Image.fromarray(np.full((8, 8, 3), shade)).save(buffer, "PNG")
        cells.append({"bytes": buffer.getvalue()})
    table = pa.table(
        {"image": pa.array(cells, pa.struct([("bytes", pa.binary())])), "label": shades % 4}
    )
    with filesystem.open_output_stream(f"{base}/train-00000-of-00001.parquet") as file:
        pq.write_table(table, file, row_group_size=6)
    half = Transform(mean=(0.5,), std=(0.5,), image_size=8, colour="grey")
    found = own_data(uri, half)
    assert isinstance(found, OwnData)
    dataset = found.dataset
    assert (len(dataset.train), len(dataset.test), dataset.num_classes) == (22, 2, 3)
    batches = [
        batch
        for part in (dataset.train, dataset.test)
        for batch, _ in open_images(part, None, dataset).batches(30)
    ]
    found_shades = sorted(((torch.cat(batches)[:, 0, 0, 0] + 1) * 127.5).round().int().tolist())
    assert found_shades == shades.tolist()
