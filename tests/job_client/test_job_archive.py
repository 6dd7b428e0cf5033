"""What of a project's folder is never sent to a cluster."""

from __future__ import annotations

import logging
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zipfile import ZipFile

import pytest

from fppmo_ray.job_client.archive import pack, project_files
from fppmo_ray.job_client.submission import (
    Submission,
    environment_variables,
    read_runtime_env,
    send,
)

SECRETS = (
    *(".env", ".env.local", "prod.env", "keys/server.pem", "keys/id_rsa", "keys/id_ed25519.pub"),
    *(".netrc", ".git-credentials", ".aws/credentials", ".aws/config", ".ssh/config"),
    *("application_default_credentials.json", "my-service-account-key.json", "client.p12"),
    *(".kube/config", ".pypirc", "ID_ECDSA", "Server.PEM"),
)
CODE = ("job.py", "id_mapping.py", "environment.py", "keys/monkey.py", "pem/reader.py")


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


@pytest.mark.parametrize("in_a_checkout", [False, True])
def test_files_that_may_hold_secrets_stay_here_and_are_named(
    tmp_path: Path, in_a_checkout: bool
) -> None:
    write(tmp_path, *SECRETS, *CODE)
    if in_a_checkout:  # git knows them all: somebody has committed them
        subprocess.run(["git", "init", "-q", tmp_path], check=True)
        subprocess.run(["git", "-C", tmp_path, "add", "-A"], check=True)
    files = project_files(tmp_path)
    assert files.sent == tuple(sorted(CODE))
    assert files.secrets == tuple(sorted(SECRETS))
    pack(tmp_path, tmp_path.parent / "project.zip")
    with ZipFile(tmp_path.parent / "project.zip") as packed:
        assert packed.namelist() == sorted(CODE)


def test_links_out_of_the_folder_stay_here_and_links_to_a_secret_in_it_too(tmp_path: Path) -> None:
    project, outside = tmp_path / "project", tmp_path / "outside"
    write(outside, "passwords.txt", "data/image.png")
    write(project, "job.py", ".env", "package/model.py")
    for name, target in {
        "notes.txt": outside / "passwords.txt",
        "data": outside / "data",
        "chained.txt": project / "notes.txt",
        "settings.txt": project / ".env",
        "model.py": project / "package/model.py",
        "dangling": outside / "none",
    }.items():
        (project / name).symlink_to(target)
    files = project_files(project)
    assert files.sent == ("job.py", "model.py", "package/model.py")
    assert files.outside == ("chained.txt", "dangling", "data", "notes.txt")
    assert files.secrets == (".env", "settings.txt")


def test_a_rayignore_counts_below_its_own_folder_as_git_would_read_it(tmp_path: Path) -> None:
    write(tmp_path, "job.py", "data/a.bin", "data/keep.bin", "big.bin", "sub/big.bin", "sub/x.log")
    write(tmp_path, "sub/deep/x.log", "x.log", "sub/videos/one.mp4")
    (tmp_path / ".rayignore").write_text("# large\n/big.bin\ndata/*\n!data/keep.bin\n")
    (tmp_path / "sub/.rayignore").write_text("*.log\nvideos/\n")
    files = project_files(tmp_path)
    assert files.sent == (
        *(".rayignore", "data/keep.bin", "job.py", "sub/.rayignore", "sub/big.bin", "x.log"),
    )
    assert files.ignored == ("big.bin", "data/a.bin", "sub/deep/x.log", "sub/videos", "sub/x.log")
    assert str(files) == (
        "big.bin, data/a.bin, sub/deep/x.log, sub/videos, sub/x.log (in .rayignore or excluded)"
    )
    assert project_files(tmp_path, excludes=["*.bin"]).sent == (
        *(".rayignore", "job.py", "sub/.rayignore", "x.log"),
    )


class Server:
    """Takes one job."""

    def __init__(self) -> None:
        self.job: Any = None

    def list_jobs(self) -> list[Any]:
        return []

    def get_job_info(self, _: str) -> Any:
        return self.job

    def submit_job(self, **job: Any) -> None:
        state = SimpleNamespace(value="PENDING")
        self.job = SimpleNamespace(**job, start_time=None, status=state)


def test_a_runtime_environment_travels_and_what_stays_behind_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "jobs/job.py", ".env", "large.bin")
    (tmp_path / "env.yaml").write_text(
        "pip: [timm]\nexcludes: [large.bin]\nenv_vars: {A: from file, B: from file}\n"
    )
    monkeypatch.setenv("HERE", "its value")
    submission = Submission(
        folder=tmp_path,
        job="jobs/job.py",
        runtime_env=read_runtime_env(tmp_path / "env.yaml"),
        env_vars=environment_variables(["B=x=y", "HERE", "PYTHONPATH=/more"]),
    )
    server = Server()
    with caplog.at_level(logging.WARNING):
        job = send(server, submission)
    sent = server.job.runtime_env
    assert sent["pip"] == ["timm"]
    assert "excludes" not in sent
    assert sent["env_vars"] == {
        **{"A": "from file", "B": "x=y", "HERE": "its value"},
        "FPPMO_SEARCH_ID": job.search_id,
        "RAY_JOB_STOP_WAIT_TIME_S": "600",
        "PYTHONPATH": "jobs:/more",
    }
    assert caplog.messages == [
        "left behind: .env (may hold secrets); large.bin (in .rayignore or excluded)"
    ]


def test_a_runtime_environment_that_is_none_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "job.py")
    (tmp_path / "list.yaml").write_text("[timm]")
    with pytest.raises(ValueError, match=r"must hold a runtime environment such as .* got list"):
        read_runtime_env(tmp_path / "list.yaml")
    (tmp_path / "broken.json").write_text('{"pip": [')
    with pytest.raises(ValueError, match=r"broken\.json is neither YAML nor JSON"):
        read_runtime_env(tmp_path / "broken.json")
    with pytest.raises(ValueError, match="must not have a working_dir: submit sends the project"):
        Submission(folder=tmp_path, job="job.py", runtime_env={"working_dir": "."})
    with pytest.raises(ValueError, match=r"NOT_SET_HERE is not set here; give NOT_SET_HERE=VALUE"):
        environment_variables(["NOT_SET_HERE"])
