"""Every command line of the manifests and their README, as the job or ``ray`` would read it."""

from __future__ import annotations

import re
import shlex

import pytest
from job_files import job_words, parse_job, shell_commands
from manifests import CLUSTER, documents, unknown_ray_options

from fppmo_ray import Resources, SearchSettings

README = (CLUSTER / "README.md").read_text()
COMMANDS = [*shell_commands(README), *re.findall(r"`([a-z]+ [^`\n]*)`", README)]
WITH_JOBS = [command for command in COMMANDS if "jobs/" in command]


def entrypoint() -> list[str]:
    [_, resource] = documents(CLUSTER / "kuberay" / "rayjob.yaml")
    return shlex.split(resource["spec"]["entrypoint"])


def test_the_ray_jobs_entrypoint_is_a_command_line_of_the_job() -> None:
    arguments = parse_job(entrypoint())
    assert arguments["resume_or_start"] is True
    assert arguments["run_dir"] == "s3://BUCKET/runs/resnet56"
    assert arguments["resources"] == Resources(workers=8, gpus=1)
    assert isinstance(arguments["settings"], SearchSettings)


def test_a_flag_that_the_job_does_not_have_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_job([*entrypoint(), "--gpu-per-worker", "1"])
    assert "--gpu-per-worker" in capsys.readouterr().err


def test_the_workers_of_the_examples_are_those_of_the_clusters_and_never_idle() -> None:
    arguments = parse_job(entrypoint())
    assert arguments["resources"].workers == 8
    assert arguments["settings"].sampler.population >= 4 * arguments["resources"].workers
    for name in ("aws.yaml", "gcp.yaml"):
        [config] = documents(CLUSTER / name)
        assert config["max_workers"] == 8
    [_, resource] = documents(CLUSTER / "kuberay" / "raycluster.yaml")
    assert resource["spec"]["workerGroupSpecs"][0]["maxReplicas"] == 8


@pytest.mark.parametrize("command", WITH_JOBS)
def test_a_search_in_the_readme_is_a_command_line_of_its_job(command: str) -> None:
    arguments = parse_job(job_words(command))
    assert arguments["resources"].workers == 8
    assert re.match(r"/|s3://", arguments["run_dir"])


def test_the_readme_shows_all_three_ways_to_start_a_search() -> None:
    assert len(WITH_JOBS) == 3


def test_the_readmes_ray_commands_have_options_that_ray_has() -> None:
    with_ray = [
        command for command in COMMANDS if re.search(r"\bray (up|down|rsync|dash)", command)
    ]
    assert len(with_ray) >= 6
    assert [unknown_ray_options(command) for command in with_ray] == [[]] * len(with_ray)
