"""A search as a submitted Ray job: what is sent, and by what name it is found again."""

from __future__ import annotations

import logging
import os
import shlex
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fppmo_ray.service.job_client.project_archive import pack
from fppmo_ray.service.job_client.search_jobs import SearchJob, search_jobs
from fppmo_ray.service.record.storage import local_folder, location_of, shows_credentials

logger = logging.getLogger(__name__)

_SEARCH_ID = "FPPMO_SEARCH_ID"
_STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"  # read by Ray's job supervisor, whose default is 3 s


def search_id() -> str:
    """The id that a submission gave to the search of this process; a new one without."""
    return os.environ.get(_SEARCH_ID) or uuid.uuid4().hex[:12]


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A job file of the project, with the flags that are its own."""

    folder: Path
    """The project: the job's working directory is a copy of it."""
    job: str
    """The job file, relative to the folder."""
    flags: tuple[str, ...] = ()
    stop_wait: int = 600
    """Seconds that ``stop`` grants the scores that are running."""

    def __post_init__(self) -> None:
        is_below = not Path(self.job).is_absolute() and ".." not in Path(self.job).parts
        if not is_below or not (self.folder / self.job).is_file():
            raise ValueError(
                f"expected a job file below {self.folder}, the folder that is sent to the cluster, "
                f"got {self.job}; call it from your project's folder"
            )
        if self.stop_wait < 1:
            raise ValueError(f"stop_wait must be >= 1 s, got {self.stop_wait}")
        if self._run_dir is not None:
            require_lasting(self._run_dir)
            _require_no_credentials(self._run_dir)

    @property
    def entrypoint(self) -> str:
        """The command that the cluster runs."""
        return shlex.join(["python", self.job, *self.flags])

    @property
    def _run_dir(self) -> str | None:
        return _value_of("--run-dir", self.flags)

    @property
    def run_dir(self) -> str | None:
        """The run directory, where the flags name one; of a URI no password and no options."""
        return None if self._run_dir is None else location_of(self._run_dir)

    @property
    def may_resume(self) -> bool:
        """Whether the job may go on with a search."""
        return bool({"--resume", "--resume-or-start", "--resume_or_start"} & {*self.flags})


def send(client: Any, submission: Submission) -> SearchJob:
    """Send a job to a cluster and return without waiting for it.

    A resumed search keeps its id where an earlier job of the cluster has the same run directory.

    Args:
        client: A ``JobSubmissionClient``.
        submission: What to run.

    Raises:
        ValueError: the project is too large, or git ignores the job file.
        RuntimeError: the cluster refuses the job.
    """
    search, name = _name(submission, search_jobs(client))
    with tempfile.TemporaryDirectory() as scratch:
        archive = pack(submission.folder, Path(scratch) / "project.zip")
        if submission.job not in archive.files:
            raise ValueError(f"{submission.job} is not sent to the cluster: git ignores it")
        logger.info(
            "sending %s: %d files, %.1f MB packed",
            submission.folder,
            len(archive.files),
            archive.num_bytes / 1e6,
        )
        client.submit_job(
            entrypoint=submission.entrypoint,
            submission_id=name,
            metadata=_metadata(submission, search),
            runtime_env={
                "working_dir": str(archive.path),
                "env_vars": _environment(submission, search),
            },
            entrypoint_num_cpus=0,  # a full cluster would never start a driver that asks for one
        )
    return SearchJob.of(client.get_job_info(name))


def _environment(submission: Submission, search: str) -> dict[str, str]:
    """Of the driver and its workers.

    With an uploaded folder, Ray 2.60 puts that on the workers' path but not the job file's own, in
    which the job's modules may lie. Processes start in the uploaded one.
    """
    own = Path(submission.job).parent
    beside = {} if own == Path() else {"PYTHONPATH": str(own)}
    return {_SEARCH_ID: search, _STOP_WAIT: str(submission.stop_wait), **beside}


def _name(submission: Submission, jobs: Sequence[SearchJob]) -> tuple[str, str]:
    """Search id and submission id."""
    earlier = [
        job
        for job in jobs
        if submission.may_resume and job.run_dir is not None and job.run_dir == submission.run_dir
    ]
    if not earlier:
        new = uuid.uuid4().hex[:12]
        return new, f"fppmo-{new}"
    search = earlier[-1].search_id
    count = sum(job.search_id == search for job in jobs)
    return search, f"fppmo-{search}-{count + 1}"


def _metadata(submission: Submission, search: str) -> dict[str, str]:
    metadata = {
        "fppmo_search": search,
        "fppmo_job": submission.job,
        "fppmo_version": version("fppmo-ray"),
    }
    if submission.run_dir is not None:
        metadata["fppmo_run_dir"] = submission.run_dir
    return metadata


def require_lasting(run_dir: str | Path) -> None:
    """Refuse a relative run directory of a submitted job; a URI always lasts.

    Raises:
        ValueError: the directory would be deleted with the job's working directory.
    """
    folder = local_folder(run_dir)
    if folder is not None and not folder.is_absolute():
        raise ValueError(
            f"run directory {run_dir} is relative: in a submitted job it would lie in the job's "
            "working directory, which Ray deletes; give an absolute path on storage that lasts "
            "where the cluster's head sees it, or a URI such as s3://BUCKET/PATH"
        )


def _require_no_credentials(run_dir: str) -> None:
    if shows_credentials(run_dir):
        raise ValueError(
            f"run directory {location_of(run_dir)} came with credentials, which everyone who sees "
            "the cluster's jobs could read; leave them out and give the cluster's head a role, or "
            "environment variables such as AWS_ACCESS_KEY_ID"
        )


def _value_of(flag: str, flags: Sequence[str]) -> str | None:
    spellings = {flag, flag[:2] + flag[2:].replace("-", "_")}
    for index, item in enumerate(flags):
        name, equals, value = item.partition("=")
        if name in spellings:
            return value if equals else next(iter(flags[index + 1 :]), None)
    return None
