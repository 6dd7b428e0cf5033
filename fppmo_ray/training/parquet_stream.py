"""Parquet files with encoded images, on a disk or in a bucket, read group by group when needed."""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fppmo_ray.training.dataset import IntArray
from fppmo_ray.training.parquet import image_and_label_columns

WINDOW = 4
"""Row groups whose rows are shuffled among each other; so many are held in memory."""
_AHEAD = 2  # further groups, of the batch that is decoded ahead


@dataclass(frozen=True, eq=False)
class ShardImages(Sequence[bytes]):
    """The encoded images of parquet files, as bytes; made by ``open_shards``."""

    root: str
    """URI of the folder or bucket that holds the files."""
    names: tuple[str, ...]
    """Paths of the files, as the URI's filesystem names them."""
    column: str
    """Column of the images, structs with ``bytes``."""
    groups: tuple[tuple[int, int], ...]
    """File and row group within it, of every row group."""
    first_rows: IntArray
    """Row at which every row group begins, and the number of rows, int64 ``(groups + 1,)``."""

    def __len__(self) -> int:
        return int(self.first_rows[-1])

    def __getitem__(self, row: Any) -> Any:
        group = int(self.blocks(np.array([row]))[0])
        return self._cache.read(group)[int(row) - int(self.first_rows[group])]

    def blocks(self, rows: IntArray) -> IntArray:
        """Return the row group of every row.

        Args:
            rows: Row numbers, in [0, len).
        """
        return np.searchsorted(self.first_rows, rows, side="right") - 1

    @cached_property
    def _cache(self) -> _GroupCache:
        return _GroupCache(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_cache"}


class _GroupCache:
    """The row groups that were read last; decoding threads share it.

    Args:
        images: The files.
    """

    def __init__(self, images: ShardImages) -> None:
        self._images = images
        self._groups: OrderedDict[int, list[bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, group: int) -> list[bytes]:
        """Return the encoded images of a row group.

        Args:
            group: Number of the group over all files.

        Raises:
            ValueError: the file cannot be read, or an image is missing.
        """
        with self._lock:
            if group not in self._groups:
                self._groups[group] = self._load(group)
                while len(self._groups) > WINDOW + _AHEAD:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(group)
            return self._groups[group]

    def _load(self, group: int) -> list[bytes]:
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile

        images = self._images
        shard, index = images.groups[group]
        filesystem, _ = _filesystem(images.root)
        try:
            with ParquetFile(filesystem.open_input_file(images.names[shard])) as file:
                table = file.read_row_group(index, columns=[images.column])
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{images.names[shard]} cannot be read any more ({error}); fetch it again"
            ) from error
        encoded = [cell and cell["bytes"] for cell in table[images.column].to_pylist()]
        if None in encoded:
            raise ValueError(
                f"the image in row {encoded.index(None)} of row group {index} of "
                f"{images.names[shard]} is missing"
            )
        return encoded


def open_shards(root: str, part: str) -> tuple[ShardImages, IntArray, tuple[str, ...] | None]:
    """Return the images, labels and class names of the files ``{part}-*.parquet`` below a URI.

    Only labels and the files' footers are read.

    Args:
        root: A folder, or a URI such as ``s3://bucket/path`` or ``gs://bucket/path``.
        part: Name of the part: ``train``, ``validation`` or ``test``.

    Raises:
        ValueError: there are no such files or not all of them, one is broken or lacks a column.
    """
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    filesystem, _ = _filesystem(root)
    names = find_parts(root).get(part, ())
    counts = {int(match[1]) for name in names if (match := re.search(r"-of-(\d+)", name))}
    if not names or (counts and counts != {len(names)}):
        expected = " and ".join(map(str, sorted(counts))) or "at least one"
        raise ValueError(
            f"expected {expected} of the files {part}-*.parquet in {shown(root)}, found "
            f"{len(names)}; fetch the missing ones"
        )
    groups: list[tuple[int, int]] = []
    lengths: list[int] = []
    labels: list[Any] = []
    column, class_names = "", None
    for shard, name in enumerate(names):
        try:
            with ParquetFile(filesystem.open_input_file(name)) as file:
                column, label_column = image_and_label_columns(file.schema_arrow, Path(name))
                class_names = class_names or _class_names(file.schema_arrow, label_column)
                for index in range(file.num_row_groups):
                    groups.append((shard, index))
                    lengths.append(file.metadata.row_group(index).num_rows)
                labels.append(file.read(columns=[label_column])[label_column].to_numpy())
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{name} is corrupt, truncated or no parquet file ({error}); fetch it again"
            ) from error
    joined = np.concatenate(labels)
    if joined.dtype.kind not in "iu":
        raise ValueError(f"{part}-*.parquet in {shown(root)} have rows without labels; remove them")
    first_rows = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    images = ShardImages(root, tuple(names), column, tuple(groups), first_rows)
    return images, joined.astype(np.int64), class_names


def find_parts(root: str) -> dict[str, tuple[str, ...]]:
    """Return the parquet files below a URI by their part, the word before the first hyphen.

    Args:
        root: A folder or a URI.

    Raises:
        ValueError: there is no such folder, or it cannot be reached.
    """
    from pyarrow.fs import FileSelector

    filesystem, base = _filesystem(root)
    try:
        entries = filesystem.get_file_info(FileSelector(base, recursive=True))
    except OSError as error:
        raise ValueError(f"{shown(root)} cannot be read: {error}") from error
    found: dict[str, list[str]] = {}
    for entry in sorted(entries, key=lambda entry: entry.path):
        if entry.is_file and entry.path.endswith(".parquet"):
            found.setdefault(re.split(r"[-.]", entry.base_name)[0], []).append(entry.path)
    return {part: tuple(names) for part, names in found.items()}


def shown(root: str) -> str:
    """Return a URI for messages, without credentials and options."""
    return re.sub(r"//[^/@]*@", "//", root.split("?")[0])


def _filesystem(root: str) -> tuple[Any, str]:
    """Return the filesystem of a URI or a folder, and the path in it."""
    import pyarrow as pa
    from pyarrow.fs import FileSystem

    uri = root if "://" in root else Path(root).absolute().as_uri()
    try:
        filesystem, path = FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).replace(root, shown(root))  # from None: the cause shows the root
        raise ValueError(f"{shown(root)} cannot be opened: {reason}") from None
    return filesystem, path


def _class_names(schema: Any, label: str) -> tuple[str, ...] | None:
    """Return the class names that the Hugging Face hub writes into a file's schema."""
    try:
        info = json.loads((schema.metadata or {})[b"huggingface"])
        names = info["info"]["features"][label]["names"]
    except (KeyError, ValueError, TypeError):
        return None
    return tuple(map(str, names))
