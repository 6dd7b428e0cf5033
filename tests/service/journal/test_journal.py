"""The journal that is a file: whatever is left of it is read, and gone on with."""

from __future__ import annotations

import gc
import json
import math
import re
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
from example_facts import FACTS, KEEP, STARTED, numbered, told

from fppmo_ray.distribution import Feedback, Proposal
from fppmo_ray.service.journal import journal as journal_module
from fppmo_ray.service.journal.fact_lines import fact_to_json
from fppmo_ray.service.journal.facts import Rescored
from fppmo_ray.service.journal.journal import last_checksum, read_lines, to_lines
from fppmo_ray.service.journal.run_directory import open_run, read_journal
from fppmo_ray.service.journal.writers import repair


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """The file of a run directory with four facts."""
    with open_run(tmp_path, resume=False) as run:
        run.record(FACTS)
    return tmp_path / "journal.jsonl"


def test_a_journal_cut_anywhere_keeps_its_complete_lines_and_goes_on(journal: Path) -> None:
    content = journal.read_bytes()
    ends = [index for index, byte in enumerate(content, start=1) if byte == ord("\n")]
    near_ends = {end + step for end in ends for step in (-2, -1, 0, 1, 2)}
    for length in sorted(
        near_ends.intersection(range(len(content))) | {*range(0, len(content), 5)}
    ):
        journal.write_bytes(content[:length])
        complete = sum(end <= length for end in ends)
        with open_run(journal.parent, resume=True) as run:
            next_fact = FACTS[complete] if complete < len(FACTS) else numbered(9)
            assert told(run.facts) == told(FACTS[:complete])
            run.record([next_fact])
        assert told(read_journal(journal.parent)) == told([*FACTS[:complete], next_fact])


CHANGES: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "changed": lambda lines: [lines[0], lines[1].replace(b'"macs":50', b'"macs":51'), *lines[2:]],
    "removed": lambda lines: [lines[0], *lines[2:]],
    "repeated": lambda lines: [lines[0], lines[0], *lines[1:]],
    "moved": lambda lines: [lines[0], lines[2], lines[1], *lines[3:]],
    "replaced": lambda lines: [lines[0], b"null\n", *lines[2:]],
    "of another journal": lambda lines: [lines[0], to_lines([numbered(1)]), *lines[2:]],
    "no text": lambda lines: [lines[0], b"\xff\x00\n", *lines[2:]],
    "empty": lambda lines: [lines[0], b"\n", *lines[1:]],
    "without checksum": lambda lines: [lines[0], lines[1].partition(b',"sum"')[0] + b"}\n"],
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_line_is_named_and_repair_keeps_the_lines_before_it(
    journal: Path, name: str
) -> None:
    lines = journal.read_bytes().splitlines(keepends=True)
    damaged = b"".join(CHANGES[name](lines))
    journal.write_bytes(damaged)
    sentence = (
        rf"journal\.jsonl, line 2 is damaged: .*; `fppmo-ray repair {journal.parent}` keeps the 1 "
        "lines before it"
    )
    with pytest.raises(ValueError, match=sentence):
        read_journal(journal.parent)
    with pytest.raises(ValueError, match=sentence):
        open_run(journal.parent, resume=True).__enter__()
    assert journal.read_bytes() == damaged
    [told_of] = repair(journal.parent)
    assert "now ends after line 1" in told_of
    assert journal.read_bytes() == lines[0]
    assert (journal.parent / "journal-damaged-1.jsonl").read_bytes() == damaged
    with open_run(journal.parent, resume=True) as run:
        run.record(FACTS[1:])
    assert journal.read_bytes() == b"".join(lines)
    assert repair(journal.parent) == [f"{journal} is undamaged, all 4 lines"]


def test_every_flipped_bit_shows(journal: Path) -> None:
    content = journal.read_bytes()
    for place in range(len(content) - 1):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        journal.write_bytes(changed)
        if content[: place + 1].endswith(b"\n") or b"\n" in changed[place : place + 1]:
            continue  # two lines in one, or one in two: below
        number = content[:place].count(b"\n") + 1
        with pytest.raises(ValueError, match=f"line {number} is damaged"):
            read_journal(journal.parent)


