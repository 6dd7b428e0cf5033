from __future__ import annotations

import io
import logging
import os
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from example_facts import STARTED, told
from pyarrow import ArrowException

from fppmo_ray.service.journal import storage as storage_module
from fppmo_ray.service.journal.run_directory import open_run, read_journal
from fppmo_ray.service.journal.storage import (
    LocalStorage,
    ObjectStore,
    local_folder,
    location_of,
    open_storage,
    require_no_credentials,
)

LARGE = os.urandom(12 * 2**20)  # more than one part of an upload


@pytest.mark.parametrize("content", [b"", b"short", LARGE], ids=["empty", "short", "large"])
def test_contents_come_back(run_dir: str, content: bytes) -> None:
    storage = open_storage(run_dir)
    storage.write("folder/name", b"before")
    storage.write("folder/name", content)
    assert open_storage(run_dir).read("folder/name") == content


def test_folders_list_what_is_directly_in_them(run_dir: str) -> None:
    storage = open_storage(run_dir)
    for name in ("b", "a", "folder/c", "folder/deeper/d"):
        storage.write(name, b"")
    assert storage.names("") == ["a", "b"]
    assert storage.names("folder") == ["c"]
    assert storage.names("none") == []


def test_what_is_not_there_is_told_apart(run_dir: str) -> None:
    storage = open_storage(run_dir)
    storage.write("folder/name", b"")
    assert storage.exists("folder/name")
    assert not storage.exists("folder")
    assert not storage.exists("other")
    with pytest.raises(FileNotFoundError):
        storage.read("other")
    storage.delete("folder/name")
    storage.delete("folder/name")
    assert not storage.exists("folder/name")


def test_a_path_and_its_file_uri_are_the_same_folder(tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    assert open_storage(folder) == open_storage(str(folder)) == LocalStorage(folder)
    assert open_storage(folder.as_uri()) == LocalStorage(folder)
    assert local_folder("runs/mine") == Path("runs/mine")
    assert local_folder("s3://bucket/run") is None
    assert local_folder("~/runs/mine") == Path.home() / "runs/mine"
    assert local_folder("file://localhost/a%23b") == Path("/a#b")


def test_a_half_written_file_is_no_content(tmp_path: Path) -> None:
    (tmp_path / "result.json.17.part").write_bytes(b"{")
    assert open_storage(tmp_path).names("") == []


@pytest.mark.parametrize("broken", ["s3:/bucket/run", "s3:bucket", "gs:/bucket/run"])
def test_a_uri_that_lost_a_slash_is_not_taken_for_a_folder(broken: str) -> None:
    with pytest.raises(ValueError, match="looks like a URI without its two slashes"):
        open_storage(broken)


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("ftp2://host/run", "Unrecognized filesystem type"),
        ("s3:///run", "bucket name"),
        ("gs://", "it names no bucket"),
        ("s3://runs/run?colour=red", "Unexpected query parameter in S3 URI: 'colour'"),
        ("s3://runs/my run", "Cannot parse URI"),
    ],
)
def test_a_uri_of_no_store_is_refused_in_a_sentence(uri: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"run directory .* cannot be used: .*{reason}.*expected"):
        open_storage(uri)


def test_a_missing_bucket_is_refused_in_a_sentence(s3_endpoint: str) -> None:
    with pytest.raises(ValueError, match="s3://nobody/run cannot be used: bucket nobody does not"):
        read_journal(f"s3://nobody/run?endpoint_override={s3_endpoint}")


@pytest.fixture
def guarded_endpoint(s3_endpoint: str) -> Iterator[str]:
    """The server, which looks at credentials from now on."""

    def let_pass(requests: str) -> None:
        control = urllib.request.Request(
            f"{s3_endpoint}/moto-api/reset-auth",
            data=requests.encode(),
            headers={"Content-Type": "text/plain"},
        )
        urllib.request.urlopen(control).close()

    let_pass("0")
    yield s3_endpoint
    let_pass("inf")


