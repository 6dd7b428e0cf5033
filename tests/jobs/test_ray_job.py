"""Searches as submitted Ray jobs on a cluster of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from ray_head import SCRIPTS, Head, num_scored, wait_until

from fppmo_ray.distribution import Feedback, Proposal
from fppmo_ray.service.journal.fact_lines import fact_to_json
from fppmo_ray.service.journal.facts import Chosen, Finished, Started
from fppmo_ray.service.journal.run_directory import read_journal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_ray_job_submit_searches_to_its_end_and_refuses_a_directory_that_would_be_deleted(
    head: Head, tmp_path: Path
) -> None:
    def submit(*flags: str) -> tuple[int, str]:
        ray = (SCRIPTS / "ray", "job", "submit", "--address", head.address, "--working-dir", ".")
        done = head.run(*ray, "--", sys.executable, "jobs/digits.py", *flags)
        return done.returncode, done.stdout + done.stderr

    run_dir = tmp_path / "run"
    code, output = submit("--run-dir", str(run_dir), "--proposals", "32")
    assert code == 0, output
    assert "FPPMO" in output
    facts = read_journal(run_dir)
    assert num_scored(run_dir) == 32
    assert isinstance(facts[-1], Finished)
    code, output = submit("--run-dir", "runs/lost")
    assert code == 1
    assert "run directory runs/lost is relative" in output


def trajectory(run_dir: Path) -> list[object]:
    """All that seed, settings and scores decide."""
    facts = read_journal(run_dir)
    decided = [fact_to_json(fact) for fact in facts if isinstance(fact, Proposal | Chosen)]
    scored = {
        fact.proposal_id: (fact.val_loss, fact.val_accuracy)
        for fact in facts
        if isinstance(fact, Feedback)
    }
    return [dict(sorted(scored.items())), *decided]


def test_a_stopped_search_is_resumed_to_the_end_of_an_undisturbed_one(
    head: Head, tmp_path: Path
) -> None:
    stopped, undisturbed = tmp_path / "stopped", tmp_path / "undisturbed"
    search = head.submit("jobs/digits.py", "--run-dir", stopped, "--proposals", "160")
    wait_until(lambda: num_scored(stopped) >= 8, "some scores")
    done = head.fppmo_ray("stop", search)
    assert done.returncode == 0, done.stderr
    assert f"search {search}  STOPPED" in done.stdout
    resume = f"jobs/digits.py --run-dir {stopped} --proposals 160 --resume"
    assert f"fppmo-ray submit {resume} --address {head.address}" in done.stdout
    assert 8 <= num_scored(stopped) < 160
    sentence = f"{num_scored(stopped)} of 160 proposals are scored; go on with --resume"
    assert sentence in head.fppmo_ray("status", search).stdout
    assert "has ended already: STOPPED" in head.fppmo_ray("stop", search).stderr

    done = head.fppmo_ray("submit", *resume.split(), "--follow")
    assert done.returncode == 0, done.stderr
    assert f"search {search}" in done.stdout  # the search keeps its id
    assert "resumed with" in done.stdout
    [started] = [fact for fact in read_journal(stopped) if isinstance(fact, Started)]
    assert started.search_id == search

    flags = ("--run-dir", undisturbed, "--proposals", "160")
    assert head.fppmo_ray("submit", "jobs/digits.py", *flags, "--follow").returncode == 0
    assert trajectory(stopped) == trajectory(undisturbed)


def test_a_running_search_is_listed_and_its_log_is_shown(head: Head, tmp_path: Path) -> None:
    search = head.submit("jobs/digits.py", "--run-dir", tmp_path / "run", "--proposals", "1600")
    wait_until(lambda: num_scored(tmp_path / "run") >= 16, "a generation")
    [row] = [line for line in head.fppmo_ray("list").stdout.splitlines() if search in line]
    for part in ("jobs/digits.py", "RUNNING", str(tmp_path / "run")):
        assert part in row
    assert f"search {search}  RUNNING" in head.fppmo_ray("status", search).stdout
    log = head.fppmo_ray("logs", search).stdout
    assert "baseline  epoch 11" in log
    assert "generation 0" in log
    assert "workers 2 of 2" in log
    head.fppmo_ray("stop", search)


@pytest.fixture
def patient_project(tmp_path: Path) -> Path:
    """A project whose job takes longer to end than Ray grants by default (3 s)."""
    (tmp_path / "job.py").write_text(
        "import signal, sys, time\n"
        "def end(number, frame):\n"
        "    time.sleep(6)\n"
        "    sys.exit('ended by itself')\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "print('begun', *sys.argv[1:], flush=True)\n"
        "time.sleep(600)\n"
    )
    return tmp_path


@pytest.mark.parametrize(("flags", "ends_itself"), [((), True), (("--stop-wait", "1"), False)])
def test_a_stopped_driver_has_the_time_that_was_set_at_submission(
    head: Head, patient_project: Path, flags: tuple[str, ...], ends_itself: bool
) -> None:
    search = head.submit("job.py", "--note", "a b;c", *flags, cwd=patient_project)
    wait_until(lambda: "begun --note a b;c" in head.fppmo_ray("logs", search).stdout, "the job")
    assert "STOPPED" in head.fppmo_ray("stop", search).stdout
    assert ("ended by itself" in head.fppmo_ray("logs", search).stdout) == ends_itself


def test_a_failing_job_ends_the_command_that_follows_it_with_a_sentence(
    head: Head, tmp_path: Path
) -> None:
    (tmp_path / "job.py").write_text("raise SystemExit('no data here')")
    done = head.fppmo_ray("submit", "job.py", "--follow", cwd=tmp_path)
    assert done.returncode == 1
    assert "no data here" in done.stdout
    assert done.stderr.splitlines()[-1].endswith("ended as FAILED")


def test_without_the_clusters_token_nothing_is_told_but_how_to_get_it(
    head: Head, tmp_path: Path
) -> None:
    for mode, token in (("disabled", head.token), ("token", "0" * 64)):
        done = head.fppmo_ray("list", RAY_AUTH_MODE=mode, RAY_AUTH_TOKEN=token)
        assert done.returncode == 1
        assert done.stdout == ""
        assert "error: the cluster wants its token" in done.stderr
        assert "ray get-auth-token --generate" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_token_is_used_where_one_is_found(head: Head, tmp_path: Path) -> None:
    path = tmp_path / "home" / ".ray" / "auth_token"
    path.parent.mkdir(parents=True)
    path.write_text(head.token)
    unset = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}
    shell = {name: value for name, value in head.environment.items() if name not in unset}
    for found in (
        {"RAY_AUTH_TOKEN": head.token},
        {"RAY_AUTH_TOKEN_PATH": str(path)},
        {"HOME": str(tmp_path / "home")},
    ):
        user = Head(head.address, head.metrics, head.token, shell | found)
        assert user.fppmo_ray("list").returncode == 0
    nobody = Head(head.address, head.metrics, head.token, shell | {"HOME": str(tmp_path)})
    assert "the cluster wants its token" in nobody.fppmo_ray("list").stderr


def test_an_unknown_search_is_refused_in_a_sentence(head: Head) -> None:
    for command in ("status", "logs", "stop"):
        done = head.fppmo_ray(command, "c0ffee")
        assert done.returncode == 1
        assert f"error: {head.address} knows no search c0ffee" in done.stderr
