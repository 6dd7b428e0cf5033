"""Every command line of the README, as the job would read it: none that is copied is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from job_files import job_words, parse_job, shell_commands

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
PROSE = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
NUMBERS = {"S": "50", "R": "3"}  # that the text leaves open


def commands() -> list[str]:
    """Of blocks and of the text, those that name a job with flags."""
    in_text = [part for found in re.findall(r"`([^`]+)`", PROSE) for part in found.split("; ")]
    texts = [" ".join(text.split()) for text in [*shell_commands(README), *in_text]]
    of_jobs = re.compile(r"(python|fppmo-ray submit) jobs/(?:experiments/)?\w+\.py")
    return [text for text in texts if of_jobs.match(text)]


def test_the_readme_shows_every_job_that_measures_or_searches() -> None:
    shown = {
        name
        for command in commands()
        for name in re.findall(r"jobs/(?:experiments/)?(\w+)\.py", command)
    }
    assert shown == {
        *("baseline", "benchmark", "chaos", "cifar10", "compare", "denoise", "fidelity"),
        *("imagenet", "model_zoo", "recipes", "rules", "searches", "tune_cifar10"),
    }


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_readme_is_one_of_its_job(command: str) -> None:
    assert parse_job([NUMBERS.get(word, word) for word in job_words(command)])


def test_a_flag_that_a_job_does_not_have_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    [command] = [command for command in commands() if "jobs/denoise.py" in command]
    with pytest.raises(SystemExit):
        parse_job(job_words(f"{command} --epochs 3"))
    assert "--epochs" in capsys.readouterr().err
