from __future__ import annotations

from pathlib import Path

import pytest

from fppmo_ray.job import exit_on_error, require_lasting, resume_mode
from fppmo_ray.service.record.facts import Started
from fppmo_ray.service.record.run_directory import open_run

STARTED = Started(search_id="abc", identity={}, versions={}, groups=[], dense_macs=1)


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