def test_credentials_that_the_store_refuses_are_said_to_be_so(
    guarded_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wr0ng")
    with pytest.raises(
        ValueError, match=r"s3://runs/run cannot be used: .*ACCESS_DENIED"
    ) as refusal:
        open_storage(f"s3://runs/run?endpoint_override={guarded_endpoint}")
    assert "wr0ng" not in str(refusal.value)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIA:hunter2@bucket/run",
        "s3://hunter2@bucket/run",
        "s3://AKIA:hunter2/more@bucket/run",
        "s3://AKIA:hunter2%2Fmore@bucket/run",
        "s3://bucket/run?secret_key=hunter2",
        "s3://bucket/run?region=x&Session_Token=hunter2",
        "s3://bucket/run?endpoint_override=http://user:hunter2@host:9000",
        "s3://bucket/run?endpoint_override=user:hunter2@host",
        "s3://bucket/run?endpoint_override=http%3A%2F%2Fuser%3Ahunter2%40host",
        "s3://bucket/run?endpoint_override=http%3A%2F%2Fhost%3Fsig%3Dhunter2",
        "s3://bucket/run#access_key=hunter2",
        "abfs://account:hunter2@account.dfs.core.windows.net/container/run",
        "abfss://:hunter2@account.dfs.core.windows.net/container/run",
        "abfs://container@account.dfs.core.windows.net/run?client_secret=hunter2",
        "abfs://container@account.dfs.core.windows.net/run?sig=hunter2",
        "hdfs://user:hunter2@host:8020/run",
        "gs://user:hunter2@bucket/run",
    ],
)
def test_credentials_are_refused_wherever_they_stand_and_not_repeated(uri: str) -> None:
    for refuse in (open_storage, require_no_credentials, read_journal):
        with pytest.raises(ValueError, match="came with credentials, which everyone") as refusal:
            refuse(uri)
        assert "hunter2" not in str(refusal.value)
        assert "more" not in str(refusal.value)


@pytest.mark.parametrize(
    "uri",
    [
        "abfs://container@account.dfs.core.windows.net/run",
        "abfss://container@account.dfs.core.windows.net/run?credential_kind=cli&tenant_id=a",
        "gs://anonymous@bucket/run",
        "gs://bucket/run@2026",
        "hdfs://user@host:8020/run?replication=2&kerb_ticket=/tmp/ticket",
        "s3://bucket/run?region=eu-west-1&scheme=http&endpoint_override=[::1]:9000",
        "s3://bucket/key=value/token",
        "file:///run@home",
        "--no-uri key=hunter2",
    ],
)
def test_standard_uris_without_credentials_are_accepted(uri: str) -> None:
    require_no_credentials(uri)


class AzureWithoutCredentials:
    """A file system of pyarrow's shape that ends the process if it is asked for a container."""

    type_name = "abfs"

    def get_file_info(self, path: str) -> None:
        assert "/" in path, "the process has ended"
        raise ArrowException("Failed to get token from DefaultAzureCredential.")


