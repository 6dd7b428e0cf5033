"""The files of Ray's cluster launcher, against its schema and the clouds' own words."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from manifests import CLUSTER, constraints, documents, unknown_ray_options, violations

Config = dict[str, Any]

# Of Compute Engine's instances.insert, what the file may use.
_GCP_INSTANCE = {
    "type": "object",
    "required": ["machineType", "disks"],
    "properties": {
        "machineType": {"type": "string"},
        "disks": {
            "items": {
                "properties": {
                    "boot": {"type": "boolean"},
                    "autoDelete": {"const": True},
                    "type": {"enum": ["PERSISTENT", "SCRATCH"]},
                    "initializeParams": {
                        "properties": {
                            "diskSizeGb": {"type": "integer"},
                            "sourceImage": {"pattern": "^projects/.*/global/images/family/"},
                        }
                    },
                }
            }
        },
        "metadata": {
            "properties": {
                "items": {
                    "items": {
                        "properties": {"key": {"type": "string"}, "value": {"type": "string"}}
                    }
                }
            }
        },
        "scheduling": {
            "properties": {
                "provisioningModel": {"enum": ["SPOT", "STANDARD"]},
                "instanceTerminationAction": {"enum": ["DELETE", "STOP"]},
                "onHostMaintenance": {"enum": ["TERMINATE", "MIGRATE"]},
                "automaticRestart": {"type": "boolean"},
            }
        },
    },
}


@pytest.fixture(params=["aws", "gcp"])
def config(request: pytest.FixtureRequest) -> Config:
    [document] = documents(CLUSTER / f"{request.param}.yaml")
    return dict(document)


def schema() -> Any:
    specification = find_spec("ray")
    assert specification is not None
    assert specification.origin is not None
    path = Path(specification.origin).parent / "autoscaler" / "ray-schema.json"
    return json.loads(path.read_text())


def node_type_errors(config: Config) -> list[str]:
    """What the launcher's schema cannot see: names and sums."""
    types, head = config["available_node_types"], config["head_node_type"]
    if head not in types:
        return [f"head_node_type {head} is none of {sorted(types)}"]
    workers = {name: item for name, item in types.items() if name != head}
    errors = [
        f"{name}: min_workers above max_workers"
        for name, item in workers.items()
        if item["min_workers"] > item["max_workers"]
    ]
    if sum(item["max_workers"] for item in workers.values()) != config["max_workers"]:
        errors.append("max_workers is not the sum of the worker types' max_workers")
    return errors


def node_config_errors(config: Config) -> list[str]:
    """What the cloud would refuse of the nodes' own settings."""
    check = _aws_errors if config["provider"]["type"] == "aws" else _gcp_errors
    return [
        error
        for item in config["available_node_types"].values()
        for error in check(item["node_config"])
    ]


def _aws_errors(node_config: Config) -> list[str]:
    """Against the parameters of EC2's RunInstances, as botocore knows them."""
    from botocore.validate import ParamValidator

    parameters = {"MinCount": 1, "MaxCount": 1, **node_config}
    report = ParamValidator().validate(parameters, _run_instances())
    return [report.generate_report()] if report.has_errors() else []


@functools.cache
def _run_instances() -> Any:
    import botocore.session

    model = botocore.session.get_session().get_service_model("ec2")
    return model.operation_model("RunInstances").input_shape


def _gcp_errors(node_config: Config) -> list[str]:
    return violations(node_config, _GCP_INSTANCE)


def option_errors(config: Config) -> list[str]:
    """Options of the commands that start Ray which Ray does not have."""
    commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    return [option for command in commands for option in unknown_ray_options(command)]


def test_the_launcher_and_the_cloud_accept_the_file(config: Config) -> None:
    assert violations(config, schema()) == []
    assert node_type_errors(config) == []
    assert node_config_errors(config) == []
    assert option_errors(config) == []


def _put(*path: str | int) -> Callable[[Config], None]:
    """Rename the entry at the path, by one letter more."""

    def change(config: Config) -> None:
        *parents, last = path
        place: Any = config
        for key in parents:
            place = place[key]
        place[f"{last}s"] = place.pop(last)

    return change


@pytest.mark.parametrize(
    "change",
    [
        _put("idle_timeout_minutes"),
        _put("provider", "region"),
        _put("docker", "container_name"),
        _put("auth", "ssh_user"),
        _put("available_node_types", "spot", "min_workers"),
    ],
)
def test_a_misspelt_setting_is_refused(config: Config, change: Callable[[Config], None]) -> None:
    change(config)
    assert violations(config, schema())


def test_a_head_node_type_that_does_not_exist_is_refused(config: Config) -> None:
    config["head_node_type"] = "heads"
    assert node_type_errors(config) == [
        "head_node_type heads is none of ['head', 'on_demand', 'spot']"
    ]


def test_more_workers_than_their_types_allow_are_refused(config: Config) -> None:
    config["max_workers"] += 1
    assert node_type_errors(config) == [
        "max_workers is not the sum of the worker types' max_workers"
    ]


def test_a_misspelt_setting_of_a_node_is_refused(config: Config) -> None:
    node = config["available_node_types"]["spot"]["node_config"]
    is_aws = config["provider"]["type"] == "aws"
    nested = node["InstanceMarketOptions"] if is_aws else node["scheduling"]
    nested["MarketTypes"] = "spot"
    [error] = node_config_errors(config)
    assert "MarketTypes" in error


def test_a_misspelt_option_of_ray_start_is_refused(config: Config) -> None:
    config["head_start_ray_commands"].append("ulimit -n 65536; ray start --head --dashbord-port=1")
    assert option_errors(config) == ["--dashbord-port"]


def test_scores_stay_away_from_the_head_and_workers_begin_at_none(config: Config) -> None:
    types = copy.deepcopy(config["available_node_types"])
    assert types.pop("head")["resources"] == {"CPU": 0}
    assert all(item["min_workers"] == 0 for item in types.values())
    assert all(item["resources"]["GPU"] == 1 for item in types.values())


def test_only_the_spot_type_is_spot(config: Config) -> None:
    is_spot = {
        name: "spot" in json.dumps(item["node_config"]).lower()
        for name, item in config["available_node_types"].items()
    }
    assert is_spot == {"head": False, "spot": True, "on_demand": False}


def test_the_cluster_asks_for_tokens_and_shows_the_dashboard_to_itself_only(config: Config) -> None:
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][1]


def test_the_images_hold_the_tested_ray(config: Config) -> None:
    docker, ray = config["docker"], constraints()["ray"]
    assert docker["head_image"] == f"rayproject/ray:{ray}-py311-cpu"
    assert docker["worker_image"] == f"rayproject/ray:{ray}-py311-gpu"
