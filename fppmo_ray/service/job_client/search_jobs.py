"""The searches that were submitted to a cluster: reach it, list, find, follow and stop them."""

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


@dataclass(frozen=True, kw_only=True)
class SearchJob:
    """One Ray job of a search. A resumed search has several."""

    search_id: str
    submission_id: str
    job: str
    """The job file."""
    state: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    entrypoint: str
    started: datetime | None = None
    run_dir: str | None = None

    @classmethod
    def of(cls, details: Any) -> SearchJob:
        """Read Ray's ``JobDetails`` of a job that ``send`` sent."""
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
        """Whether its driver is gone."""
        return self.state not in ("PENDING", "RUNNING")

    @property
    def resume_arguments(self) -> str:
        """The job file and its flags, quoted for a shell, that go on with the job.

        One without a run directory, such as a comparison, goes on by its own command.
        """
        _, *arguments = shlex.split(self.entrypoint)
        resumes = {"--resume", "--resume-or-start", "--resume_or_start"} & {*arguments}
        is_search = self.run_dir is not None
        return shlex.join([*arguments, "--resume"] if is_search and not resumes else arguments)


@contextmanager
def job_server(address: str | None) -> Iterator[Any]:
    """A cluster's ``JobSubmissionClient``; what goes wrong with it is said in a sentence.

    Args:
        address: Of the dashboard. None: what ``RAY_API_SERVER_ADDRESS`` or ``RAY_ADDRESS`` says,
            else this machine's usual one.

    Raises:
        RuntimeError: no cluster answers there, it wants another token, or refuses what is asked.
    """
    _use_token()
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield _connect(address)
    except AuthenticationError as error:
        raise RuntimeError(_UNAUTHORISED) from error
    except requests.exceptions.ConnectionError as error:
        raise RuntimeError(_UNREACHABLE.format(reason="the cluster no longer answers")) from error
    except RuntimeError as error:
        if not str(error).startswith("Request failed"):
            raise
        reason = str(error).strip().rstrip(".").splitlines()[-1]  # above is a remote traceback
        raise RuntimeError(f"the cluster refused: {reason}") from error


def _connect(address: str | None) -> Any:
    from ray.job_submission import JobSubmissionClient

    for module in ("dashboard_sdk", "job.sdk"):  # uploads and sockets are told by us
        logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)
    if address is not None:
        # Ray's client lets its environment overrule its argument; a flag should count for more.
        os.environ["RAY_API_SERVER_ADDRESS"] = address
    elif not os.environ.keys() & {"RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"}:
        address = DEFAULT_ADDRESS
    try:
        return JobSubmissionClient(address)
    except ConnectionError as error:
        reason = f"no cluster answers ({str(error).rstrip('.')})"
        raise RuntimeError(_UNREACHABLE.format(reason=reason)) from error


_UNREACHABLE = (
    "{reason}; expected the dashboard of a running Ray cluster: give --address http://HEAD:8265, "
    "or forward its port to this machine"
)
_UNAUTHORISED = (
    "the cluster wants its token, and there is none here or another one: copy the cluster's "
    "~/.ray/auth_token (made there by `ray get-auth-token --generate`) to this machine, or put it "
    "into RAY_AUTH_TOKEN, and set RAY_AUTH_MODE=token"
)


def _use_token() -> None:
    """Let Ray send the cluster's token where there is one; Ray looks when it is imported."""
    has_token = (
        os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
        or (Path.home() / ".ray" / "auth_token").is_file()
    )
    if has_token:
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def search_jobs(client: Any) -> list[SearchJob]:
    """All jobs of ours that the cluster has seen, in the order of their start."""
    known = [job for job in client.list_jobs() if "fppmo_search" in (job.metadata or {})]
    return [SearchJob.of(job) for job in sorted(known, key=lambda job: job.start_time or 0)]


def find_job(client: Any, name: str) -> SearchJob:
    """The latest job of a search, by the search's id or the job's own.

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
    """Show a job's log as it grows until the job ends, and say how it ended."""

    async def tail() -> None:
        async for lines in client.tail_job_logs(job.submission_id):
            show(lines)

    asyncio.run(tail())
    return wait_for_end(client, job)


def stop_job(client: Any, job: SearchJob) -> SearchJob:
    """Ask a job to end after what is running on its workers, and wait until it has."""
    client.stop_job(job.submission_id)
    return wait_for_end(client, job)


def wait_for_end(client: Any, job: SearchJob) -> SearchJob:
    """The job once its driver is gone."""
    while not job.has_ended:
        time.sleep(_POLL_S)
        job = SearchJob.of(client.get_job_info(job.submission_id))
    return job
