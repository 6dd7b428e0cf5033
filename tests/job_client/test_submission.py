"""What a submission sends, and what it refuses to send."""

from __future__ import annotations

import os
import subprocess
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zipfile import ZipFile

import pytest

from fppmo_ray.job_client import archive as project_archive
from fppmo_ray.job_client import search_jobs as search_jobs_module
from fppmo_ray.job_client.archive import pack, project_files
from fppmo_ray.job_client.search_jobs import SearchJob, find_job, job_server, search_jobs
from fppmo_ray.job_client.submission import Submission, send


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    write(
        tmp_path,
        *("jobs/digits.py", "weights.pt", "package/checkpoints/__init__.py", "kv_cache/x.py"),
        *("env/pyvenv.cfg", "env/bin/python", ".venv/bin/python", "jobs/__pycache__/digits.pyc"),
        *("runs/a/journal.jsonl", "runs/a/network.pt", "checkpoints/epoch3.pt", ".mypy_cache/x"),
        *("name.egg-info/PKG-INFO", "data/images.parquet", "submodule/model.py"),
    )
    return tmp_path


def test_run_directories_environments_caches_and_checkpoints_stay_here(project: Path) -> None:
    assert list(project_files(project).sent) == [
        "data/images.parquet",
        "jobs/digits.py",
        "kv_cache/x.py",
        "package/checkpoints/__init__.py",
        "submodule/model.py",
        "weights.pt",
    ]


def test_what_git_ignores_stays_here_and_what_is_new_goes(project: Path) -> None:
    write(project, "new.py")
    (project / ".gitignore").write_text("data/\n*.pt\n")
    subprocess.run(["git", "init", "-q", project], check=True)
    subprocess.run(["git", "init", "-q", project / "submodule"], check=True)
    assert list(project_files(project).sent) == [
        ".gitignore",
        "jobs/digits.py",
        "kv_cache/x.py",
        "new.py",
        "package/checkpoints/__init__.py",
        "submodule/model.py",
    ]


