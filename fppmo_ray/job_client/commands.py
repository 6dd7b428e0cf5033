"""Commands that talk to a cluster: ``fppmo-ray submit | list | status | logs | stop``."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fppmo_ray.job_client.search_jobs import (
    SearchJob,
    find_job,
    follow_log,
    job_server,
    search_jobs,
    stop_job,
)
from fppmo_ray.job_client.submission import (
    Submission,
    environment_variables,
    read_runtime_env,
    send,
)

_LAST_LINES = 8


def submit(
    flags: Sequence[str],
    job: tyro.conf.Positional[Path],
    /,
    *,
    address: str | None = None,
    follow: bool = False,
    stop_wait: int = 600,
    runtime_env: Path | None = None,
    env: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
) -> None:
    """Run a job file on a cluster, with a copy of the working directory.

    fppmo-ray submit JOB.py [the job's own flags] [--address URL]: arguments after the job file that
    are none of the options below go to the job, and so does everything after a --.

    Of the working directory, files that git ignores or a .rayignore names stay here, and so do
    .env, *.pem, id_*, .netrc, cloud credentials, and links that lead out of it.

    Args:
        flags: The job's own flags.
        job: The job file, in the working directory or below it.
        address: URL of the cluster's dashboard. Default: RAY_API_SERVER_ADDRESS, else RAY_ADDRESS,
            else http://127.0.0.1:8265.
        follow: Show the job's log until the job ends.
        stop_wait: Seconds that ``fppmo-ray stop`` grants running scores before it kills the job.
        runtime_env: YAML or JSON file with a runtime environment of Ray: pip, uv, image_uri,
            excludes, env_vars ...
        env: Environment variable of the job and its workers, NAME=VALUE, or NAME for the value that
            it has here; may be repeated. Everyone who sees the cluster's jobs can read it.
    """
    submission = Submission(
        folder=Path.cwd(),
        job=os.path.relpath(job),
        flags=tuple(flags),
        stop_wait=stop_wait,
        runtime_env={} if runtime_env is None else read_runtime_env(runtime_env),
        env_vars=environment_variables(env),
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
    """List the searches that were submitted to a cluster.

    Args:
        address: URL of the cluster's dashboard.
    """
    with job_server(address) as client:
        jobs = search_jobs(client)
    table = Table("search", "job", "state", "since", "run directory", box=None)
    for job in jobs:
        cells = (job.search_id, job.job, job.state, _since(job), job.run_dir or "-")
        table.add_row(*map(Text, cells))  # not str, whose brackets would be markup
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def status(search: str, address: str | None) -> None:
    """Show the state of a submitted search and the last lines of its log.

    Args:
        search: The search's id.
        address: URL of the cluster's dashboard.
    """
    with job_server(address) as client:
        job = find_job(client, search)
        log = client.get_job_logs(job.submission_id)
    _describe(job)
    print(*log.splitlines()[-_LAST_LINES:], sep="\n")


def logs(
    search: tyro.conf.Positional[str], /, *, follow: bool = False, address: str | None = None
) -> None:
    """Show the log of a submitted search.

    Args:
        search: The search's id.
        follow: Keep showing new lines until the job ends.
        address: URL of the cluster's dashboard.
    """
    with job_server(address) as client:
        job = find_job(client, search)
        if follow:
            _require_success(follow_log(client, job, _show))
        else:
            _show(client.get_job_logs(job.submission_id))


def stop(search: tyro.conf.Positional[str], /, *, address: str | None = None) -> None:
    """Stop a submitted search after the scores that are running. It can be resumed.

    Args:
        search: The search's id.
        address: URL of the cluster's dashboard.
    """
    with job_server(address) as client:
        job = find_job(client, search)
        if job.has_ended:
            raise ValueError(f"search {job.search_id} has ended already: {job.state}")
        print("stopping: the search first finishes the scores that are running", flush=True)
        job = stop_job(client, job)
        _describe(job)
        if job.state == "SUCCEEDED":
            return  # the search finished before the stop arrived
        print("the journal is complete; resume the search by")
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


def split_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the arguments of ``submit`` into the command's own ones and the job's.

    The command's own are all arguments up to the job file, and its options anywhere before ``--``.
    All others are the job's.
    """
    options = _options(submit)
    ours: list[str] = []
    jobs: list[str] = []
    rest = iter(arguments)
    has_job_file = False
    for item in rest:
        spelling, equals, _ = item.partition("=")
        name = spelling.replace("_", "-")  # tyro accepts both spellings
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
    """Return the options of a command, each with whether a value follows it."""
    options = {"-h": False, "--help": False}
    for parameter in inspect.signature(command).parameters.values():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        name = parameter.name.replace("_", "-")
        is_switch = isinstance(parameter.default, bool)
        options |= {f"--{name}": not is_switch}
        options |= {f"--no-{name}": False} if is_switch else {}
    return options
