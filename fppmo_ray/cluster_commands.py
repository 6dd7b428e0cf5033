"""The commands that speak to a cluster: ``fppmo-ray submit | list | status | logs | stop``."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from fppmo_ray.service.job_client.search_jobs import (
    SearchJob,
    find_job,
    follow_log,
    job_server,
    search_jobs,
    stop_job,
)
from fppmo_ray.service.job_client.submission import Submission, send

_LAST_LINES = 8


def submit(
    flags: Sequence[str],
    job: tyro.conf.Positional[Path],
    /,
    *,
    address: str | None = None,
    follow: bool = False,
    stop_wait: int = 600,
) -> None:
    """Run a job file on a cluster, from a copy of this folder.

    fppmo-ray submit JOB.py [the job's own flags] [--address URL]: behind the job file, all that
    is none of the options below goes to the job, and so does everything behind a --.

    Args:
        flags: Of the job.
        job: The job file, in this folder or below.
        address: Of the cluster's dashboard; by default RAY_API_SERVER_ADDRESS or RAY_ADDRESS, else
            http://127.0.0.1:8265.
        follow: Show the job's log until it ends.
        stop_wait: Seconds that ``fppmo-ray stop`` grants the scores that are running.
    """
    submission = Submission(
        folder=Path.cwd(),
        job=os.path.relpath(job),
        flags=tuple(flags),
        stop_wait=stop_wait,
    )
    with job_server(address) as client:
        sent = send(client, submission)
        _describe(sent)
        for command in ("status", "logs --follow", "stop"):
            print(f"  fppmo-ray {command} {sent.search_id} --address {client.get_address()}")
        print(f"dashboard: {client.get_address()}/#/jobs/{sent.submission_id}")
        if follow:
            _require_success(follow_log(client, sent, _show))


def list_searches(*, address: str | None = None) -> None:
    """The searches that were submitted to a cluster.

    Args:
        address: Of the cluster's dashboard.
    """
    with job_server(address) as client:
        jobs = search_jobs(client)
    table = Table("search", "job", "state", "since", "run directory", box=None)
    for job in jobs:
        table.add_row(job.search_id, job.job, job.state, _since(job), job.run_dir or "-")
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def status(search: str, address: str | None) -> None:
    """How far a submitted search has come, by the end of its log."""
    with job_server(address) as client:
        job = find_job(client, search)
        log = client.get_job_logs(job.submission_id)
    _describe(job)
    print(*log.splitlines()[-_LAST_LINES:], sep="\n")


def logs(
    search: tyro.conf.Positional[str], /, *, follow: bool = False, address: str | None = None
) -> None:
    """The log of a submitted search.

    Args:
        search: Its id.
        follow: Go on until the job ends.
        address: Of the cluster's dashboard.
    """
    with job_server(address) as client:
        job = find_job(client, search)
        if follow:
            _require_success(follow_log(client, job, _show))
        else:
            _show(client.get_job_logs(job.submission_id))


def stop(search: tyro.conf.Positional[str], /, *, address: str | None = None) -> None:
    """End a submitted search after the scores that are running; it can be resumed.

    Args:
        search: Its id.
        address: Of the cluster's dashboard.
    """
    with job_server(address) as client:
        job = find_job(client, search)
        if job.has_ended:
            raise ValueError(f"search {job.search_id} has ended already: {job.state}")
        print("stopping: a search first finishes what its workers have begun", flush=True)
        job = stop_job(client, job)
        _describe(job)
        if job.state == "SUCCEEDED":
            return  # it was faster
        print("what was recorded is whole; go on with it by")
        print(f"  fppmo-ray submit {job.resume_arguments} --address {client.get_address()}")


def _describe(job: SearchJob) -> None:
    print(f"search {job.search_id}  {job.state}  {job.job}  since {_since(job)}", flush=True)
    if job.run_dir is not None:
        print(f"run directory: {job.run_dir}", flush=True)


def _since(job: SearchJob) -> str:
    return f"{job.started:%Y-%m-%d %H:%M}" if job.started else "-"


def _show(lines: str) -> None:
    print(lines, end="", flush=True)


def _require_success(job: SearchJob) -> None:
    if job.state != "SUCCEEDED":
        raise RuntimeError(f"search {job.search_id} ended as {job.state}")


def part_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What of a ``submit`` command line is ours, and what is the job's.

    Ours are all before the job file, and our own options wherever they stand before ``--``. The
    rest behind the job file is the job's.
    """
    options = _options(submit)
    ours: list[str] = []
    jobs: list[str] = []
    rest = iter(arguments)
    has_job_file = False
    for item in rest:
        spelling, equals, _ = item.partition("=")
        name = spelling.replace("_", "-")  # both are read
        if item == "--":
            break
        if name in options:
            ours.append(item)
            if options[name] and not equals:
                ours += [value for value in [next(rest, None)] if value is not None]
        elif has_job_file:
            jobs.append(item)
        else:
            ours.append(item)
            has_job_file = not item.startswith("-")
    return ours, [*jobs, *rest]


def _options(command: Callable[..., None]) -> dict[str, bool]:
    """The options of a command, and whether a value follows them."""
    options = {"-h": False, "--help": False}
    for parameter in inspect.signature(command).parameters.values():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        name = parameter.name.replace("_", "-")
        is_switch = isinstance(parameter.default, bool)
        options |= {f"--{name}": not is_switch}
        options |= {f"--no-{name}": False} if is_switch else {}
    return options
