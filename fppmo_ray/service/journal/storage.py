"""The storage of a run directory: a folder of this machine, or a URI of a pyarrow filesystem.

Object stores have no rename and no append. Two properties suffice: an object appears whole when its
stream is closed, and reads and listings see every write that has returned.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

from fppmo_ray.durable_files import explain_write_errors, require_file, write_whole

logger = logging.getLogger(__name__)

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_SECRET = re.compile(r"key|secret|token|password|sig", re.IGNORECASE)
_SECRET_OPTION = re.compile(rf"({_SECRET.pattern})[\w-]*=", re.IGNORECASE)  # of an endpoint's URL
_BROKEN_URI = re.compile(r"(s3|gs|gcs|abfs|abfss|hdfs|file):/?(?!/)")
_WAITS = 1.0, 2.0, 4.0, 8.0, 16.0, 32.0  # seconds, on top of the retries of the store's own client
_DEFAULTS = {
    "s3": {"allow_delayed_open": "true"},  # one request for a small object instead of three
    "gs": {"retry_limit_seconds": "30"},  # instead of a quarter of an hour
}
_READERS = 16  # requests at the same time
_BUCKETS = "s3", "gcs", "abfs"  # the first part of a path is a bucket that must exist
_Answer = TypeVar("_Answer")


class Storage(Protocol):
    """Files by name. Names are relative paths with ``/``; a folder exists if a file is in it."""

    @property
    def location(self) -> str:
        """Path or URI for messages, without credentials."""

    @property
    def local(self) -> Path | None:
        """The folder, if it is on this machine; else None."""

    def read(self, name: str) -> bytes:
        """Return the bytes of a file.

        Raises:
            FileNotFoundError: there is no file of this name.
        """

    def read_all(self, names: Sequence[str]) -> list[bytes]:
        """Return the bytes of several files, in the order of the names.

        Raises:
            FileNotFoundError: one of the files does not exist.
        """

    def write(self, name: str, content: bytes) -> None:
        """Write or replace a file, whole or not at all; it is durable when this returns.

        Args:
            name: Relative path.
            content: The bytes.
        """

    def exists(self, name: str) -> bool:
        """Return whether there is a file of this name."""

    def delete(self, name: str) -> None:
        """Remove a file, if it exists."""

    def names(self, folder: str) -> list[str]:
        """Return the names of the files directly in a folder; none if the folder is absent."""


def open_storage(run_dir: str | Path) -> Storage:
    """Return the storage of a run directory, without creating anything.

    Args:
        run_dir: A path or ``file://`` URI, or a URI that ``pyarrow.fs.FileSystem.from_uri`` takes:
            ``s3://bucket/runs/mine``, ``gs://...``, ``s3://...?endpoint_override=http://host:9000``.

    Raises:
        ValueError: the URI holds credentials, its scheme is unknown, its bucket is missing, or its
            store cannot be reached or refuses the credentials of the environment.
    """
    folder = local_folder(run_dir)
    if folder is not None:
        return LocalStorage(folder)
    require_no_credentials(str(run_dir))
    return _open_object_store(str(run_dir), location_of(run_dir))


def location_of(run_dir: str | Path) -> str:
    """Return a run directory for the log: a URI without password, keys and options."""
    text = str(run_dir)
    if local_folder(run_dir) is not None:
        return text
    parts = urlsplit(text)
    user, _, host = parts.netloc.rpartition("@")
    name = "" if parts.scheme == "s3" else user.partition(":")[0]  # a container, in abfs
    return f"{parts.scheme}://{name}{'@' * bool(name)}{host}{parts.path}".rstrip("/")


def stage_run_dir(run_dir: Path | str, number: int) -> Path | str:
    """Return the run directory of a stage.

    Args:
        run_dir: Run directory of the whole search, a folder or a URI.
        number: Number of the stage, counted from 1.
    """
    name = f"stage-{number}"
    if isinstance(run_dir, Path) or "://" not in run_dir:
        return Path(run_dir) / name
    place, mark, query = run_dir.partition("?")
    return f"{place.rstrip('/')}/{name}{mark}{query}"


def require_no_credentials(uri: str) -> None:
    """Refuse a URI with a password or a key, which logs, process lists and journals would show.

    The message repeats no part of it. Users alone are no credentials: a container in
    ``abfs://CONTAINER@ACCOUNT...``, ``anonymous`` in ``gs://``, a user of HDFS.

    Args:
        uri: A URI, or any other text, which is accepted.

    Raises:
        ValueError: it holds credentials.
    """
    if _URI.match(uri) and _shows_credentials(uri):
        raise ValueError(
            f"a URI {uri.partition('://')[0]}://... came with credentials, which everyone who sees "
            "the log, the processes or the cluster's jobs could read; leave them out and give the "
            "machine a role, or environment variables such as AWS_ACCESS_KEY_ID"
        )


def _shows_credentials(uri: str) -> bool:
    parts = urlsplit(uri)
    user, _, host = parts.netloc.rpartition("@")
    # A key with a slash in it ends the host early, and leaves "KEY:part of the secret" there.
    port = re.sub(r"\[.*\]", "", host).partition(":")[2]
    if ":" in user or (user and parts.scheme == "s3") or not re.fullmatch(r"\d*", port):
        return True
    options = parse_qsl(f"{parts.query}&{parts.fragment}", keep_blank_values=True)
    return any(
        _SECRET.search(name) or "@" in value or _SECRET_OPTION.search(value)
        for name, value in options
    )


def local_folder(run_dir: str | Path) -> Path | None:
    """Return a run directory as a folder of this machine, or None for a URI of another store.

    Raises:
        ValueError: it is empty; or a URI lacks a slash, as it does after a detour through
            ``pathlib.Path``, or names another machine, or holds an unquoted ``#`` or ``?``.
    """
    text = str(run_dir)
    if not text.strip():
        raise ValueError("run directory must be a folder or a URI, got an empty text")
    if _URI.match(text):
        parts = urlsplit(text)
        if parts.scheme != "file":
            return None
        if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
            raise ValueError(
                f"run directory {text} must be file:// and an absolute path of this machine, with "
                "# as %23 and ? as %3F; or give the path without file://"
            )
        return Path(unquote(parts.path))
    if _BROKEN_URI.match(text):
        raise ValueError(
            f"run directory {text} looks like a URI without its two slashes; "
            "give SCHEME://BUCKET/PATH as a string, or ./ before a folder of that name"
        )
    return Path(run_dir).expanduser()


@dataclass(frozen=True)
class LocalStorage:
    """Files of a folder on this machine."""

    local: Path
    """The folder."""

    @property
    def location(self) -> str:
        """The folder's path, for messages."""
        return str(self.local)

    def read(self, name: str) -> bytes:
        """See ``Storage.read``.

        Raises:
            ValueError: a folder, pipe or device stands there.
        """
        require_file(self.local / name)
        return (self.local / name).read_bytes()

    def read_all(self, names: Sequence[str]) -> list[bytes]:
        """See ``Storage.read_all``."""
        return [self.read(name) for name in names]

    def write(self, name: str, content: bytes) -> None:
        """See ``Storage.write``."""
        target = self.local / name
        with explain_write_errors(target):
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


