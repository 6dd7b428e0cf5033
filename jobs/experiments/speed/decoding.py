"""How fast ImageNet's files become batches: read, decoded, cut and resized, on one core."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.table import Table

from fppmo_ray.training import Images, RandomResizedCrop, load_imagenet, open_images
from fppmo_ray.training.decoding import random_box

_SIZE = 500, 375  # that of most of ImageNet's files
_QUALITY = 91  # makes these noisy ones of about 100 kB: ImageNet's have 110 on average
_NUM_IMAGES = 64
_BATCH = 16
_SIDE = 224  # of a network's images
_CACHED = 341, 256  # pixels of an image whose shorter side has 256


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
        given = dataset.train, None, dataset
        images = open_images(*given, decoding_threads=1)
        kept = open_images(*given, decoding_threads=1, keep=True)
        for what, seconds in (
            ("shorter side to 256, middle 224", _seconds(images, repeats, training=False)),
            ("the same, looked at again", _seconds(kept, repeats, training=False)),
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


_Open = Callable[[int], Any]
"""Reads a file."""
_Decode = Callable[[Any], Any]
"""Makes pixels of it, in C, without Python's lock."""


def decoders_table(repeats: int) -> Table:
    """What several libraries need for the random part of a file, and pixels that are decoded once.

    Libraries that are not installed are left out. The last column bounds the threads that one
    process can use: while one runs Python, the others wait.

    Args:
        repeats: Medians are of so many turns.
    """
    columns = "library", "ms of a core", "images per second and core", "of them ms in Python"
    table = Table(*columns, title=f"random parts of JPEG files of {_SIZE[0]} x {_SIZE[1]} pixels")
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder))
        paths = sorted((Path(folder) / "train").rglob("*.JPEG"))
        cache = np.memmap(Path(folder) / "cache", np.uint8, "w+", shape=(len(paths), 256, 341, 3))
        for row, path in enumerate(paths):
            cache[row] = np.asarray(Image.open(path).resize(_CACHED))
        for name, (opened, decode) in _ways(paths, cache).items():
            turns = [_turn(opened, decode, len(paths), seed) for seed in range(repeats + 1)][1:]
            whole, python = (statistics.median(part) for part in zip(*turns, strict=True))
            table.add_row(name, f"{1e3 * whole:.2f}", f"{1 / whole:.0f}", f"{1e3 * python:.2f}")
    return table


def _ways(paths: list[Path], cache: Any) -> dict[str, tuple[_Open, _Decode]]:
    """Return how the libraries that are installed open and decode a file, by their names."""
    ways: dict[str, tuple[_Open, _Decode]] = {
        "Pillow": (lambda row: Image.open(paths[row]), lambda image: image.load() and image)
    }
    with suppress(ImportError):
        simplejpeg: Any = import_module("simplejpeg")
        ways["simplejpeg"] = (lambda row: paths[row].read_bytes(), simplejpeg.decode_jpeg)
    with suppress(ImportError, RuntimeError):  # it raises where the system has no libturbojpeg
        turbojpeg: Any = import_module("turbojpeg")
        decoder, rgb = turbojpeg.TurboJPEG(), turbojpeg.TJPF_RGB
        ways["PyTurboJPEG"] = (
            lambda row: paths[row].read_bytes(),
            lambda content: decoder.decode(content, pixel_format=rgb),
        )
    with suppress(ImportError, RuntimeError):
        files: Any = import_module("torchvision.io")

        def decode(content: Any) -> Any:
            return files.decode_jpeg(content).permute(1, 2, 0).numpy()

        decode(files.read_file(str(paths[0])))  # raises where torchvision has no decoder
        ways["torchvision.io"] = (lambda row: files.read_file(str(paths[row])), decode)
    ways["pixels of 341 x 256, mapped"] = (lambda row: cache[row], lambda pixels: pixels)
    return ways


def _turn(opened: _Open, decode: _Decode, count: int, seed: int) -> tuple[float, float]:
    """Return CPU seconds of an image, and those of them outside of decoding and resizing."""
    rng, in_c, batch = random.Random(seed), 0.0, np.empty((_SIDE, _SIDE, 3), np.uint8)
    begin = time.process_time()
    for row in range(count):
        found = opened(row)
        start = time.process_time()
        found = decode(found)
        in_c += time.process_time() - start
        image = found if isinstance(found, Image.Image) else Image.fromarray(found)
        box = random_box(image.width, image.height, RandomResizedCrop(), rng)
        start = time.process_time()
        image = image.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR, box)
        in_c += time.process_time() - start
        batch[:] = np.asarray(image)
    whole = time.process_time() - begin
    return whole / count, (whole - in_c) / count