def test_lines_that_are_joined_or_divided_show(journal: Path) -> None:
    content = journal.read_bytes()
    for changed in (content.replace(b"\n", b" ", 1), content.replace(b"{", b"{\n", 1)):
        journal.write_bytes(changed)
        with pytest.raises(ValueError, match="line 1 is damaged: its checksum does not fit"):
            read_journal(journal.parent)


RESCORED = fact_to_json(
    Rescored(
        finalist="mode",
        keep=KEEP,
        split="choose_val",
        repeat=0,
        val_loss=1.0,
        val_accuracy=0.5,
        seconds=1.0,
    )
)
IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"fact": "Guessed"}, "expected a fact of Started, .*got 'Guessed'"),
    ({"fact": ["Started"]}, "expected a fact of Started"),
    ({"fact": "Feedback", "proposal_id": 7, "error": ""}, "proposal 7, which no line asks for"),
    ({"fact": "Feedback", "proposal_id": "0", "error": ""}, "proposal_id of fact Feedback is of"),
    ({"fact": "Feedback", "proposal_id": True, "error": ""}, "proposal_id of fact Feedback is of"),
    ({"fact": "Feedback", "proposal_id": 0, "val_loss": "1"}, "val_loss of fact Feedback is of"),
    ({"fact": "Feedback", "proposal_id": 0, "val_loss": math.nan}, "must be finite, got nan"),
    ({"fact": "Feedback", "proposal_id": 0, "val_loss": math.inf}, "must be finite, got inf"),
    ({"fact": "Updated", "generation": 1, "keep_share": [0.5, {}]}, "keep_share of fact Updated"),
    ({"fact": "Updated", "generation": 1, "keep_share": 0.5}, "keep_share of fact Updated is of"),
    ({"fact": "Chosen", "finalist": "mode", "keep": "A"}, "Invalid base64"),
    ({"fact": "Chosen", "finalist": "mode", "keep": 7}, "keep of fact Chosen is of another type"),
    ({"fact": "WeightsFrozen", "sha256": None}, "sha256 of fact WeightsFrozen is of another type"),
    ({"fact": "WeightsFrozen", "sha256": {"a": [{}] * 9}}, "sha256 of fact WeightsFrozen is of"),
    ({"fact": "Feedback", "proposal_id": 0, "error": "", "at": 1e300}, "at of fact Feedback is no"),
    (
        {"fact": "Feedback", "proposal_id": 0, "error": "", "steps": 10**400},
        "steps of .* too large",
    ),
    ({**RESCORED, "val_loss": 1e308}, r"a score of finalist mode is beyond 1e\+100 in size: 1e"),
    ({**RESCORED, "val_accuracy": math.nan}, "a score of finalist mode is not finite: nan"),
    (fact_to_json(STARTED), "expected Started in the first line alone"),
    (fact_to_json(FACTS[1]) | {"score_seed": [1]}, "score_seed of fact Proposal is of another"),
]


@pytest.mark.parametrize(("data", "reason"), IMPOSSIBLE)
def test_a_line_with_a_right_checksum_that_no_search_writes_is_refused(
    journal: Path, data: dict[str, Any], reason: str
) -> None:
    content = journal.read_bytes()
    journal.write_bytes(content + sealed(json.dumps(data), content))
    with pytest.raises(ValueError, match=rf"line 5 is damaged: .*{reason}"):
        read_journal(journal.parent)


@pytest.mark.parametrize(
    "as_text",
    [
        lambda content: content.replace(b"\n", b"\r\n"),
        lambda content: b"\xef\xbb\xbf" + content,
        lambda content: b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"),
    ],
    ids=["carriage returns", "a byte-order mark", "both"],
)
def test_a_journal_that_was_transferred_as_text_is_repaired_without_loss(
    journal: Path, as_text: Callable[[bytes], bytes]
) -> None:
    content = journal.read_bytes()
    journal.write_bytes(as_text(content))
    sentence = "line 1 is damaged: a transfer as text has added .*; `fppmo-ray repair .*` undoes"
    with pytest.raises(ValueError, match=sentence):
        read_journal(journal.parent)
    assert "is as before its transfer as text, all 4 lines" in repair(journal.parent)[0]
    assert journal.read_bytes() == content


