"""What every run directory does, on a local disk and on an object store."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from example_facts import FACTS, STARTED, numbered, told

from fppmo_ray.service.journal import run_directory
from fppmo_ray.service.journal.facts import Fact, Started
from fppmo_ray.service.journal.journal import from_lines
from fppmo_ray.service.journal.run_directory import (
    open_run,
    read_journal,
    require_fit,
)
from fppmo_ray.service.journal.storage import open_storage

OTHER = replace(STARTED, search_id="def", identity={"settings": {"macs_cut": 0.7}, "network": "1f"})


def write(run_dir: str, facts: list[Fact]) -> None:
    with open_run(run_dir, resume=False) as run:
        run.record(facts)


def test_facts_are_read_back_to_the_last_bit(run_dir: str) -> None:
    write(run_dir, FACTS)
    assert told(read_journal(run_dir)) == told(FACTS)


def test_a_resumed_run_knows_all_facts_and_adds_to_them(run_dir: str) -> None:
    write(run_dir, FACTS[:2])
    for number in (2, 3):
        with open_run(run_dir, resume=True) as run:
            assert told(run.facts) == told(FACTS[:number])
            run.record([FACTS[number]])
            assert told(run.facts) == told(FACTS[: number + 1])
    assert told(read_journal(run_dir)) == told(FACTS)


def test_a_run_that_recorded_nothing_reads_as_empty_and_resumes(run_dir: str) -> None:
    write(run_dir, [])
    assert read_journal(run_dir) == []
    with open_run(run_dir, resume=True) as run:
        assert run.facts == []


def test_recording_nothing_writes_nothing(run_dir: str) -> None:
    storage = open_storage(run_dir)
    with open_run(run_dir, resume=False) as run:
        run.record([])
    assert read_journal(run_dir) == []
    if storage.local is None:
        [lease] = storage.names("journal/claims")
        assert storage.names(f"journal/{lease}") == ["000000.jsonl"]


def test_resume_without_a_journal_is_refused_and_makes_nothing(run_dir: str) -> None:
    for refuse in (require_fit, lambda *a, **k: open_run(*a, **k).__enter__()):
        with pytest.raises(ValueError, match=r"--resume: .* holds no journal.*; start it without"):
            refuse(run_dir, resume=True)
    storage = open_storage(run_dir)
    assert storage.names("") == storage.names("journal/claims") == []


def test_a_directory_that_holds_a_search_is_not_overwritten(run_dir: str) -> None:
    write(run_dir, FACTS)
    for refuse in (require_fit, lambda *a, **k: open_run(*a, **k).__enter__()):
        with pytest.raises(ValueError, match="already holds a search; go on with it by --resume"):
            refuse(run_dir, resume=False)
    assert told(read_journal(run_dir)) == told(FACTS)


def test_what_does_not_fit_disturbs_no_driver(run_dir: str) -> None:
    with open_run(run_dir, resume=False, started=STARTED) as run:
        with pytest.raises(ValueError, match="already holds a search"):
            open_run(run_dir, resume=False).__enter__()
        with pytest.raises(
            ValueError, match=r"another search: settings.macs_cut was 0\.5, now 0\.7"
        ):
            open_run(run_dir, resume=True, started=OTHER).__enter__()
        run.record([FACTS[1]])
    assert told(read_journal(run_dir)) == told(FACTS[:2])


def test_a_journal_that_nobody_has_changed_meanwhile_is_parsed_once(
    run_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(run_dir, FACTS)
    parsed: list[int] = []

    def note(lines: bytes, *place: str) -> list[Fact]:
        parsed.append(len(lines))
        return from_lines(lines, *place)

    monkeypatch.setattr(run_directory, "from_lines", note)
    with open_run(run_dir, resume=True) as run:
        assert told(run.facts) == told(FACTS)
    assert len(parsed) == 1


def test_another_search_is_refused_and_what_differs_is_named(run_dir: str) -> None:
    write(run_dir, FACTS)
    with (
        open_run(run_dir, resume=True) as run,
        pytest.raises(
            ValueError, match=r"another search: settings.macs_cut was 0\.5, now 0\.7; resume"
        ),
    ):
        run.start(OTHER)


def test_settings_that_differ_are_named_by_their_full_path(run_dir: str) -> None:
    def started(share: float, digest: str, **others: object) -> Started:
        limits = {"data": [share, 1.0], **others}
        settings = {"macs_cut": 0.5, "layer_limits": limits, "recipe": {"epochs": 3}}
        return replace(STARTED, identity={"settings": settings, "data": digest})

    write(run_dir, [started(0.25, "1f")])
    require_fit(run_dir, resume=True, started=started(0.25, "1f"))
    for now, difference in (
        (
            started(0.5, "1f"),
            r"settings\.layer_limits\.data was \[0\.25, 1\.0\], now \[0\.5, 1\.0\]",
        ),
        (started(0.25, "2e"), r"data was '1f', now '2e'"),
        (started(0.25, "1f", conv1=(0.5, 1.0)), r"settings\.layer_limits\.conv1 was None, now \[0"),
    ):
        with pytest.raises(ValueError, match=f"holds another search: {difference}.*; resume with"):
            require_fit(run_dir, resume=True, started=now)


def test_identities_with_tuples_are_compared_as_the_journal_keeps_them(run_dir: str) -> None:
    started = replace(STARTED, identity={"settings": {"macs_cut": (0.4, 0.6), "ignore": ()}})
    write(run_dir, [started])
    require_fit(run_dir, resume=True, started=started)


def test_the_same_search_keeps_its_first_id(run_dir: str) -> None:
    write(run_dir, FACTS)
    with open_run(run_dir, resume=True) as run:
        again = replace(STARTED, search_id="new", versions={"torch": "9"})
        assert run.start(again).search_id == "abc"
    assert told(read_journal(run_dir)) == told(FACTS)


def test_opening_with_an_identity_records_it_once(run_dir: str) -> None:
    for resume in (False, True):
        with open_run(run_dir, resume=resume, started=STARTED) as run:
            assert told(run.facts) == told([STARTED])
    assert told(read_journal(run_dir)) == told([STARTED])


def test_artifacts_are_checked_against_their_digest(run_dir: str) -> None:
    with open_run(run_dir, resume=False) as run:
        sha256 = run.write_artifact("checkpoints/a.pt", b"weights")
        assert sha256 == hashlib.sha256(b"weights").hexdigest()
        assert run.read_artifact("checkpoints/a.pt", sha256) == b"weights"
        open_storage(run_dir).write("checkpoints/a.pt", b"other")
        with pytest.raises(ValueError, match="SHA-256 differs"):
            run.read_artifact("checkpoints/a.pt", sha256)
        with pytest.raises(ValueError, match="does not exist"):
            run.read_artifact("checkpoints/b.pt", sha256)


def test_a_deleted_artifact_is_gone_and_may_be_deleted_again(run_dir: str) -> None:
    with open_run(run_dir, resume=False) as run:
        run.write_artifact("checkpoints/a.pt", b"weights")
        run.delete_artifact("checkpoints/a.pt")
        run.delete_artifact("checkpoints/a.pt")
    assert open_storage(run_dir).names("checkpoints") == []


def test_the_journal_of_a_place_without_one_is_refused(run_dir: str) -> None:
    with pytest.raises(ValueError, match=r"holds no journal.*; expected the run directory"):
        read_journal(run_dir)


def test_of_two_drivers_one_writes_and_nothing_recorded_is_lost(run_dir: str) -> None:
    with open_run(run_dir, resume=False, started=STARTED) as first:
        first.record([numbered(1)])
        if open_storage(run_dir).local is not None:
            with pytest.raises(ValueError, match="is being written by another driver"):
                open_run(run_dir, resume=True).__enter__()
            return
        with open_run(run_dir, resume=True, started=STARTED) as second:
            assert told(second.facts) == told([STARTED, numbered(1)])
            for late in (2, 3):
                with pytest.raises(RuntimeError, match="another driver has taken over the search"):
                    first.record([numbered(late)])
                assert numbered(late) not in first.facts
            with pytest.raises(RuntimeError, match="another driver has taken over the search"):
                first.write_artifact("result.json", b"late")
            second.record([numbered(4)])
    assert told(read_journal(run_dir)) == told([STARTED, numbered(1), numbered(4)])
    assert not open_storage(run_dir).exists("result.json")


def test_a_driver_that_takes_what_is_there_begins_or_goes_on(run_dir: str) -> None:
    with open_run(run_dir, resume="auto", started=STARTED) as run:
        run.record([numbered(1)])
    require_fit(run_dir, resume="auto", started=STARTED)
    with open_run(run_dir, resume="auto", started=STARTED) as run:
        assert told(run.facts) == told([STARTED, numbered(1)])
    with pytest.raises(ValueError, match=r"another search: settings.macs_cut was 0\.5, now 0\.7"):
        require_fit(run_dir, resume="auto", started=OTHER)
