"""A run directory on an object store, through pyarrow: S3 and what speaks like it, GCS, Azure.

Stores like these have no rename and no append; what makes them fit is that an object appears whole
when its stream is closed, and that reads and listings see every write that has returned.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

logger = logging.getLogger(__name__)

_WAITS = 1.0, 2.0, 4.0, 8.0, 16.0, 32.0  # s; beside the retries of the store's own client
_DEFAULTS = {
    "s3": {"allow_delayed_open": "true"},  # one request for a small object instead of three
    "gs": {"retry_limit_seconds": "30"},  # instead of a quarter of an hour
}
_READERS = 16  # requests at a time
_BUCKETS = "s3", "gcs", "abfs"  # the first part of a path is a bucket that must exist
_Answer = TypeVar("_Answer")


def open_object_store(uri: str, location: str) -> ObjectStore:
    """See ``open_storage``. The location is the URI as it may be logged."""
    from pyarrow.fs import FileSystem

    whole_uri = _with_defaults(uri)
    try:
        filesystem, path = FileSystem.from_uri(whole_uri)
        _require_bucket(filesystem, path)
    # pyarrow says unknown schemes and options by ValueError, the network's errors by OSError, what
    # it was built without by NotImplementedError, and some of Azure's by its own base class.
    except (ValueError, OSError, NotImplementedError, _arrow_error()) as error:
        reason = str(error).replace(whole_uri, location)
        raise ValueError(
            f"run directory {location} cannot be used: {reason}; expected a path or a URI of an "
            "existing bucket (s3://BUCKET/PATH, gs://..., abfs://...) that this machine's "
            "credentials open"
        ) from error
    return ObjectStore(filesystem, path.rstrip("/"), location)


@dataclass(frozen=True)
class ObjectStore:
    """The objects below a path of a ``pyarrow.fs.FileSystem``."""

    filesystem: Any
    path: str
    location: str
    local: Path | None = None

    def read(self, name: str) -> bytes:
        """See ``Storage.read``."""

        def fetch() -> bytes:
            with self.filesystem.open_input_stream(self._at(name)) as stream:
                content: bytes = stream.read()
            return content

        return _patiently(fetch, f"reading {name}")

    def read_all(self, names: Sequence[str]) -> list[bytes]:
        """See ``Storage.read_all``."""
        with ThreadPoolExecutor(_READERS) as readers:
            return list(readers.map(self.read, names))

    def write(self, name: str, content: bytes) -> None:
        """See ``Storage.write``."""

        def put() -> None:
            # No "with": leaving it by an error would close the stream, which completes an object.
            stream = self.filesystem.open_output_stream(self._at(name))
            stream.write(content)
            stream.close()

        _patiently(lambda: _uninterrupted(put), f"writing {name}")

    def exists(self, name: str) -> bool:
        """See ``Storage.exists``."""
        place = self._at(name)
        is_file: bool = _patiently(
            lambda: self.filesystem.get_file_info(place).is_file, f"looking for {name}"
        )
        return is_file

    def delete(self, name: str) -> None:
        """See ``Storage.delete``."""
        with suppress(FileNotFoundError):
            _patiently(lambda: self.filesystem.delete_file(self._at(name)), f"deleting {name}")

    def names(self, folder: str) -> list[str]:
        """See ``Storage.names``."""
        from pyarrow.fs import FileSelector

        selector = FileSelector(self._at(folder), allow_not_found=True)
        found = _patiently(
            lambda: self.filesystem.get_file_info(selector), f"listing {folder or 'it'}"
        )
        return sorted(info.base_name for info in found if info.is_file)

    def _at(self, name: str) -> str:
        return f"{self.path}/{name}" if name else self.path


def _uninterrupted(action: Callable[[], None]) -> None:
    """Do it to its end, whatever is raised here meanwhile.

    Ctrl-C between opening and closing a stream would leave it to its destructor, which completes an
    object of what there is. Signals raise in the main thread alone, and leaving the pool waits.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        thread.submit(action).result()


def _patiently(request: Callable[[], _Answer], doing: str) -> _Answer:
    """Ask again for a minute: a night's search outlives a short outage. Requests are idempotent."""
    for wait in _WAITS:
        try:
            return request()
        except FileNotFoundError:
            raise
        except OSError as error:
            logger.warning("%s failed and is tried again in %g s: %s", doing, wait, error)
            time.sleep(wait)
    try:
        return request()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise OSError(
            f"{doing} has failed for over a minute: {error}; what was recorded before is safe: "
            "once the store answers, go on with --resume"
        ) from error


def _require_bucket(filesystem: Any, path: str) -> None:
    """Also asks the store something, so that what cannot be reached is known at once."""
    if filesystem.type_name not in _BUCKETS:
        filesystem.get_file_info(path)
        return
    bucket = path.partition("/")[0]
    if not bucket:
        raise ValueError("it names no bucket")
    if filesystem.get_file_info(bucket).type.name == "NotFound":
        raise ValueError(f"bucket {bucket} does not exist")


def _with_defaults(uri: str) -> str:
    """The URI with options that suit us, where it does not set them itself."""
    parts = urlsplit(uri)
    options = _DEFAULTS.get(parts.scheme, {}) | dict(parse_qsl(parts.query, keep_blank_values=True))
    return urlunsplit(parts._replace(query=urlencode(options)))


def _arrow_error() -> type[Exception]:
    from pyarrow import ArrowException

    error: type[Exception] = ArrowException
    return error