def proposal(number: int, macs_cut: float | None = None) -> Proposal:
    return Proposal(
        proposal_id=number,
        generation=1,
        keep=KEEP,
        macs=50,
        parameters=7 + number,
        score_seed=(3, 1),
        macs_cut=macs_cut,
    )


PROPOSALS = [proposal(0), proposal(1, 0.5), proposal(2, 1e-7), *map(proposal, range(3, 7))]
ORDINARY = [
    Feedback(proposal_id=0, val_loss=0.1 + 0.2, seconds=1.5, worker="0@host:1", at=1.8e9),
    Feedback(proposal_id=1, val_loss=-2e-07, val_accuracy=0.0, seconds=1e-05, worker="", at=1.0),
    Feedback(proposal_id=2, val_loss=1e99, val_accuracy=1.0, steps=9, seconds=0.0, at=1.8e9 + 0.1),
]
UNUSUAL = [
    Feedback(proposal_id=3, error="it raised"),
    Feedback(proposal_id=4, val_loss=0.5),
    Feedback(proposal_id=5, val_loss=0.5, seconds=1.0, worker='"\\ü,"at":3', at=1.0),
    Feedback(proposal_id=6, val_loss=3, seconds=1.0, at=2.5e11),  # in the year 9,892
]


def test_a_skimmed_journal_tells_of_scores_what_orders_them() -> None:
    facts = [STARTED, *PROPOSALS, *ORDINARY, *UNUSUAL, ORDINARY[0]]
    read = read_lines(to_lines(facts), skim=True)
    assert read.damage is None
    assert read.asked == [
        *((0, 7, None), (1, 8, 0.5), (2, 9, 1e-07)),
        *((3, 10, None), (4, 11, None), (5, 12, None), (6, 13, None)),
    ]
    assert told(read.facts) == told([STARTED])
    assert read.told == [
        *((0, 0.1 + 0.2, None, 0), (1, -2e-07, 0.0, 0), (2, 1e99, 1.0, 9)),
        *((3, None, None, 0), (4, 0.5, None, 0), (5, 0.5, None, 0), (6, 3, None, 0)),
        (0, 0.1 + 0.2, None, 0),
    ]
    assert [item.failed for item in read.told] == [False] * 3 + [True] + [False] * 4
    assert [item.score for item in read.told[:4]] == [-(0.1 + 0.2), 0.0, 1.0, None]


@pytest.mark.parametrize("skim", [False, True])
def test_ordinary_lines_are_read_without_a_parser(
    monkeypatch: pytest.MonkeyPatch, skim: bool
) -> None:
    lines = to_lines([STARTED, *PROPOSALS, *ORDINARY])
    parsed: list[bytes] = []
    parse = journal_module._parsed
    monkeypatch.setattr(journal_module, "_parsed", lambda line: parsed.append(line) or parse(line))
    read = read_lines(lines, skim=skim)
    assert len(read.facts) + len(read.asked) + len(read.told) == 11
    assert parsed == [lines.splitlines(keepends=True)[0]]


def test_lines_mean_the_same_with_and_without_a_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = to_lines([STARTED, *PROPOSALS, *ORDINARY, *UNUSUAL])
    facts = read_lines(lines).facts
    monkeypatch.setattr(journal_module, "ordinary", lambda line, num_filters: None)
    parsed = read_lines(lines).facts
    assert told(facts) == told(parsed) == told([STARTED, *PROPOSALS, *ORDINARY, *UNUSUAL])
    assert [type(fact.seconds) for fact in facts if isinstance(fact, Feedback)] == [
        type(fact.seconds) for fact in parsed if isinstance(fact, Feedback)
    ]


