"""Command lines of job files, as the jobs hear them."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import tyro

from fppmo_ray.job import comma_lists
from fppmo_ray.job_client.commands import split_flags


def parse_job(words: list[str]) -> dict[str, Any]:
    """The arguments that a job file's ``main`` would get from a command line.

    Raises:
        SystemExit: the job refuses its flags.
    """
    position = next(
        index
        for index, word in enumerate(words)
        if re.search(r"jobs/(?:experiments/)?\w+\.py$", word)
    )
    module = importlib.import_module(Path(words[position]).stem)
    heard: dict[str, Any] = {}

    @functools.wraps(module.main)
    def hear(*positional: Any, **named: Any) -> None:
        heard.update(inspect.signature(module.main).bind(*positional, **named).arguments)

    tyro.cli(
        hear,
        args=words[position + 1 :],
        config=(tyro.conf.OmitArgPrefixes,),
        registry=comma_lists(),
    )
    return heard


def job_words(command: str) -> list[str]:
    """The words for ``parse_job``, without what ``fppmo-ray submit`` takes for itself."""
    words = shlex.split(command)
    if words[0] != "fppmo-ray":
        return words
    ours, jobs = split_flags(words[2:])
    return [ours[-1] if ours[0].startswith("-") else ours[0], *jobs]


def shell_commands(text: str) -> list[str]:
    """The commands in a Markdown file's fenced blocks, continued lines joined."""
    fenced = re.findall(r"```(\w*)\n(.*?)```", text, flags=re.DOTALL)
    blocks = [block for language, block in fenced if not language]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.strip()]
