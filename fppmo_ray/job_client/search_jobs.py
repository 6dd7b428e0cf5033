"""List, find, follow and stop the searches that were submitted to a cluster."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

DEFAULT_ADDRESS = "http://127.0.0.1:8265"

_POLL_S = 1.0
_SERVER = "RAY_API_SERVER_ADDRESS"
_AUTH_MODE = "RAY_AUTH_MODE"


@dataclass(frozen=True, kw_only=True)
class SearchJob:
    """A Ray job that runs a search. A resumed search has several."""

    search_id: str
    """The id of the search, shared by all its jobs."""
    submission_id: str
    """Ray's id of the job."""
    job: str
    """The job file, relative to the project's folder."""
    state: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    entrypoint: str
    """The command that the cluster runs."""
    started: datetime | None = None
    """When the job was started, in local time; None while it is pending."""
    run_dir: str | None = None
    """The run directory in the job's flags; None if they name none."""

    @classmethod
    def of(cls, details: Any) -> SearchJob:
        """Convert Ray's ``JobDetails`` of a job that ``send`` submitted."""
        metadata = details.metadata
        milliseconds = details.start_time
        return cls(
            search_id=metadata["fppmo_search"],
            submission_id=details.submission_id,
            job=metadata["fppmo_job"],
            state=str(details.status.value),
            entrypoint=details.entrypoint,
            started=datetime.fromtimestamp(milliseconds / 1e3) if milliseconds else None,
            run_dir=metadata.get("fppmo_run_dir"),
        )

    @property
    def has_ended(self) -> bool:
        """Whether the job's driver has exited."""
        return self.state not in ("PENDING", "RUNNING")

    @property
    def resume_arguments(self) -> str:
        """The job file and flags that resume the job, quoted for a shell.

        A job without a run directory, such as a comparison, is resumed by the same command.
        """
        _, *arguments = shlex.split(self.entrypoint)
        resumes = {"--resume", "--resume-or-start", "--resume_or_start"} & {*arguments}
        is_search = self.run_dir is not None
        return shlex.join([*arguments, "--resume"] if is_search and not resumes else arguments)


@contextmanager
def job_server(address: str | None) -> Iterator[Any]:
    """Yield a cluster's ``JobSubmissionClient``, and turn its errors into sentences.

    Args:
        address: URL of the cluster's dashboard. None: ``RAY_API_SERVER_ADDRESS``, else
            ``RAY_ADDRESS``, else port 8265 of this machine.

    Raises:
        RuntimeError: no cluster answers there, it expects another token, or it refuses a request.
    """
    with _client_environment(address):
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield _connect(address)
        except AuthenticationError as error:
            raise RuntimeError(_UNAUTHORISED) from error
        except requests.exceptions.ConnectionError as error:
            reason = "the cluster no longer answers"
            raise RuntimeError(_UNREACHABLE.format(reason=reason)) from error
        except RuntimeError as error:
            if not str(error).startswith("Request failed"):
                raise
            # The last line is the error, the lines above it are the server's traceback.
            reason = str(error).strip().rstrip(".").splitlines()[-1]
            raise RuntimeError(f"the cluster refused: {reason}") from error


def _connect(address: str | None) -> Any:
    from ray.job_submission import JobSubmissionClient

    if address is None and not os.environ.keys() & {_SERVER, "RAY_ADDRESS"}:
        address = DEFAULT_ADDRESS
    try:
        return JobSubmissionClient(address)
    except ConnectionError as error:
        reason = f"no cluster answers ({str(error).rstrip('.')})"
        raise RuntimeError(_UNREACHABLE.format(reason=reason)) from error


@contextmanager
def _client_environment(address: str | None) -> Iterator[None]:
    """Set the environment and the log levels of Ray's client; restore both afterwards.

    Ray's client prefers RAY_API_SERVER_ADDRESS to its own argument, but a flag should take
    precedence over the environment. Ray reads RAY_AUTH_MODE when it is imported.
    """
    before = {name: os.environ.get(name) for name in (_SERVER, _AUTH_MODE)}
    # We report uploads and connections ourselves.
    loggers = [
        logging.getLogger(f"ray.dashboard.modules.{module}")
        for module in ("dashboard_sdk", "job.sdk")
    ]
    levels = [logger.level for logger in loggers]
    if address is not None:
        os.environ[_SERVER] = address
    if _has_token():
        os.environ.setdefault(_AUTH_MODE, "token")
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _has_token() -> bool:
    """Whether this machine has a token for clusters."""
    return bool(os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}) or (
        (Path.home() / ".ray" / "auth_token").is_file()
    )


_UNREACHABLE = (
    "{reason}; expected the dashboard of a running Ray cluster: give --address http://HEAD:8265, "
    "or forward its port to this machine"
)
_UNAUTHORISED = (
    "the cluster wants its token, and there is none here or another one: copy the cluster's "
    "~/.ray/auth_token (made there by `ray get-auth-token --generate`) to this machine, or put it "
    "into RAY_AUTH_TOKEN, and set RAY_AUTH_MODE=token"
)


def search_jobs(client: Any) -> list[SearchJob]:
    """Return all searches' jobs that the cluster knows, in the order of their start."""
    known = [job for job in client.list_jobs() if "fppmo_search" in (job.metadata or {})]
    return [SearchJob.of(job) for job in sorted(known, key=lambda job: job.start_time or 0)]


def find_job(client: Any, name: str) -> SearchJob:
    """Return the latest job of a search.

    Args:
        client: A ``JobSubmissionClient``.
        name: The search's id, or Ray's id of one of its jobs.

    Raises:
        ValueError: the cluster knows no such search.
    """
    for job in reversed(search_jobs(client)):
        if name in (job.search_id, job.submission_id):
            return job
    raise ValueError(
        f"{client.get_address()} knows no search {name}; `fppmo-ray list` shows those it knows, "
        "with the same --address"
    )


def follow_log(client: Any, job: SearchJob, show: Callable[[str], None]) -> SearchJob:
    """Show a job's log as it grows, until the job has ended.

    Args:
        client: A ``JobSubmissionClient``.
        job: The job to follow.
        show: Called with each new part of the log.

    Returns:
        The job in its final state.
    """

    async def tail() -> None:
        async for lines in client.tail_job_logs(job.submission_id):
            show(lines)

    asyncio.run(tail())
    return wait_for_end(client, job)


def stop_job(client: Any, job: SearchJob) -> SearchJob:
    """Ask a job to end after the scores that are running, and wait until it has ended.

    Args:
        client: A ``JobSubmissionClient``.
        job: The job to stop.

    Returns:
        The job in its final state.
    """
    client.stop_job(job.submission_id)
    return wait_for_end(client, job)


def wait_for_end(client: Any, job: SearchJob) -> SearchJob:
    """Wait until a job's driver has exited, and return the job in its final state.

    Args:
        client: A ``JobSubmissionClient``.
        job: The job to wait for.
    """
    while not job.has_ended:
        time.sleep(_POLL_S)
        job = SearchJob.of(client.get_job_info(job.submission_id))
    return job
