"""Submission of a project's job file to a cluster, as a Ray job."""

from __future__ import annotations

import logging
import os
import shlex
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fppmo_ray.job_client.archive import pack
from fppmo_ray.job_client.search_jobs import SearchJob, search_jobs
from fppmo_ray.service.journal.storage import local_folder, location_of, require_no_credentials
from fppmo_ray.service.search_id import RUN_DIR, SEARCH_ID
from fppmo_ray.versions import package_version

logger = logging.getLogger(__name__)

_STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"  # read by Ray's job supervisor, whose default is 3 s


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A job file of a project, and the flags to call it with."""

    folder: Path
    """The project's folder. The job's working directory is a copy of it."""
    job: str
    """The job file, relative to the folder."""
    flags: tuple[str, ...] = ()
    """The job's own flags."""
    stop_wait: int = 600
    """Seconds that ``fppmo-ray stop`` grants running scores before it kills the driver, >= 1."""
    runtime_env: Mapping[str, Any] = field(default_factory=dict)
    """Ray's runtime environment of the driver and the workers, without ``working_dir``."""
    env_vars: Mapping[str, str] = field(default_factory=dict)
    """Further environment variables of the driver and the workers. Everyone who sees the cluster's
    jobs can read them."""

    def __post_init__(self) -> None:
        is_below = not Path(self.job).is_absolute() and ".." not in Path(self.job).parts
        if not is_below or not (self.folder / self.job).is_file():
            raise ValueError(
                f"expected a job file below {self.folder}, the folder that is sent to the cluster, "
                f"got {self.job}; call it from your project's folder"
            )
        if "working_dir" in self.runtime_env:
            raise ValueError(
                "the runtime environment must not have a working_dir: submit sends the project's "
                "folder; leave it out"
            )
        if self.stop_wait < 1:
            raise ValueError(f"stop_wait must be >= 1 s, got {self.stop_wait}")
        if self._run_dir is not None:
            require_lasting(self._run_dir)
        for flag in self.flags:
            for text in (flag, flag.partition("=")[2]):
                require_no_credentials(text)

    @property
    def entrypoint(self) -> str:
        """The command that the cluster runs."""
        return shlex.join(["python", self.job, *self.flags])

    @property
    def _run_dir(self) -> str | None:
        return _value_of("--run-dir", self.flags)

    @property
    def run_dir(self) -> str | None:
        """The run directory in the flags, without a URI's credentials and options, or None."""
        return None if self._run_dir is None else location_of(self._run_dir)

    @property
    def may_resume(self) -> bool:
        """Whether the job's flags allow it to resume a search."""
        return bool({"--resume", "--resume-or-start", "--resume_or_start"} & {*self.flags})


def environment_variables(items: Sequence[str]) -> dict[str, str]:
    """Return environment variables by name.

    Args:
        items: ``NAME=VALUE``, or ``NAME`` for the value that it has here.

    Raises:
        ValueError: a variable has no value here.
    """
    found = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals and name not in os.environ:
            raise ValueError(f"{name} is not set here; give {name}=VALUE, or set it first")
        found[name] = value if equals else os.environ[name]
    return found


def read_runtime_env(path: Path) -> dict[str, Any]:
    """Return Ray's runtime environment from a YAML or JSON file.

    Args:
        path: The file, with keys such as ``pip`` and ``env_vars``.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is neither YAML nor JSON: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} must hold a runtime environment such as {{pip: [timm]}}, got "
            f"{type(content).__name__}"
        )
    return content


def send(client: Any, submission: Submission) -> SearchJob:
    """Submit a job to a cluster, and return without waiting for it.

    A resumed search keeps its id if the cluster knows an earlier job with the same run directory.

    Args:
        client: A ``JobSubmissionClient``.
        submission: The job file, its flags and its folder.

    Returns:
        The job as the cluster lists it.

    Raises:
        ValueError: the project is too large, or git ignores the job file.
        RuntimeError: the cluster refuses the job.
    """
    search, name = _name(submission, search_jobs(client))
    with tempfile.TemporaryDirectory() as scratch:
        runtime_env = dict(submission.runtime_env)
        excludes = runtime_env.pop("excludes", ())
        archive = pack(submission.folder, Path(scratch) / "project.zip", excludes)
        if submission.job not in archive.files.sent:
            raise ValueError(
                f"{submission.job} is not sent to the cluster: git or .rayignore ignores it"
            )
        logger.info(
            "sending %s: %d files, %.1f MB packed",
            submission.folder,
            len(archive.files.sent),
            archive.num_bytes / 1e6,
        )
        if left := str(archive.files):
            logger.warning("left behind: %s", left)
        client.submit_job(
            entrypoint=submission.entrypoint,
            submission_id=name,
            metadata=_metadata(submission, search),
            runtime_env=runtime_env
            | {"working_dir": str(archive.path), "env_vars": _environment(submission, search)},
            entrypoint_num_cpus=0,  # a full cluster would never start a driver that asks for one
        )
    return SearchJob.of(client.get_job_info(name))


def _environment(submission: Submission, search: str) -> dict[str, str]:
    """Return the environment variables of the driver and its workers."""
    variables = {**submission.runtime_env.get("env_vars", {}), **submission.env_vars}
    variables |= {SEARCH_ID: search, _STOP_WAIT: str(submission.stop_wait)}
    if submission.run_dir is not None:
        variables[RUN_DIR] = submission.run_dir
    # Ray 2.60 adds the uploaded folder to the workers' path, but not the job file's own folder,
    # which may hold modules of the job. A relative path works: processes start in the upload.
    folder = Path(submission.job).parent
    if folder != Path():
        given = variables.get("PYTHONPATH")
        variables["PYTHONPATH"] = f"{folder}:{given}" if given else str(folder)
    return variables


def _name(submission: Submission, jobs: Sequence[SearchJob]) -> tuple[str, str]:
    """Return the search's id and Ray's id of the job."""
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
        "fppmo_version": package_version("fppmo-ray"),
    }
    if submission.run_dir is not None:
        metadata["fppmo_run_dir"] = submission.run_dir
    return metadata


def require_lasting(run_dir: str | Path) -> None:
    """Refuse a run directory that would not outlive a submitted job.

    Raises:
        ValueError: it is a relative folder, which Ray deletes with the job's working directory.
    """
    folder = local_folder(run_dir)
    if folder is not None and not folder.is_absolute():
        raise ValueError(
            f"run directory {run_dir} is relative: in a submitted job it would lie in the job's "
            "working directory, which Ray deletes; give an absolute path on storage that lasts "
            "where the cluster's head sees it, or a URI such as s3://BUCKET/PATH"
        )


def _value_of(flag: str, flags: Sequence[str]) -> str | None:
    spellings = {flag, flag[:2] + flag[2:].replace("-", "_")}
    for index, item in enumerate(flags):
        name, equals, value = item.partition("=")
        if name in spellings:
            return value if equals else next(iter(flags[index + 1 :]), None)
    return None
