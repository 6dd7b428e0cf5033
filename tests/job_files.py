"""Job files as modules, and their command lines: jobs are run, not installed."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import tyro

from fppmo_ray.cluster_commands import part_flags
from fppmo_ray.flags import comma_lists

_JOBS = Path(__file__).resolve().parents[1] / "jobs"


def load_job(name: str) -> ModuleType:
    """The module of ``jobs/<name>.py``, without running its ``main``."""
    if str(_JOBS) not in sys.path:  # as Python itself puts it there for a script
        sys.path.insert(0, str(_JOBS))
    specification = importlib.util.spec_from_file_location(name, _JOBS / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses look there
    specification.loader.exec_module(module)
    return module


def parse_job(words: list[str]) -> dict[str, Any]:
    """The arguments that a job file's ``main`` would get from a command line.

    Raises:
        SystemExit: the job refuses its flags.
    """
    position = next(index for index, word in enumerate(words) if re.search(r"jobs/\w+\.py$", word))
    module = load_job(Path(words[position]).stem)
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
    ours, jobs = part_flags(words[2:])
    return [ours[-1] if ours[0].startswith("-") else ours[0], *jobs]


def shell_commands(text: str) -> list[str]:
    """The commands in a Markdown file's fenced blocks, continued lines joined."""
    fenced = re.findall(r"```(\w*)\n(.*?)```", text, flags=re.DOTALL)
    blocks = [block for language, block in fenced if not language]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.strip()]
