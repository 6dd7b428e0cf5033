"""The journal that is a file: whatever is left of it is read, and gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from example_facts import FACTS, told

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
            next_fact = FACTS[complete % len(FACTS)]
            assert told(run.facts) == told(FACTS[:complete])
            run.record([next_fact])
        assert told(read_journal(journal.parent)) == told([*FACTS[:complete], next_fact])


@pytest.mark.parametrize(
    "damage", ["{", "17", "null", "[]", '{"fact": "Proposal", "proposal_id": 1}']
)
def test_a_damaged_line_before_the_last_is_named(journal: Path, damage: str) -> None:
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text(f"{lines[0]}{damage}\n{lines[2]}")
    with pytest.raises(ValueError, match=r"journal\.jsonl, line 2 is damaged"):
        open_run(journal.parent, resume=True).__enter__()


def test_a_fact_of_an_unknown_kind_is_refused(journal: Path) -> None:
    with journal.open("a") as file:
        file.write(json.dumps({"fact": "Guessed"}) + "\n")
    with pytest.raises(ValueError, match=r"line 5 is damaged.*got 'Guessed'"):
        read_journal(journal.parent)


def test_the_first_line_names_format_filters_and_parameters(journal: Path) -> None:
    started = json.loads(journal.read_text().splitlines()[0])
    assert (started["fact"], started["format"]) == ("Started", 2)
    assert (started["num_filters"], started["dense_parameters"]) == (9, 0)


@pytest.mark.parametrize("number", [1, 3, None])
def test_a_journal_of_another_format_is_refused(journal: Path, number: int | None) -> None:
    lines = journal.read_text().splitlines(keepends=True)
    started = json.loads(lines[0])
    del started["format"]
    other = started if number is None else started | {"format": number}
    journal.write_text("".join([json.dumps(other) + "\n", *lines[1:]]))
    sentence = rf"line 1 .*expected a journal of format 2, got {number}; read it with the version"
    with pytest.raises(ValueError, match=sentence):
        read_journal(journal.parent)
    with pytest.raises(ValueError, match=sentence):
        open_run(journal.parent, resume=True).__enter__()
    assert json.loads(journal.read_text().splitlines()[0]) == other


def test_a_torn_last_line_is_overwritten_by_the_next_fact(journal: Path) -> None:
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-5])
    assert told(read_journal(journal.parent)) == told(FACTS[:3])
    with open_run(journal.parent, resume=True) as run:
        run.record(FACTS[3:])
    assert journal.read_bytes() == whole


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
        assert told(run.facts) == told(FACTS)
