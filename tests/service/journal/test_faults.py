"""Run directories that vanish, fill up, cannot be written, or hold what killed drivers left."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest
from example_facts import FACTS, STARTED, numbered, told

from fppmo_ray import load_network
from fppmo_ray.durable_files import write_whole
from fppmo_ray.service.journal.artifacts import network_files, read_figures
from fppmo_ray.service.journal.facts import EpochFinished, Finished
from fppmo_ray.service.journal.run_directory import open_run, read_journal
from fppmo_ray.service.journal.storage import open_storage
from fppmo_ray.service.journal.writers import repair

GONE = "is not the file any more that this search writes: the run directory was deleted, moved"


def delete(folder: Path) -> None:
    shutil.rmtree(folder)


def move(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


def replace_by_a_copy(folder: Path) -> None:
    move(folder)
    shutil.copytree(folder.with_name("elsewhere"), folder)


def replace_by_nothing(folder: Path) -> None:
    delete(folder)
    folder.mkdir()


LOSSES = [delete, move, replace_by_a_copy, replace_by_nothing]


@pytest.mark.parametrize("lose", LOSSES)
def test_a_folder_that_is_lost_stops_the_search_at_its_next_fact(
    tmp_path: Path, lose: Callable[[Path], None]
) -> None:
    folder = tmp_path / "run"
    with open_run(folder, resume=False, started=STARTED) as run:
        lose(folder)
        with pytest.raises(RuntimeError, match=rf"{folder}/journal\.jsonl {GONE}"):
            run.record([numbered(1)])
        with pytest.raises(RuntimeError, match=GONE):
            run.write_artifact("checkpoints/a.pt", b"weights")
        assert told(run.facts) == told([STARTED])
    assert not (folder / "checkpoints").exists()


def test_a_bucket_that_is_emptied_stops_the_search_at_its_next_fact(
    s3_run_dir: Callable[[], str],
) -> None:
    run_dir = s3_run_dir()
    storage = open_storage(run_dir)
    with open_run(run_dir, resume=False, started=STARTED) as run:
        for name in storage.names("journal/claims"):
            storage.delete(f"journal/claims/{name}")
        with pytest.raises(RuntimeError, match=r"the journal in s3://.* was deleted under the"):
            run.record([numbered(1)])


@contextmanager
def no_file_above(num_bytes: int) -> Iterator[None]:
    """Let the system refuse to make a file longer than this, as it does when a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_a_sentence_and_tears_no_line(tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    with open_run(tmp_path, resume=False, started=STARTED) as run:
        before = journal.read_bytes()
        with (
            no_file_above(len(before) + 20),
            pytest.raises(OSError, match=rf"{journal} cannot be written: .*; what was written bef"),
        ):
            run.record([numbered(1)])
        assert journal.read_bytes() == before
        run.record([numbered(2)])
    assert told(read_journal(tmp_path)) == told([STARTED, numbered(2)])


def test_a_full_disk_leaves_the_file_that_was_to_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_whole(path, b"before")
    with (
        no_file_above(8),
        pytest.raises(OSError, match=rf"{path} cannot be written: File too large; what was"),
    ):
        write_whole(path, b"longer than eight bytes")
    assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == [(path.name, b"before")]


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "run"
    with pytest.raises(
        OSError, match=rf"{place}/journal\.jsonl cannot be written: Not a directory"
    ):
        open_run(place, resume=False).__enter__()
    with pytest.raises(OSError, match=rf"{place}/a cannot be written: Not a directory"):
        open_storage(place).write("a", b"")


def test_a_file_system_without_locks_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(OSError, match=rf"{tmp_path} cannot be locked: No locks available; choose"):
        open_run(tmp_path, resume=False).__enter__()


def epoch(task: str, number: int, sha256: str) -> EpochFinished:
    name = f"checkpoints/{task}-epoch{number}.pt"
    return EpochFinished(
        task=task, epoch=number, train_loss=0.5, seconds=1.0, artifact=name, sha256=sha256
    )


def test_resuming_removes_the_files_that_killed_drivers_left(run_dir: str) -> None:
    names = ["dense-epoch0.pt", "dense-epoch1.pt", "dense-epoch2.pt", "fppmo-epoch0.pt"]
    with open_run(run_dir, resume=False, started=STARTED) as run:
        digests = {name: run.write_artifact(f"checkpoints/{name}", name.encode()) for name in names}
        run.record([epoch("dense", number, digests[names[number]]) for number in (0, 1)])
        run.record([epoch("fppmo", 0, digests[names[3]])])
        run.write_artifact("importance.npy", b"kept")
    storage = open_storage(run_dir)
    parts = ["result.json.17.part", "checkpoints/dense-epoch3.pt.4711.part"]
    for part in parts:
        storage.write(part, b"")
    with open_run(run_dir, resume=True):
        pass
    assert storage.names("checkpoints") == ["dense-epoch1.pt", "fppmo-epoch0.pt"]
    assert storage.exists("importance.npy")
    if storage.local is not None:
        assert not any(storage.exists(part) for part in parts)


RESULTS = {
    "result.json": b'{"settings": {"macs_cut": 0.5}}',
    "network.json": b"{}",
    "network.pt": b"weights",
}


def finish(run_dir: str) -> None:
    with open_run(run_dir, resume=False, started=STARTED) as run:
        assert not run.is_finished()
        digests = {name: run.write_artifact(name, content) for name, content in RESULTS.items()}
        run.record([Finished(artifacts=digests)])


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_that_is_not_the_journals_is_not_read_and_made_again(
    run_dir: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    finish(run_dir)
    storage = open_storage(run_dir)

    def read() -> None:
        assert read_figures(run_dir) == {"settings": {"macs_cut": 0.5}}
        with network_files(run_dir) as paths:
            contents = {path.name: path.read_bytes() for path in paths}
        assert contents == {key: RESULTS[key] for key in contents}

    read()
    changed, gone = "is not the file that the journal names", "does not exist"
    for content, reason in ((RESULTS[name][:-1] + b"!", changed), (b"", changed), (None, gone)):
        if content is None:
            storage.delete(name)
        else:
            storage.write(name, content)
        if (content, name) != (None, "result.json"):
            with pytest.raises(ValueError, match=rf"{name}.*{reason}.*; --resume writes it again"):
                read()
        caplog.clear()
        with open_run(run_dir, resume=True) as run:
            assert not run.is_finished()
        assert [f"{name} " in text and reason in text for text in caplog.messages] == [True]
    storage.write(name, RESULTS[name])
    read()
    with open_run(run_dir, resume=True) as run:
        assert run.is_finished()


@pytest.mark.parametrize("content", [b"", b"[", b"[]", b"\xff", 99_999 * b"["])
def test_a_result_that_no_journal_names_has_to_be_an_object(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"result\.json is damaged: expected a JSON object"):
        read_figures(tmp_path)


def test_repair_of_an_object_store_keeps_the_damaged_lease(s3_run_dir: Callable[[], str]) -> None:
    run_dir = s3_run_dir()
    with open_run(run_dir, resume=False) as run:
        for fact in FACTS:
            run.record([fact])
    storage = open_storage(run_dir)
    [lease] = storage.names("journal/claims")
    segment = f"journal/{lease}/000003.jsonl"
    storage.write(segment, storage.read(segment).replace(b"0.333", b"0.334"))
    with pytest.raises(ValueError, match="/journal, line 3 is damaged: its checksum does not fit"):
        open_run(run_dir, resume=True).__enter__()
    [sentence] = repair(run_dir)
    assert "now ends after line 2" in sentence
    assert storage.exists(segment)
    with open_run(run_dir, resume=True) as run:
        assert told(run.facts) == told(FACTS[:2])
        run.record(FACTS[2:])
    assert told(read_journal(run_dir)) == told(FACTS)
    assert repair(run_dir) == [f"{storage.location}/journal is undamaged, all 4 lines"]


def test_repair_mends_the_journals_of_stages_too(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "stage-1", tmp_path / "stage-2"):
        with open_run(place, resume=False) as run:
            run.record(FACTS)
    journal = tmp_path / "stage-2" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b'"macs":50', b'"macs":49'))
    whole, first, second = repair(tmp_path)
    assert "undamaged" in whole
    assert "stage-1/journal.jsonl is undamaged" in first
    assert "stage-2/journal.jsonl now ends after line 1" in second


