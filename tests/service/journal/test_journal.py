"""The journal that is a file: whatever is left of it is read, and gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from example_facts import FACTS

from fppmo_ray.service.journal.run_directory import open_run, read_journal


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """The file of a run directory with four facts."""
    with open_run(tmp_path, resume=False) as run:
        run.record(FACTS)
    return tmp_path / "journal.jsonl"


def test_a_journal_cut_at_any_byte_keeps_its_complete_lines_and_goes_on(journal: Path) -> None:
    content = journal.read_bytes()
    ends = [index for index, byte in enumerate(content, start=1) if byte == ord("\n")]
    for length in range(len(content) + 1):
        journal.write_bytes(content[:length])
        complete = sum(end <= length for end in ends)
        with open_run(journal.parent, resume=True) as run:
            assert run.facts == FACTS[:complete]
            run.record([FACTS[1]])
        assert read_journal(journal.parent) == [*FACTS[:complete], FACTS[1]]


@pytest.mark.parametrize("damage", ["{", "17", "null", "[]", '{"fact": "Scored", "id": 1}'])
def test_a_damaged_line_before_the_last_is_named(journal: Path, damage: str) -> None:
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text(f"{lines[0]}{damage}\n{lines[2]}")
    with pytest.raises(ValueError, match=r"journal\.jsonl, line 2 is damaged"):
        open_run(journal.parent, resume=True).__enter__()


def test_a_fact_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text(json.dumps({"fact": "Guessed"}) + "\n")
    with pytest.raises(ValueError, match=r"line 1 is damaged.*got 'Guessed'"):
        read_journal(tmp_path)


def test_a_second_driver_is_refused_while_the_first_writes(tmp_path: Path) -> None:
    with (
        open_run(tmp_path, resume=False),
        pytest.raises(ValueError, match="is being written by another driver"),
    ):
        open_run(tmp_path, resume=False).__enter__()


def test_the_lock_ends_with_its_driver(journal: Path) -> None:
    with pytest.raises(KeyError), open_run(journal.parent, resume=True):
        raise KeyError
    with open_run(journal.parent, resume=True) as run:
        assert run.facts == FACTS
