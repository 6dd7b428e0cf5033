"""The Slurm script on a pretended Slurm: ``srun`` and ``ray`` only pass on what they get."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
from pathlib import Path

import pytest
from manifests import CLUSTER, unknown_ray_options

SCRIPT = CLUSTER / "slurm.sh"

# The driver says what it was given and waits for the signal that stops it, as a search does.
_DRIVER = """
import os, signal, sys, time
def stop(*_):
    os.write(1, b"stopped\\n")  # print is not reentrant
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
print("driver", os.environ["RAY_ADDRESS"], *sys.argv[1:], flush=True)
while "--endless" in sys.argv:
    time.sleep(0.01)
"""
_COMMANDS = {
    "srun": 'shift; exec "$@"',
    "ray": """
        if [[ $1 == get-auth-token ]]; then
            mkdir --parents ~/.ray; echo secret >>~/.ray/auth_token
            stat --format=%a ~/.ray/auth_token >~/first-mode; exit
        fi
        until [[ $1 == -- ]]; do shift; done; "${@:2}"
    """,
    "scontrol": 'echo "scontrol $*"',
    "hostname": "echo node1",
}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A PATH on which Slurm and Ray are pretended."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, command in _COMMANDS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{command}\n")
        (folder / name).chmod(0o755)
    (tmp_path / "job.py").write_text(_DRIVER)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    slurm = {"SLURM_CPUS_PER_TASK": "4", "SLURM_JOB_ID": "7"}
    return {"PATH": path, "HOME": str(tmp_path), "TMPDIR": str(tmp_path), **slurm}


def start(environment: dict[str, str], *flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", SCRIPT, Path(environment["TMPDIR"]) / "job.py", *flags],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def interrupt(script: subprocess.Popen[str], number: int) -> tuple[int, list[str]]:
    """Signal the script alone, once its driver runs; its status and what it printed after."""
    assert script.stdout is not None
    assert script.stdout.readline().startswith("driver ")
    script.send_signal(number)
    output, _ = script.communicate(timeout=20)
    return script.returncode, output.splitlines()


def test_the_script_is_bash_and_gives_ray_options_that_it_has() -> None:
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0
    assert os.access(SCRIPT, os.X_OK)
    code = [line for line in SCRIPT.read_text().splitlines() if not line.lstrip().startswith("#")]
    [command] = [line for line in code if "ray symmetric-run" in line]
    assert unknown_ray_options(command.strip(" \\")) == []
    assert unknown_ray_options(command.replace("--num-cpus", "--num-cpu").strip(" \\"))


def test_the_driver_joins_the_jobs_cluster_and_goes_on_with_what_is_there(
    environment: dict[str, str],
) -> None:
    script = start(environment, "--run-dir", "/shared/a run")
    output, _ = script.communicate(timeout=20)
    assert script.returncode == 0
    assert output == "driver node1:6379 --run-dir /shared/a run --resume-or-start\n"


@pytest.mark.parametrize("was_there", [False, True])
def test_nobody_else_can_read_the_token_at_any_moment(
    environment: dict[str, str], was_there: bool
) -> None:
    token = Path(environment["HOME"]) / ".ray" / "auth_token"
    if was_there:
        token.parent.mkdir()
        token.write_text("secret")
        token.chmod(0o644)
    start(environment).communicate(timeout=20)
    assert stat.filemode(token.stat().st_mode) == "-rw-------"
    if not was_there:
        assert (token.parent.parent / "first-mode").read_text() == "600\n"


def test_before_the_time_is_up_the_driver_stops_and_the_job_is_requeued(
    environment: dict[str, str],
) -> None:
    status, lines = interrupt(start(environment, "--endless"), signal.SIGUSR1)
    assert lines == ["stopped", "scontrol requeue 7"]
    assert status == 143


def test_a_cancelled_job_stops_its_driver_and_is_not_requeued(environment: dict[str, str]) -> None:
    status, lines = interrupt(start(environment, "--endless"), signal.SIGTERM)
    assert lines == ["stopped"]
    assert status == 143


def test_a_job_that_fails_is_not_requeued(environment: dict[str, str]) -> None:
    Path(environment["TMPDIR"], "job.py").write_text("raise SystemExit('error: no data')")
    script = start(environment)
    output, _ = script.communicate(timeout=20)
    assert (script.returncode, output) == (1, "error: no data\n")


def test_a_script_without_a_job_says_how_it_is_used(environment: dict[str, str]) -> None:
    done = subprocess.run(["bash", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: sbatch cluster/slurm.sh JOB.py")