def test_a_folder_without_a_journal_is_not_repaired(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path} holds no journal; expected a search's run"):
        repair(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_directory_that_is_no_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "dangling"):
        with pytest.raises(ValueError, match=rf"{tmp_path / name} must be a folder, or not exist"):
            open_run(tmp_path / name, resume="auto").__enter__()


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("name", ["lock", "journal.jsonl"])
@pytest.mark.parametrize("make", [make_pipe, make_device, Path.mkdir])
def test_what_stands_where_a_file_should_be_is_refused_at_once(
    tmp_path: Path, name: str, make: Callable[[Path], None]
) -> None:
    make(tmp_path / name)
    with pytest.raises(ValueError, match=rf"/{name} must be a file, got a (folder|pipe or a dev)"):
        open_run(tmp_path, resume=False, started=STARTED).__enter__()
    with pytest.raises(ValueError, match=r"must be a file, got|holds no journal"):
        read_journal(tmp_path)


@pytest.mark.parametrize("make", [make_pipe, make_device, Path.mkdir])
def test_what_stands_where_a_result_should_be_is_not_waited_for(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    with open_run(tmp_path, resume=False, started=STARTED) as run:
        sha256 = run.write_artifact("network.json", b"{}")
        run.record([Finished(artifacts={"network.json": sha256})])
    (tmp_path / "network.json").unlink()
    make(tmp_path / "network.json")
    (tmp_path / "odd.part").mkdir()
    with open_run(tmp_path, resume=True, started=STARTED) as run:
        assert not run.is_finished()  # so that the results are made again
        with pytest.raises(ValueError, match=r"network\.json must be a file, got a"):
            run.read_artifact("network.json", sha256)
    with pytest.raises(ValueError, match=r"network\.json"):
        load_network(tmp_path / "network.json")


def test_two_names_of_one_folder_have_one_writer(tmp_path: Path) -> None:
    (tmp_path / "other").symlink_to(tmp_path / "run")
    with (
        open_run(tmp_path / "run", resume=False, started=STARTED),
        pytest.raises(ValueError, match="is being written by another driver"),
    ):
        open_run(tmp_path / "other", resume=True).__enter__()


@pytest.mark.parametrize(
    "name", ["a#b", "a%20b", "a b", "ü漢", "a?b", "-x", "a\nb", "[red]", "$HOME"]
)
def test_a_run_directory_may_have_any_name(tmp_path: Path, name: str) -> None:
    for run_dir in (tmp_path / name, str(tmp_path / name)):
        with open_run(run_dir, resume="auto", started=STARTED):
            assert (tmp_path / name / "journal.jsonl").is_file()
    assert told(read_journal(f"file://{quote(str(tmp_path / name))}")) == told([STARTED])


def test_zeros_that_a_power_cut_left_at_the_end_are_written_over(tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    with open_run(tmp_path, resume=False, started=STARTED):
        pass
    journal.write_bytes(journal.read_bytes() + bytes(4096))
    with open_run(tmp_path, resume=True) as run:
        run.record([numbered(1)])
    assert told(read_journal(tmp_path)) == told([STARTED, numbered(1)])
