from __future__ import annotations

import json
from pathlib import Path

import pytest

from fppmo_ray.service.record.facts import Asked, Fact, Failed, Scored, Started
from fppmo_ray.service.record.run_directory import open_run, read_journal

STARTED = Started(
    search_id="abc",
    identity={"settings": {"macs_cut": 0.5}, "network": "1f"},
    versions={},
    groups=["conv1"],
    dense_macs=100,
)
FACTS: list[Fact] = [
    STARTED,
    Asked(id=0, generation=0, macs=50, mask="gA=="),
    Scored(
        id=0,
        round=0,
        rung=0,
        val_loss=0.1 + 0.2,
        val_accuracy=1 / 3,
        seconds=1.0,
        worker="0@h:1",
        at=9.5,
    ),
    Failed(id=1, error="RuntimeError('ü')"),
]


def write(path: Path, facts: list[Fact]) -> None:
    with open_run(path, resume=False) as run:
        run.record(facts)


def test_facts_are_read_back_to_the_last_bit(tmp_path: Path) -> None:
    write(tmp_path, FACTS)
    assert read_journal(tmp_path) == FACTS


def test_a_journal_cut_at_any_byte_keeps_its_complete_lines_and_goes_on(tmp_path: Path) -> None:
    write(tmp_path, FACTS)
    journal = tmp_path / "journal.jsonl"
    content = journal.read_bytes()
    ends = [index for index, byte in enumerate(content, start=1) if byte == ord("\n")]
    for length in range(len(content) + 1):
        journal.write_bytes(content[:length])
        complete = sum(end <= length for end in ends)
        with open_run(tmp_path, resume=True) as run:
            assert run.facts == FACTS[:complete]
            run.record([FACTS[1]])
        assert read_journal(tmp_path) == [*FACTS[:complete], FACTS[1]]


def test_a_damaged_line_before_the_last_is_named(tmp_path: Path) -> None:
    write(tmp_path, FACTS)
    journal = tmp_path / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text(lines[0] + "{\n" + lines[2])
    with pytest.raises(ValueError, match=r"journal\.jsonl, line 2 is damaged"):
        open_run(tmp_path, resume=True).__enter__()


def test_a_fact_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text(json.dumps({"fact": "Guessed"}) + "\n")
    with pytest.raises(ValueError, match=r"line 1 is damaged.*got 'Guessed'"):
        read_journal(tmp_path)


def test_resume_without_a_journal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--resume: .* holds no journal\.jsonl"):
        open_run(tmp_path / "new", resume=True).__enter__()
    assert not (tmp_path / "new").exists()


def test_a_directory_that_holds_a_search_is_not_overwritten(tmp_path: Path) -> None:
    write(tmp_path, FACTS)
    with pytest.raises(ValueError, match="already holds a search; go on with it by --resume"):
        open_run(tmp_path, resume=False).__enter__()
    assert read_journal(tmp_path) == FACTS


def test_a_second_driver_is_refused_while_the_first_writes(tmp_path: Path) -> None:
    with (
        open_run(tmp_path, resume=False),
        pytest.raises(ValueError, match="is being written by another driver"),
    ):
        open_run(tmp_path, resume=False).__enter__()


def test_another_search_is_refused_and_what_differs_is_named(tmp_path: Path) -> None:
    write(tmp_path, FACTS)
    other = Started(
        search_id="def",
        identity={"settings": {"macs_cut": 0.7}, "network": "1f"},
        versions={},
        groups=["conv1"],
        dense_macs=100,
    )
    with (
        open_run(tmp_path, resume=True) as run,
        pytest.raises(ValueError, match=r"another search: macs_cut was 0\.5, now 0\.7; resume"),
    ):
        run.start(other)


def test_the_same_search_keeps_its_first_id(tmp_path: Path) -> None:
    write(tmp_path, FACTS)
    again = Started(
        search_id="new",
        identity=STARTED.identity,
        versions={"torch": "9"},
        groups=["conv1"],
        dense_macs=100,
    )
    with open_run(tmp_path, resume=True) as run:
        assert run.start(again).search_id == "abc"


def test_artifacts_are_checked_against_their_digest(tmp_path: Path) -> None:
    with open_run(tmp_path, resume=False) as run:
        sha256 = run.write_artifact("checkpoints/a.pt", b"weights")
        assert run.read_artifact("checkpoints/a.pt", sha256) == b"weights"
        (tmp_path / "checkpoints" / "a.pt").write_bytes(b"other")
        with pytest.raises(ValueError, match="SHA-256 differs"):
            run.read_artifact("checkpoints/a.pt", sha256)
        with pytest.raises(ValueError, match="does not exist"):
            run.read_artifact("checkpoints/b.pt", sha256)


def test_a_status_of_a_folder_without_a_journal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no journal\.jsonl"):
        read_journal(tmp_path)
