"""Where a run directory lies: a folder of this machine, or a URI of any pyarrow filesystem."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import parse_qs, unquote, urlsplit

from fppmo_ray.durable_files import write_whole

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_SECRET = re.compile(r"key|secret|token|password|sig", re.IGNORECASE)
_BROKEN_URI = re.compile(r"(s3|gs|gcs|abfs|abfss|hdfs|file):/?(?!/)")


class Storage(Protocol):
    """Named contents. Names are relative paths with ``/``; folders exist by what is in them."""

    @property
    def location(self) -> str:
        """For messages: without credentials."""

    @property
    def local(self) -> Path | None:
        """The folder, if it is one of this machine."""

    def read(self, name: str) -> bytes:
        """A content.

        Raises:
            FileNotFoundError: there is none of this name.
        """

    def read_all(self, names: Sequence[str]) -> list[bytes]:
        """Several contents, in the order of their names.

        Raises:
            FileNotFoundError: there is none of one of the names.
        """

    def write(self, name: str, content: bytes) -> None:
        """Make or replace a content, whole or not at all; durable when this returns."""

    def exists(self, name: str) -> bool:
        """Whether there is a content of this name."""

    def delete(self, name: str) -> None:
        """Remove a content, if it is there."""

    def names(self, folder: str) -> list[str]:
        """The contents directly in a folder, by their names within it; none if it is absent."""


def open_storage(run_dir: str | Path) -> Storage:
    """Where the contents of a run directory are kept. Makes nothing.

    Args:
        run_dir: A path or ``file://`` URI, or a URI that ``pyarrow.fs.FileSystem.from_uri`` takes:
            ``s3://bucket/runs/mine``, ``gs://...``, ``s3://...?endpoint_override=http://host:9000``.

    Raises:
        ValueError: the URI's scheme is unknown, its bucket is missing, or its store cannot be
            reached or refuses the credentials.
    """
    folder = local_folder(run_dir)
    if folder is not None:
        return LocalStorage(folder)
    from fppmo_ray.service.record.object_store import open_object_store

    return open_object_store(str(run_dir), location_of(run_dir))


def location_of(run_dir: str | Path) -> str:
    """A run directory as it may be logged: of a URI neither user, password, nor options."""
    text = str(run_dir)
    if local_folder(run_dir) is not None:
        return text
    parts = urlsplit(text)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")


def shows_credentials(run_dir: str | Path) -> bool:
    """Whether a URI holds a user, password or key, which who reads it could use."""
    if local_folder(run_dir) is not None:
        return False
    parts = urlsplit(str(run_dir))
    options = parse_qs(parts.query, keep_blank_values=True)
    return "@" in parts.netloc or any(_SECRET.search(name) for name in options)


def local_folder(run_dir: str | Path) -> Path | None:
    """The folder that a run directory is on this machine, or None for a URI of another store.

    Raises:
        ValueError: a URI lacks a slash, as it does after a detour through ``pathlib.Path``.
    """
    text = str(run_dir)
    if _URI.match(text):
        parts = urlsplit(text)
        return Path(unquote(parts.path)) if parts.scheme == "file" else None
    if _BROKEN_URI.match(text):
        raise ValueError(
            f"run directory {text} looks like a URI without its two slashes; "
            "give SCHEME://BUCKET/PATH as a string, or ./ before a folder of that name"
        )
    return Path(run_dir)


@dataclass(frozen=True)
class LocalStorage:
    """A folder."""

    local: Path

    @property
    def location(self) -> str:
        """The folder's path."""
        return str(self.local)

    def read(self, name: str) -> bytes:
        """See ``Storage.read``."""
        return (self.local / name).read_bytes()

    def read_all(self, names: Sequence[str]) -> list[bytes]:
        """See ``Storage.read_all``."""
        return [self.read(name) for name in names]

    def write(self, name: str, content: bytes) -> None:
        """See ``Storage.write``."""
        target = self.local / name
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, content)

    def exists(self, name: str) -> bool:
        """See ``Storage.exists``."""
        return (self.local / name).is_file()

    def delete(self, name: str) -> None:
        """See ``Storage.delete``."""
        (self.local / name).unlink(missing_ok=True)

    def names(self, folder: str) -> list[str]:
        """See ``Storage.names``."""
        place = self.local / folder
        if not place.is_dir():
            return []
        return sorted(
            path.name for path in place.iterdir() if path.is_file() and path.suffix != ".part"
        )