@pytest.mark.parametrize("path", ["container/run", "container"])
def test_azure_without_credentials_is_a_sentence_and_no_abort(
    monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    stores = SimpleNamespace(from_uri=lambda uri: (AzureWithoutCredentials(), path))
    monkeypatch.setattr("pyarrow.fs.FileSystem", stores)
    with pytest.raises(ValueError, match=r"abfs://.* cannot be used: Failed to get token from"):
        open_storage("abfs://container@account.dfs.core.windows.net/run")


def test_messages_hide_credentials_and_options() -> None:
    assert location_of("s3://user:pass@bucket/run/?region=x") == "s3://bucket/run"
    assert location_of("gs://bucket/run") == "gs://bucket/run"
    assert location_of("hdfs://me:pass@host:80/run#key") == "hdfs://me@host:80/run"
    azure = "abfs://container@account.dfs.core.windows.net/run"
    assert location_of(f"{azure}?tenant_id=a") == azure
    assert location_of(Path("runs/mine")) == "runs/mine"


class Outage:
    """A file system of pyarrow's shape that fails a few times before it takes a write."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.objects: dict[str, bytes] = {}

    def open_output_stream(self, path: str) -> io.BytesIO:
        if self.failures:
            self.failures -= 1
            raise OSError("AWS Error NETWORK_CONNECTION")
        stream = io.BytesIO()
        keep, close = self.objects, stream.close

        def complete() -> None:
            keep[path] = stream.getvalue()
            close()

        stream.close = complete  # type: ignore[method-assign]
        return stream


def test_a_short_outage_is_outlived_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(storage_module, "_WAITS", (0.0, 0.0))
    outage = Outage(failures=2)
    with caplog.at_level(logging.WARNING):
        ObjectStore(outage, "bucket/run", "s3://bucket/run").write("a", b"content")
    assert outage.objects == {"bucket/run/a": b"content"}
    assert [record.getMessage() for record in caplog.records] == [
        "writing a failed and is tried again in 0 s: AWS Error NETWORK_CONNECTION"
    ] * 2


def test_a_long_outage_ends_the_search_with_the_stores_error_and_the_way_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(storage_module, "_WAITS", (0.0,))
    outage = Outage(failures=3)
    sentence = "writing a has failed .*: AWS Error NETWORK_CONNECTION; .* go on with --resume"
    with pytest.raises(OSError, match=sentence):
        ObjectStore(outage, "bucket/run", "s3://bucket/run").write("a", b"content")
    assert outage.objects == {}


def test_an_object_is_whole_or_absent_when_its_writer_is_interrupted(
    monkeypatch: pytest.MonkeyPatch, s3_run_dir: Callable[[], str]
) -> None:
    storage = open_storage(s3_run_dir())
    assert isinstance(storage, ObjectStore)
    submitted: list[Any] = []

    class Interrupted(storage_module.ThreadPoolExecutor):
        """Ctrl-C as soon as the write has begun."""

        def submit(self, *work: Any) -> Any:  # type: ignore[override]
            submitted.append(super().submit(*work))
            raise KeyboardInterrupt

    monkeypatch.setattr(storage_module, "ThreadPoolExecutor", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        storage.write("a", LARGE)
    assert submitted[0].done()
    assert storage.read("a") == LARGE


@pytest.mark.slow
def test_a_store_that_cannot_be_reached_is_said_to_be_so() -> None:
    with pytest.raises(ValueError, match=r"s3://runs/run cannot be used: .*NETWORK_CONNECTION"):
        open_storage("s3://runs/run?endpoint_override=http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("run_dir", "sentence"),
    [
        ("", "must be a folder or a URI, got an empty text"),
        (" ", "must be a folder or a URI, got an empty text"),
        ("file://runs/mine", "file://runs/mine must be file:// and an absolute path of this"),
        ("file:///runs/a#b", "with # as %23"),
        ("file:///runs/a?b", "with # as %23"),
    ],
)
def test_a_run_directory_that_would_be_another_one_is_refused(run_dir: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        open_storage(run_dir)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/runs//mine", "its path has an empty part"),
        ("/runs/../mine", r"a \. or a \.\., which stores do not resolve"),
        ("/./mine", "its path has an empty part, a"),
        ("/mine#2", "an unquoted # ends its path: write %23"),
    ],
)
def test_a_path_that_a_store_would_take_for_another_is_refused(path: str, reason: str) -> None:
    with pytest.raises(
        ValueError, match=rf"run directory s3://bucket.* cannot be used: .*{reason}"
    ):
        open_storage(f"s3://bucket{path}")


def test_slashes_at_the_end_of_a_uri_do_not_matter(s3_run_dir: Callable[[], str]) -> None:
    run_dir = s3_run_dir()
    place, _, options = run_dir.partition("?")
    with open_run(f"{place}//?{options}", resume=False, started=STARTED):
        pass
    assert told(read_journal(run_dir)) == told([STARTED])
