"""Every command line of README and notebook, as the job would read it: none is refused."""

from __future__ import annotations

import pkgutil
import re
from pathlib import Path

import pytest
from job_files import job_words, parse_job, shell_commands

REPOSITORY = Path(__file__).resolve().parents[1]
NOTEBOOK = REPOSITORY / "jobs/experiments/README.md"
GUIDES = [REPOSITORY / f"{folder}README.md" for folder in ("", "fppmo_ray/", "jobs/")]
NUMBERS = {"S": "50", "R": "3"}  # that the text leaves open
OF_JOB = re.compile(r"(?:python|fppmo-ray submit) jobs/((?:experiments/)?\w+)\.py")


def commands(document: Path) -> list[str]:
    """Commands in blocks and in the text that name a job with flags."""
    text = document.read_text()
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    in_text = [part for found in re.findall(r"`([^`]+)`", prose) for part in found.split("; ")]
    texts = [" ".join(text.split()) for text in [*shell_commands(text), *in_text]]
    return [text for text in texts if OF_JOB.match(text)]


def jobs_of(folder: str) -> set[str]:
    """The files of a folder that are run: ``name`` as it stands in commands."""
    files = (REPOSITORY / "jobs" / folder).glob("*.py")
    return {f"{folder}{file.stem}" for file in files if "run_job(main)" in file.read_text()}


def shown(*documents: Path) -> set[str]:
    return {found for path in documents for c in commands(path) for found in OF_JOB.findall(c)}


def test_the_readme_shows_every_job_that_searches_and_the_notebook_every_experiment() -> None:
    assert (
        jobs_of("")
        == {job for job in shown(*GUIDES) if "/" not in job}  # a table's command may be a study
        == {
            *("baseline", "cifar10", "denoise", "imagenet", "tune_cifar10", "yolo"),
        }
    )
    assert shown(NOTEBOOK) == jobs_of("experiments/") | {
        "baseline",
        "cifar10",
        "denoise",
        "imagenet",
    }


@pytest.mark.parametrize(
    "command", [command for page in [*GUIDES, NOTEBOOK] for command in commands(page)]
)
def test_a_command_of_the_documents_is_one_of_its_job(command: str) -> None:
    assert parse_job([NUMBERS.get(word, word) for word in job_words(command)])


def test_a_flag_that_a_job_does_not_have_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    found = [command for page in GUIDES for command in commands(page)]
    [command] = [command for command in found if "jobs/denoise.py" in command]
    with pytest.raises(SystemExit):
        parse_job(job_words(f"{command} --epochs 3"))
    assert "--epochs" in capsys.readouterr().err


def test_links_into_the_notebook_have_a_heading() -> None:
    headings = re.findall(r"^## (.+)$", NOTEBOOK.read_text(), flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}
    own = re.findall(r"\]\(#([\w-]+)\)", NOTEBOOK.read_text())
    pages = "".join(page.read_text() for page in GUIDES)
    from_guides = re.findall(r"experiments/README\.md#([\w-]+)", pages)
    assert len(from_guides) >= 6
    assert {*own, *from_guides} <= anchors


PAGES = [
    *GUIDES,
    *(REPOSITORY / "cluster/README.md", REPOSITORY / ".github/CONTRIBUTING.md"),
    *(REPOSITORY / "fppmo_ray/COMING_FROM.md", REPOSITORY / "CHANGELOG.md", NOTEBOOK),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_file_and_name_in_a_document_exists(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert not [target for target in links if not (page.parent / target).exists()]
    # Without the studies' outputs and folders of users, which begin otherwise.
    files = re.findall(r"[`(\s]((?:fppmo_ray|jobs|tests|cluster)/[\w./-]*\w)", text)
    assert not [name for name in files if not (REPOSITORY / name).exists()]
    names = set(re.findall(r"(?<![\w/])fppmo_ray(?:\.[A-Za-z_]\w*)+", text))
    assert not [name for name in names if not is_there(name)]
    if page.name == "CONTRIBUTING.md":
        assert {"fppmo_ray/distribution/rules.py", "tests/service/test_golden.py"} <= set(files)
        assert "fppmo_ray.distribution.UpdateRule" in names


def is_there(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True
