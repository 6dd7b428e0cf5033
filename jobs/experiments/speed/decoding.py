"""How fast ImageNet's files become batches: read, decoded, cut and resized, on one core."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from rich.table import Table

from fppmo_ray.training import Images, load_imagenet, open_images

_SIZE = 500, 375  # that of most of ImageNet's files
_QUALITY = 91  # makes these noisy ones of about 100 kB: ImageNet's have 110 on average
_NUM_IMAGES = 64
_BATCH = 16


def decoding_table(repeats: int) -> Table:
    """Images per second of a core's time, for evaluation and for training.

    Time is that of this process's CPU, so that others on the machine do not count.

    Args:
        repeats: Medians are of so many turns.
    """
    table = Table("what is made of a file", "ms of a core", "images per second and core")
    with tempfile.TemporaryDirectory() as folder:
        size = _write(Path(folder))
        dataset = load_imagenet(Path(folder))
        images = open_images(dataset.train, None, dataset, decoding_threads=1)
        for what, seconds in (
            ("shorter side to 256, middle 224", _seconds(images, repeats, training=False)),
            ("random part to 224, mirrored or not", _seconds(images, repeats, training=True)),
        ):
            table.add_row(what, f"{1e3 * seconds:.1f}", f"{1 / seconds:.0f}")
    table.title = f"JPEG files of {_SIZE[0]} x {_SIZE[1]} pixels, {size / 1e3:.0f} kB on average"
    return table


def _write(folder: Path) -> float:
    """A folder of one class; the mean size of its files in bytes."""
    rng = np.random.default_rng(0)
    width, height = _SIZE
    for part, count in (("train", _NUM_IMAGES), ("val", 1)):
        (folder / part / "only").mkdir(parents=True)
        for row in range(count):
            smooth = rng.integers(0, 256, (height // 25, width // 25, 3), dtype=np.uint8)
            image = np.asarray(Image.fromarray(smooth).resize(_SIZE), dtype=np.float64)
            noisy = np.clip(image + 18 * rng.standard_normal(image.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / part / "only" / f"{row}.JPEG", quality=_QUALITY)
    sizes = [path.stat().st_size for path in (folder / "train").rglob("*.JPEG")]
    return statistics.fmean(sizes)


def _seconds(images: Images, repeats: int, *, training: bool) -> float:
    """Of CPU time for each image; the first turn warms up."""
    turns = []
    for turn in range(repeats + 1):
        batches: Iterable[object] = (
            images.training_batches(_BATCH, seed=0, epoch=turn)
            if training
            else images.batches(_BATCH)
        )
        begin = time.process_time()
        for _ in batches:
            pass
        turns.append((time.process_time() - begin) / len(images))
    return statistics.median(turns[1:])
