"""The AWS stack and Ray's launcher, against a pretended AWS."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from manifests import CLUSTER, documents, template
from moto import mock_aws

STACK = {"BucketName": "runs-of-a-test", "SshFrom": "198.51.100.7/32"}


@pytest.fixture
def account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """An account with the stack of aws-account.yaml; its resources' ids by their names."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "pretended")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    monkeypatch.setenv("HOME", str(tmp_path))  # the launcher writes a key to ~/.ssh
    with mock_aws():
        client = boto3.client("cloudformation")
        client.create_stack(
            StackName="fppmo-ray",
            TemplateBody=(CLUSTER / "aws-account.yaml").read_text(),
            Parameters=[{"ParameterKey": k, "ParameterValue": v} for k, v in STACK.items()],
            Capabilities=["CAPABILITY_NAMED_IAM"],
        )
        resources = client.list_stack_resources(StackName="fppmo-ray")["StackResourceSummaries"]
        yield {item["LogicalResourceId"]: item["PhysicalResourceId"] for item in resources}


@pytest.fixture(scope="module")
def resources() -> dict[str, Any]:
    """What the template makes, as it is written."""
    return dict(template(CLUSTER / "aws-account.yaml")["Resources"])


def test_uploads_of_killed_drivers_are_gone_after_a_day(resources: dict[str, Any]) -> None:
    assert resources["Bucket"]["Properties"]["LifecycleConfiguration"]["Rules"] == [
        {
            "Id": "abort-incomplete-uploads",
            "Status": "Enabled",
            "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 1},
        }
    ]


def test_the_head_may_use_the_one_bucket_and_hand_its_role_to_nobody(
    resources: dict[str, Any],
) -> None:
    runs, autoscaler = resources["HeadRole"]["Properties"]["Policies"]
    reached = [entry["Resource"] for entry in runs["PolicyDocument"]["Statement"]]
    assert reached == [{"GetAtt": "Bucket.Arn"}, {"Sub": "${Bucket.Arn}/*"}]
    actions = str([entry["Action"] for entry in autoscaler["PolicyDocument"]["Statement"]])
    assert "s3:" not in actions
    assert "PassRole" not in actions


def test_ssh_is_open_to_one_address_and_all_else_to_the_nodes_alone(
    resources: dict[str, Any],
) -> None:
    [ssh] = resources["Nodes"]["Properties"]["SecurityGroupIngress"]
    assert ssh == {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "CidrIp": {"Ref": "SshFrom"}}
    between = resources["BetweenNodes"]["Properties"]
    assert between["SourceSecurityGroupId"] == between["GroupId"] == {"GetAtt": "Nodes.GroupId"}
    kinds = [item["Type"] for item in resources.values()]
    assert sum(kind.startswith("AWS::EC2::") for kind in kinds) == 2


@pytest.mark.slow
def test_the_head_reaches_the_one_bucket_and_ssh_is_open_to_one_address(
    account: dict[str, str],
) -> None:
    policy = boto3.resource("iam").RolePolicy("fppmo-ray-head", "run-directories").policy_document
    allowed = set(re.findall(r"arn:[^'\"]*", str(policy)))
    assert allowed == {f"arn:aws:s3:::{STACK['BucketName']}{end}" for end in ("", "/*")}
    group = boto3.resource("ec2").SecurityGroup(account["Nodes"])
    from_outside = {
        (rule["FromPort"], rule["ToPort"], source["CidrIp"])
        for rule in group.ip_permissions
        for source in rule["IpRanges"]
    }
    assert from_outside == {(22, 22, STACK["SshFrom"])}


@pytest.mark.slow
def test_rays_launcher_takes_the_group_as_it_is_and_starts_workers_as_spot_without_a_role(
    account: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, provider = launched(monkeypatch)
    for item in config["available_node_types"].values():
        assert item["node_config"]["SecurityGroupIds"] == [account["Nodes"]]
    rules = boto3.resource("ec2").SecurityGroup(account["Nodes"]).ip_permissions
    assert "0.0.0.0/0" not in str(rules)
    spot = config["available_node_types"]["spot"]
    assert spot["resources"]["accelerator_type:L4"] == 1  # Ray knows the instance type
    instance = start(provider, spot["node_config"])
    assert instance["InstanceType"] == "g6.xlarge"
    assert instance["InstanceLifecycle"] == "spot"
    assert "IamInstanceProfile" not in instance


def launched(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], Any]:
    """Ray's own reading of aws.yaml, as of ``ray up``, and its node provider."""
    from ray.autoscaler._private.commands import _bootstrap_config
    from ray.autoscaler._private.providers import _get_node_provider

    token = Path(os.environ["HOME"]) / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("token")
    monkeypatch.chdir(CLUSTER.parent)
    [document] = documents(CLUSTER / "aws.yaml")
    config = _bootstrap_config(document, no_config_cache=True)
    return config, _get_node_provider(config["provider"], config["cluster_name"], use_cache=False)


def start(provider: Any, node_config: dict[str, Any]) -> dict[str, Any]:
    """Start a node as the autoscaler would; what EC2 says of it."""
    client = boto3.client("ec2")
    # The pretended EC2 does not look up an image's id by its parameter's name.
    image = client.describe_images()["Images"][0]["ImageId"]
    tags = {"ray-node-type": "worker", "ray-user-node-type": "spot", "ray-node-name": "worker"}
    provider.create_node({**node_config, "ImageId": image}, tags, 1)
    [reservation] = client.describe_instances()["Reservations"]
    [instance] = reservation["Instances"]
    return dict(instance)
