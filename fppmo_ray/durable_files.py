"""Write files atomically and durably: complete at every moment, also after a power loss."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file in one step; return once its content and its name are on the disk.

    Args:
        path: The file, in a folder that exists.
        content: The new content.

    Raises:
        OSError: it cannot be written: the disk is full, or the folder is gone or read-only.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    with explain_write_errors(path):
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError:
            with suppress(OSError):
                partial.unlink()
            raise
        sync_folder(path.parent)


def require_file(path: Path) -> None:
    """Refuse a folder, pipe or device where a file is expected: pipes would be waited at for ever.

    Args:
        path: The file; it may be absent.

    Raises:
        ValueError: something else stands there.
    """
    if os.path.exists(path) and not path.is_file():
        raise ValueError(
            f"{path} must be a file, got {'a folder' if path.is_dir() else 'a pipe or a device'}; "
            "remove it, or give another folder"
        )


def sync_folder(folder: Path) -> None:
    """Wait until the names of a folder's files are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Raise errors of the file system as sentences with the file's path.

    Args:
        path: The file that is written inside.
    """
    try:
        yield
    except OSError as error:
        raise type(error)(
            f"{path} cannot be written: {error.strerror or error}; what was written before is "
            "safe; make room, or make the folder writable, and go on from there"
        ) from error