def test_the_archive_holds_the_files_as_they_are_and_says_its_size(
    project: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    target = tmp_path_factory.mktemp("scratch") / "project.zip"
    archive = pack(project, target)
    assert archive.num_bytes == target.stat().st_size
    with ZipFile(target) as packed:
        assert packed.namelist() == list(project_files(project).sent)
        assert packed.read("jobs/digits.py") == b"jobs/digits.py"


def test_a_project_beyond_rays_limit_is_refused_by_name_of_its_largest_files(
    project: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(project_archive, "LIMIT_BYTES", 2 * 1024**2)
    (project / "data/images.parquet").write_bytes(bytes(range(256)) * 4 * 10**4)
    (project / "weights.pt").write_bytes(os.urandom(3_000_000))
    with pytest.raises(ValueError, match=r"more than the 2 MiB .* data/images.parquet \(10 MB\)"):
        pack(project, tmp_path_factory.mktemp("scratch") / "project.zip")


def test_the_entrypoint_is_quoted_for_the_shell(project: Path) -> None:
    flags = ("--run-dir", "/shared/my run", "--note", "a;b $c")
    submission = Submission(folder=project, job="jobs/digits.py", flags=flags)
    assert submission.entrypoint == (
        "python jobs/digits.py --run-dir '/shared/my run' --note 'a;b $c'"
    )


@pytest.mark.parametrize(
    "flags", [("--run-dir", "runs/a"), ("--run-dir=runs/a",), ("--run_dir", "runs/a")]
)
def test_a_relative_run_directory_is_refused_before_anything_is_sent(
    project: Path, flags: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError, match="run directory runs/a is relative"):
        Submission(folder=project, job="jobs/digits.py", flags=flags)


def test_absolute_run_directories_and_uris_are_taken(project: Path) -> None:
    for run_dir in ("/shared/run", "s3://bucket/run"):
        flags = ("--seed", "1", f"--run-dir={run_dir}")
        submission = Submission(folder=project, job="jobs/digits.py", flags=flags)
        assert submission.run_dir == run_dir
    assert Submission(folder=project, job="jobs/digits.py").run_dir is None


def test_the_run_directory_is_shown_without_its_options(project: Path) -> None:
    flags = ("--run-dir", "s3://bucket/run?endpoint_override=http://host:9000")
    submission = Submission(folder=project, job="jobs/digits.py", flags=flags)
    assert submission.run_dir == "s3://bucket/run"


@pytest.mark.parametrize(
    ("flags", "run_dir", "resuming"),
    [
        ("--run-dir '/my run'", "/my run", "--run-dir '/my run' --resume"),
        ("--run-dir /run --resume", "/run", "--run-dir /run --resume"),
        ("--resume-or-start --run-dir /run", "/run", "--resume-or-start --run-dir /run"),
        ("--results /results", None, "--results /results"),
    ],
)
def test_a_stopped_job_says_the_arguments_that_go_on_with_it(
    flags: str, run_dir: str | None, resuming: str
) -> None:
    job = SearchJob(
        search_id="c0ffee",
        submission_id="fppmo-c0ffee",
        job="jobs/digits.py",
        state="STOPPED",
        entrypoint=f"python jobs/digits.py {flags}",
        run_dir=run_dir,
    )
    assert job.resume_arguments == f"jobs/digits.py {resuming}"


class PretendServer:
    """A job server that runs nothing: what Ray's client would be told, and answers."""

    def __init__(self) -> None:
        self.jobs: list[SimpleNamespace] = [SimpleNamespace(metadata=None, submission_id="other")]

    def list_jobs(self) -> list[SimpleNamespace]:
        return self.jobs

    def get_job_info(self, submission_id: str) -> SimpleNamespace:
        return next(job for job in self.jobs if job.submission_id == submission_id)

    def get_address(self) -> str:
        return "http://head:8265"

    def submit_job(self, **job: Any) -> None:
        assert Path(job["runtime_env"]["working_dir"]).is_file()
        state = SimpleNamespace(value="PENDING")
        self.jobs.append(SimpleNamespace(**job, start_time=len(self.jobs), status=state))


def test_a_job_is_sent_with_its_id_its_time_to_end_and_no_claim_on_cpus(project: Path) -> None:
    server = PretendServer()
    flags = ("--run-dir", "/shared/a")
    job = send(server, Submission(folder=project, job="jobs/digits.py", flags=flags, stop_wait=90))
    sent = server.jobs[-1]
    assert sent.submission_id == f"fppmo-{job.search_id}"
    assert sent.entrypoint == "python jobs/digits.py --run-dir /shared/a"
    assert sent.entrypoint_num_cpus == 0
    assert sent.runtime_env["env_vars"] == {
        "FPPMO_SEARCH_ID": job.search_id,
        "FPPMO_RUN_DIR": "/shared/a",
        "RAY_JOB_STOP_WAIT_TIME_S": "90",
        "PYTHONPATH": "jobs",  # where modules of the job may lie
    }
    assert sent.metadata == {
        "fppmo_search": job.search_id,
        "fppmo_job": "jobs/digits.py",
        "fppmo_version": version("fppmo-ray"),
        "fppmo_run_dir": "/shared/a",
    }


def test_a_resumed_search_keeps_its_id_and_any_other_gets_a_new_one(project: Path) -> None:
    server = PretendServer()

    def submit(*flags: str) -> SearchJob:
        return send(server, Submission(folder=project, job="jobs/digits.py", flags=flags))

    first = submit("--run-dir", "/shared/a")
    again = submit("--run-dir", "/shared/a", "--resume")
    assert again.search_id == first.search_id
    assert again.submission_id == f"fppmo-{first.search_id}-2"
    others = [
        submit("--run-dir", "/shared/a"),
        submit("--run-dir", "/shared/b", "--resume"),
        submit("--resume"),
    ]
    assert len({first.search_id, *(job.search_id for job in others)}) == 4
    assert [job.submission_id for job in search_jobs(server)][:2] == [
        first.submission_id,
        again.submission_id,
    ]
    assert find_job(server, first.submission_id) == first
    with pytest.raises(ValueError, match="http://head:8265 knows no search c0ffee"):
        find_job(server, "c0ffee")


def test_a_job_file_that_git_ignores_is_refused(project: Path) -> None:
    (project / ".gitignore").write_text("jobs/\n")
    subprocess.run(["git", "init", "-q", project], check=True)
    with pytest.raises(
        ValueError, match=r"jobs/digits.py is not sent .* git or .rayignore ignores it"
    ):
        send(PretendServer(), Submission(folder=project, job="jobs/digits.py"))


def test_a_clusters_refusal_is_a_sentence_without_its_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(search_jobs_module, "_connect", lambda address: PretendServer())
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    answer = "Request failed with status code 500: Traceback (...)\n  line\nValueError: no agent\n."
    with pytest.raises(RuntimeError, match=r"^the cluster refused: ValueError: no agent$"):
        with job_server(None):
            raise RuntimeError(answer)


@pytest.mark.parametrize(
    "flags",
    [
        ("--run-dir", "s3://USER:WORD@bucket/run"),
        ("--run-dir=s3://bucket/run?secret_key=WORD",),
        ("--data", "abfs://c:WORD@a.example/data"),
        ("--weights=s3://bucket/w?endpoint_override=http://USER:WORD@host",),
    ],
)
def test_credentials_in_flags_are_refused_and_not_repeated(
    project: Path, flags: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError, match="came with credentials") as refusal:
        Submission(folder=project, job="jobs/digits.py", flags=flags)
    assert "WORD" not in str(refusal.value)


def test_a_container_of_azure_is_no_credential(project: Path) -> None:
    run_dir = "abfs://container@account.dfs.core.windows.net/run"
    submission = Submission(folder=project, job="jobs/digits.py", flags=("--run-dir", run_dir))
    assert submission.run_dir == run_dir
