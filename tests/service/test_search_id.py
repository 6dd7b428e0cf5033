"""Which id a search has."""

from __future__ import annotations

from pathlib import Path

import pytest

from fppmo_ray.service.search_id import search_id


def test_without_a_submission_every_search_has_an_id_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("FPPMO_SEARCH_ID", raising=False)
    assert len(search_id("/run")) == 12
    assert search_id("/run") != search_id("/run")


def test_a_jobs_search_in_its_run_directory_has_the_jobs_id_and_others_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FPPMO_SEARCH_ID", "c0ffee")
    monkeypatch.setenv("FPPMO_RUN_DIR", "s3://bucket/run")
    assert search_id("s3://bucket/run/stage-1") == "c0ffee-0cfa61"
    assert search_id("s3://bucket/other") == "c0ffee-cb1c53"
    assert search_id("s3://bucket/run?region=eu-west-1") == "c0ffee"
    monkeypatch.setenv("FPPMO_RUN_DIR", "/shared/run/")
    assert search_id(Path("/shared/run/")) == "c0ffee"


def test_the_first_search_of_a_job_without_a_run_directory_has_the_jobs_id_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FPPMO_SEARCH_ID", "decade")
    monkeypatch.delenv("FPPMO_RUN_DIR", raising=False)
    first, second = search_id(Path("/runs/a")), search_id(Path("/runs/b"))
    assert (first, second) == ("decade", "decade-96e31d")
    assert search_id("/runs/b") == second
    assert search_id("/runs/a") == first
