from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from fppmo_ray.job import (
    _next_steps,
    comma_lists,
    exit_on_error,
    require_lasting,
    resume_mode,
)
from fppmo_ray.service.journal.facts import Started
from fppmo_ray.service.journal.run_directory import open_run
from fppmo_ray.service.settings import SearchSettings, in_stages
from fppmo_ray.service.stopping import signals_stop_searches, stop_on_signal

STARTED = Started(search_id="abc", identity={}, versions={}, groups=[], num_filters=1, dense_macs=1)


def test_in_a_submitted_job_only_what_outlives_its_working_directory_will_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require_lasting("runs/mine")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    for lasting in ("/shared/mine", "file:///shared/mine", "s3://bucket/mine", Path("/shared")):
        require_lasting(lasting)
    with pytest.raises(ValueError, match=r"runs/mine is relative: .* or a URI such as s3://"):
        require_lasting("runs/mine")


def test_a_job_that_is_started_again_while_it_is_about_to_begin_elsewhere_goes_on(
    tmp_path: Path,
) -> None:
    run_dir = str(tmp_path / "run")
    resume = resume_mode(run_dir, resume=False, resume_or_start=True)
    with open_run(run_dir, resume=False, started=STARTED):
        pass  # the other one, while this one loads its data
    with open_run(run_dir, resume=resume, started=STARTED) as run:
        assert run.facts == [STARTED]
    assert resume_mode(run_dir, resume=True)


def test_a_run_directory_that_does_not_fit_the_flags_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no journal"):
        resume_mode(str(tmp_path), resume=True)


def test_an_interrupt_ends_in_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        exit_on_error(interrupted)
    assert end.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_job_logs_warnings_and_infos_on_stderr_and_restores_both_afterwards() -> None:
    code = """
import logging, signal, sys, warnings
from fppmo_ray.job import exit_on_error

def run():
    warnings.warn("too few images")
    logging.getLogger("anyone").info("generation 1")
    raise ValueError("macs_cut must be in (0, 1)")

def state():
    root = logging.getLogger()
    return root.level, list(root.handlers), warnings.showwarning, signal.getsignal(signal.SIGTERM)

before = state()
try:
    exit_on_error(run)
except SystemExit as end:
    print(end)
assert state() == before
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    clock = r"\d\d:\d\d:\d\d"
    assert re.fullmatch(rf"{clock} too few images\n{clock} generation 1\n", done.stderr)
    assert done.stdout == "error: macs_cut must be in (0, 1)\n"


def test_a_search_in_a_script_logs_unless_the_process_has_a_log_of_its_own() -> None:
    code = """
import logging, sys
from fppmo_ray.job import log_of_search

def search():
    with log_of_search():
        logging.getLogger("fppmo_ray.service").info("generation 1")

search()
assert logging.getLogger("fppmo_ray").handlers == []
logging.basicConfig(level=logging.INFO, format="mine: %(message)s")
search()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    clock = r"\d\d:\d\d:\d\d"
    assert re.fullmatch(rf"{clock} generation 1\nmine: generation 1\n", done.stderr)


def test_the_next_commands_are_those_that_can_be_run(tmp_path: Path) -> None:
    def steps(**figures: object) -> list[str]:
        (tmp_path / "result.json").write_text(json.dumps(figures))
        return _next_steps(tmp_path)

    one, two = {"macs_cut": 0.5}, {"macs_cut": [0.4, 0.6]}
    assert steps(settings=one, source={"constructor": "timm:create_model"}) == [
        f"look:    fppmo-ray report {tmp_path}",
        f"export:  fppmo-ray export {tmp_path} --format onnx",
        f"load:    fppmo_ray.load_network('{tmp_path}/network.json')",
    ]
    own = steps(settings=one, source={"constructor": "mine:net"})
    assert own[1].endswith("--format onnx --constructor mine:net")
    assert steps(settings=two, source={})[1:] == [
        f"export:  fppmo-ray export {tmp_path} --format onnx --macs-cut 0.4 "
        "--constructor MODULE:FUNCTION",
        f"load:    fppmo_ray.load_network('{tmp_path}/network-0.4.json', constructor)",
        "         (the function, without arguments, constructs the dense network)",
    ]


def test_a_signal_stops_a_search_only_in_a_block_that_asks_for_it() -> None:
    before = signal.getsignal(signal.SIGTERM)

    def how_far() -> str:
        return "3 of 8 proposals are scored"

    with stop_on_signal(how_far) as stop:
        assert signal.getsignal(signal.SIGTERM) is before
    with signals_stop_searches(), stop_on_signal(how_far) as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.is_made
        assert signal.getsignal(signal.SIGTERM) is before  # a second one ends at once
    assert str(stop.stopped()) == (
        "stopped on request: 3 of 8 proposals are scored; go on with --resume"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_process_that_was_started_with_signals_ignored(
    number: signal.Signals,
) -> None:
    lines = (
        "import signal",
        "from fppmo_ray.service.stopping import signals_stop_searches, stop_on_signal",
        f"signal.signal({number}, signal.SIG_IGN)",
        "with signals_stop_searches(), stop_on_signal(str) as stop:",
        f"    signal.raise_signal({number})",
        "    print(stop.is_made, flush=True)",
        f"    signal.raise_signal({number})",
        "    print('goes on')",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("True\n", -number)


def parsed(*flags: str) -> SearchSettings:
    config = (tyro.conf.OmitArgPrefixes,)
    return tyro.cli(SearchSettings, args=flags, config=config, registry=comma_lists())


def test_a_number_stays_a_number_and_several_are_a_tuple() -> None:
    assert parsed("--macs-cut", "0.57").macs_cut == 0.57
    assert parsed("--macs-cut", "0.4,0.57,0.7").macs_cut == (0.4, 0.57, 0.7)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("0.4,", "could not convert string to float: ''"),
        ("0.57,0.4", "must ascend, each given once"),
        ("0.57,1.4", "macs_cut must be in (0, 1), got 1.4"),
    ],
)
def test_what_makes_no_list_of_cuts_ends_with_a_sentence(
    text: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parsed("--macs-cut", text)
    printed = capsys.readouterr().err.replace("│", " ")
    assert sentence in " ".join(printed.split())


def test_a_latency_cut_needs_no_macs_cut_beside_it() -> None:
    settings = parsed("--latency-cut", "0.3", "--latency-batch", "8")
    assert (settings.macs_cut, settings.further_cuts) == (0.0, {"latency": 0.3})
    assert settings.latency_batch == 8
    beside = parsed("--macs-cut", "0.4,0.57", "--params-cut", "0.5", "--memory-cut", "0.2")
    assert beside.macs_cuts == (0.4, 0.57)
    assert beside.further_cuts == {"params": 0.5, "memory": 0.2}


def test_stages_are_given_with_commas_too() -> None:
    assert parsed("--macs-cut", "0.57").gradual.stages == ()
    stages = in_stages(parsed("--macs-cut", "0.57", "--stages", "0.25,0.45,0.57"))
    assert [stage.macs_cut for stage in stages] == [0.25, 0.45, 0.57]
    assert len(in_stages(parsed("--macs-cut", "0.57", "--stages", "0.25"))) == 2
