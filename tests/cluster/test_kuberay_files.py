"""The KubeRay files, against the CRDs of the operator and what its fields mean."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from manifests import CLUSTER, constraints, documents, ray_options, violations

FILES = {"rayclusters": "raycluster.yaml", "rayjobs": "rayjob.yaml"}


def custom_resource(kind: str) -> Any:
    """The KubeRay document of a file, which begins with the head's service account."""
    account, resource = documents(CLUSTER / "kuberay" / FILES[kind])
    assert (account["kind"], account["metadata"]["name"]) == ("ServiceAccount", "fppmo-ray")
    return resource


@pytest.fixture
def cluster() -> Any:
    return custom_resource("rayclusters")["spec"]


def start_errors(cluster: Any) -> list[str]:
    """``rayStartParams`` that are no options of ``ray start``."""
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    given = {f"--{key}" for group in groups for key in group["rayStartParams"]}
    return sorted(given - ray_options("start"))


@pytest.mark.parametrize("kind", FILES)
def test_the_operators_schema_accepts_the_file(
    kind: str, kuberay_schema: Callable[[str], Any]
) -> None:
    assert violations(custom_resource(kind), kuberay_schema(kind)) == []


def test_a_misspelt_field_is_refused_at_any_depth(kuberay_schema: Callable[[str], Any]) -> None:
    schema, document = kuberay_schema("rayclusters"), custom_resource("rayclusters")
    container = document["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    container["securityContext"] = copy.deepcopy(container["securityContext"])
    container["securityContext"]["allowPrivilegeEscalations"] = False
    document["spec"]["enableInTreeAutoscalin"] = True
    document["spec"]["authOptions"]["mode"] = "tokens"
    container["resources"]["limits"]["memory"] = "8 gigabytes"
    errors = violations(document, schema)
    assert len(errors) == 4
    for part in ("'allowPrivilegeEscalations' was", "'enableInTreeAutoscalin' was", "'tokens'"):
        assert sum(part in error for error in errors) == 1


def test_start_parameters_are_options_of_ray_start(cluster: Any) -> None:
    assert start_errors(cluster) == []
    cluster["headGroupSpec"]["rayStartParams"]["num-cpu"] = "0"
    assert start_errors(cluster) == ["--num-cpu"]


def test_the_job_has_the_cluster_of_the_other_file(cluster: Any) -> None:
    assert custom_resource("rayjobs")["spec"]["rayClusterSpec"] == cluster


def test_all_pods_run_one_image_with_the_tested_ray(cluster: Any) -> None:
    assert cluster["rayVersion"] == constraints()["ray"]
    pods = [cluster["headGroupSpec"]["template"], cluster["workerGroupSpecs"][0]["template"]]
    containers = [
        container
        for pod in pods
        for container in pod["spec"]["containers"] + pod["spec"].get("initContainers", [])
    ]
    assert {item["image"] for item in containers} == {"registry.example.com/fppmo-ray:0.1.0"}


def test_scores_stay_away_from_the_head_and_gpu_workers_begin_at_none(cluster: Any) -> None:
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    [group] = cluster["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (0, 0, 8)
    [worker] = group["template"]["spec"]["containers"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_the_head_avoids_the_nodes_that_the_workers_look_for(cluster: Any) -> None:
    [avoided] = _node_terms(cluster["headGroupSpec"])
    sought = [term for [term] in _node_terms(cluster["workerGroupSpecs"][0])]
    assert all(term["operator"] == "NotIn" for term in avoided)
    assert all(term["operator"] == "In" for term in sought)
    assert [(t["key"], t["values"]) for t in avoided] == [(t["key"], t["values"]) for t in sought]


def _node_terms(group: Any) -> list[Any]:
    affinity = group["template"]["spec"]["affinity"]["nodeAffinity"]
    required = affinity["requiredDuringSchedulingIgnoredDuringExecution"]
    return [term["matchExpressions"] for term in required["nodeSelectorTerms"]]


def test_only_the_head_has_credentials_and_no_pod_runs_as_root(cluster: Any) -> None:
    assert cluster["authOptions"] == {"mode": "token"}
    head = cluster["headGroupSpec"]["template"]["spec"]
    worker = cluster["workerGroupSpecs"][0]["template"]["spec"]
    assert head["serviceAccountName"] == "fppmo-ray"
    assert worker["automountServiceAccountToken"] is False
    assert "serviceAccountName" not in worker
    assert "envFrom" not in worker["containers"][0]
    assert all(pod["securityContext"]["runAsNonRoot"] for pod in (head, worker))


def test_a_retry_goes_on_in_a_run_directory_outside_the_cluster() -> None:
    job = custom_resource("rayjobs")["spec"]
    assert job["backoffLimit"] > 0
    assert job["entrypointNumCpus"] == 0  # or a head without CPUs would never start it
    assert "--resume-or-start" in job["entrypoint"]
    assert "--run-dir s3://" in job["entrypoint"]


def test_the_head_fetches_a_folder_with_all_that_is_below_it(cluster: Any, tmp_path: Path) -> None:
    [fetch] = cluster["headGroupSpec"]["template"]["spec"]["initContainers"]
    python, *words, source, target = fetch["command"]
    assert (python, source, target) == ("python", "s3://BUCKET/data", "/home/ray/data")
    (tmp_path / "bucket" / "below").mkdir(parents=True)
    (tmp_path / "bucket" / "below" / "resnet56.th").write_text("weights")
    (tmp_path / "data").mkdir()
    folders = [(tmp_path / "bucket").as_uri(), str(tmp_path / "data")]
    subprocess.run([sys.executable, *words, *folders], check=True)
    assert (tmp_path / "data" / "below" / "resnet56.th").read_text() == "weights"