def _open_object_store(uri: str, location: str) -> ObjectStore:
    """Return the store of a URI; ``location`` is the URI for messages."""
    from pyarrow.fs import FileSystem

    whole_uri = _with_defaults(uri)
    try:
        _require_plain_path(uri)
        filesystem, path = FileSystem.from_uri(whole_uri)
        _require_bucket(filesystem, path)
    # pyarrow raises ValueError for unknown schemes and options, OSError for network errors,
    # NotImplementedError for stores it was built without, and its base class for some of Azure's.
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
    """Objects below a path of a ``pyarrow.fs.FileSystem``."""

    filesystem: Any
    """The file system."""
    path: str
    """Bucket and path."""
    location: str
    """URI for messages."""
    local: Path | None = None
    """None: the store is no folder of this machine."""

    def read(self, name: str) -> bytes:
        """See ``Storage.read``."""

        def fetch() -> bytes:
            with self.filesystem.open_input_stream(self._at(name)) as stream:
                content: bytes = stream.read()
            return content

        return _with_retries(fetch, f"reading {name}")

    def read_all(self, names: Sequence[str]) -> list[bytes]:
        """See ``Storage.read_all``."""
        with ThreadPoolExecutor(_READERS) as readers:
            return list(readers.map(self.read, names))

    def write(self, name: str, content: bytes) -> None:
        """See ``Storage.write``."""

        def put() -> None:
            # No "with": an error inside it would close the stream, which completes a torn object.
            stream = self.filesystem.open_output_stream(self._at(name))
            stream.write(content)
            stream.close()

        _with_retries(lambda: _uninterrupted(put), f"writing {name}")

    def exists(self, name: str) -> bool:
        """See ``Storage.exists``."""
        place = self._at(name)
        is_file: bool = _with_retries(
            lambda: self.filesystem.get_file_info(place).is_file, f"looking for {name}"
        )
        return is_file

    def delete(self, name: str) -> None:
        """See ``Storage.delete``."""
        with suppress(FileNotFoundError):
            _with_retries(lambda: self.filesystem.delete_file(self._at(name)), f"deleting {name}")

    def names(self, folder: str) -> list[str]:
        """See ``Storage.names``."""
        from pyarrow.fs import FileSelector

        selector = FileSelector(self._at(folder), allow_not_found=True)
        found = _with_retries(
            lambda: self.filesystem.get_file_info(selector), f"listing {folder or 'it'}"
        )
        return sorted(info.base_name for info in found if info.is_file)

    def _at(self, name: str) -> str:
        return f"{self.path}/{name}" if name else self.path


