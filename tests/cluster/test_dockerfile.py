"""The image: what it copies is there and sent, what it runs is installed, and it is not root."""

from __future__ import annotations

import fnmatch
import re
import shlex
import tomllib

import pytest
from manifests import CLUSTER, REPOSITORY

DOCKERFILE = (CLUSTER / "Dockerfile").read_text()
IGNORED = (REPOSITORY / ".dockerignore").read_text()


def instructions(text: str) -> list[list[str]]:
    """The Dockerfile's instructions, word by word."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [shlex.split(line) for line in "\n".join(lines).replace("\\\n", " ").splitlines()]


def is_sent(path: str, ignored: str) -> bool:
    """Whether the builder gets a path: as in git, the last pattern that fits decides."""
    sent = True
    for line in ignored.splitlines():
        pattern = line.lstrip("!")
        if not line.startswith("#") and fnmatch.fnmatch(path, pattern):
            sent = line.startswith("!")
    return sent


def copy_errors(text: str, ignored: str) -> list[str]:
    """Sources of COPY that are not in the repository, or that the builder does not get."""
    sources = [path for name, *words in instructions(text) if name == "COPY" for path in words[:-1]]
    return [
        path for path in sources if not (REPOSITORY / path).exists() or not is_sent(path, ignored)
    ]


def test_what_the_image_copies_is_there_and_sent() -> None:
    assert copy_errors(DOCKERFILE, IGNORED) == []


@pytest.mark.parametrize("path", ["jobz", "tests", ".venv", "runs"])
def test_a_source_that_is_absent_or_not_sent_is_noticed(path: str) -> None:
    assert copy_errors(f"FROM scratch\nCOPY {path} ./", IGNORED) == [path]


def test_everything_is_installed_with_the_tested_versions() -> None:
    installs = re.findall(r"pip install (.*)", DOCKERFILE)
    assert installs
    assert all("--constraint constraints.txt" in line for line in installs)
    pinned = re.findall(r"[a-z\]]==[0-9]", DOCKERFILE)
    assert pinned == []  # versions have one home


def test_the_large_layer_holds_direct_dependencies_of_the_project() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    [large] = re.findall(r"constraints.txt ('ray.*)", DOCKERFILE)
    for requirement in shlex.split(large):
        assert any(item.startswith(f"{requirement}>=") for item in project["dependencies"])


def test_the_base_is_a_python_that_the_project_supports_and_the_user_is_not_root() -> None:
    [(_, base)] = [words for words in instructions(DOCKERFILE) if words[0] == "FROM"]
    assert base.startswith("python:3.11-")
    assert instructions(DOCKERFILE)[-1] == ["USER", "ray"]