@pytest.mark.parametrize("skim", [False, True])
@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        (b'"val_loss":-2e-07', b'"val_loss":1e308', r"must be finite, got 1e\+308"),
        (b'"val_loss":-2e-07', b'"val_loss":1e999', "must be finite, got inf"),
        (b'"val_accuracy":0.0', b'"val_accuracy":-1.0e200', "must be finite, got -1e"),
        (b'"proposal_id":1,"val', b'"proposal_id":01,"val', "Expecting"),
        (b'"proposal_id":1,"val', b'"proposal_id":9223372036854775808,"val', "too large"),
        (b'"seconds":1e-05', b'"seconds":00.1', "Expecting"),
        (b'"at":1.0', b'"at":999999999999.0', "at of fact Feedback is no time"),
    ],
)
def test_a_number_that_no_search_writes_is_refused_by_either_reading(
    before: bytes, after: bytes, reason: str, skim: bool
) -> None:
    lines = to_lines([STARTED, *PROPOSALS, ORDINARY[0]])
    line = to_lines([ORDINARY[1]]).partition(b',"sum"')[0] + b"}"
    changed = sealed(line.replace(before, after).decode(), lines)
    assert (damage := read_lines(lines + changed, skim=skim).damage) is not None
    assert re.search(reason, damage.reason)


def test_a_skimmed_journal_is_checked_as_well() -> None:
    lines = to_lines(FACTS)
    damaged = read_lines(lines.replace(b'"macs":50', b'"macs":51'), skim=True)
    assert (told(damaged.facts), damaged.asked) == (told(FACTS[:1]), [])
    assert damaged.damage is not None
    assert "checksum" in damaged.damage.reason
    never_asked = read_lines(to_lines([STARTED, PROPOSALS[0], ORDINARY[1]]), skim=True)
    assert never_asked.damage is not None
    assert "proposal 1, which no line asks for" in never_asked.damage.reason


def test_garbage_collection_goes_on_after_a_journal_was_read() -> None:
    read_lines(to_lines(FACTS))
    assert gc.isenabled()
    gc.disable()
    try:
        read_lines(to_lines(FACTS))
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_line_nested_too_deeply_is_refused(journal: Path) -> None:
    content = journal.read_bytes()
    journal.write_bytes(content + sealed('{"a":' + 99_999 * "[" + 99_999 * "]" + "}", content))
    with pytest.raises(ValueError, match="line 5 is damaged: it is nested too deeply"):
        read_journal(journal.parent)


def test_a_journal_without_its_first_line_is_refused(journal: Path) -> None:
    journal.write_bytes(to_lines([numbered(1), *FACTS]))
    with pytest.raises(ValueError, match="line 1 is damaged: expected Started in the first line"):
        read_journal(journal.parent)


def sealed(line: str, before: bytes) -> bytes:
    """A JSON object as a line with the checksum that it needs behind other lines."""
    body = line.removesuffix("}").encode()
    checksum = blake2b(last_checksum(before) + body, digest_size=8).hexdigest()
    return body + f',"sum":"{checksum}"}}\n'.encode()


def test_the_first_line_names_format_filters_and_parameters(journal: Path) -> None:
    started = json.loads(journal.read_text().splitlines()[0])
    assert (started["fact"], started["format"]) == ("Started", 3)
    assert (started["num_filters"], started["dense_parameters"]) == (9, 0)


@pytest.mark.parametrize("number", [2, 4, None])
def test_a_journal_of_another_format_is_refused(journal: Path, number: int | None) -> None:
    lines = journal.read_text().splitlines(keepends=True)
    started = json.loads(lines[0])
    del started["format"], started["sum"]
    other = started if number is None else started | {"format": number}
    journal.write_text("".join([json.dumps(other) + "\n", *lines[1:]]))
    sentence = rf"line 1: expected a journal of format 3, got {number}; read it with the version"
    with pytest.raises(ValueError, match=sentence):
        read_journal(journal.parent)
    with pytest.raises(ValueError, match=sentence):
        open_run(journal.parent, resume=True).__enter__()
    with pytest.raises(ValueError, match="cannot be repaired: expected a journal of format 3"):
        repair(journal.parent)
    assert json.loads(journal.read_text().splitlines()[0]) == other


def test_a_first_line_whose_format_is_lost_is_a_damaged_one(journal: Path) -> None:
    started, *others = journal.read_text().splitlines(keepends=True)
    data = json.loads(started)
    data["format_"] = data.pop("format")
    journal.write_text("".join([json.dumps(data) + "\n", *others]))
    with pytest.raises(ValueError, match="line 1 is damaged: its checksum does not fit"):
        read_journal(journal.parent)
    assert "now ends after line 0" in repair(journal.parent)[0]


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