def _uninterrupted(action: Callable[[], None]) -> None:
    """Run an action to its end in another thread, so that Ctrl-C cannot interrupt it.

    An interrupted write would leave its stream to the destructor, which completes a torn object.
    Signals raise in the main thread alone, and leaving the executor waits.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        thread.submit(action).result()


def _with_retries(request: Callable[[], _Answer], doing: str) -> _Answer:
    """Return the answer to an idempotent request, repeated for a minute while the store fails."""
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
            f"{doing} has failed for over a minute: {error}; what was recorded before is safe; "
            "once the store answers, go on with --resume"
        ) from error


def _require_plain_path(uri: str) -> None:
    """Refuse a path that stores do not resolve, or of which the end would be cut off."""
    parts = urlsplit(uri)
    if parts.fragment:
        raise ValueError("an unquoted # ends its path: write %23")
    if {"", ".", ".."} & set(unquote(parts.path).strip("/").split("/")) and parts.path.strip("/"):
        raise ValueError("its path has an empty part, a . or a .., which stores do not resolve")


def _require_bucket(filesystem: Any, path: str) -> None:
    """Refuse a URI without an existing bucket; the request also shows if the store answers."""
    if filesystem.type_name not in _BUCKETS:
        filesystem.get_file_info(path)
        return
    bucket = path.partition("/")[0]
    if not bucket:
        raise ValueError("it names no bucket")
    if filesystem.type_name == "abfs":
        # Without credentials this raises, while asking for the container itself ends the process.
        filesystem.get_file_info(f"{bucket}/journal")
    if filesystem.get_file_info(bucket).type.name == "NotFound":
        raise ValueError(f"bucket {bucket} does not exist")


def _with_defaults(uri: str) -> str:
    """Return the URI with our default options, unless it sets them itself."""
    parts = urlsplit(uri)
    options = _DEFAULTS.get(parts.scheme, {}) | dict(parse_qsl(parts.query, keep_blank_values=True))
    return urlunsplit(parts._replace(query=urlencode(options)))


def _arrow_error() -> type[Exception]:
    from pyarrow import ArrowException

    error: type[Exception] = ArrowException
    return error
