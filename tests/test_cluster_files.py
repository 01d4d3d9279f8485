"""The shipped cluster files, as far as that goes without machines: Ray's schema, AWS's own model, and moto as AWS."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import moto
import pytest
import yaml
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config

from ray_mnist.checks import cluster_file

CLUSTER = Path(__file__).parents[1] / "cluster"
FOR_RAY_UP = ("gpu.yaml", "gpu-gcp.yaml", "local.yaml", "tpu.yaml")


def load(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((CLUSTER / name).read_text())
    return config


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An account of which nothing is known."""
    (tmp_path / ".ssh").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MOTO_IAM_LOAD_MANAGED_POLICIES", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    with moto.mock_aws():
        yield


@pytest.mark.parametrize("name", FOR_RAY_UP)
def test_ray_up_accepts_it_and_every_node_gets_the_same(name: str) -> None:
    config = prepare_config(load(name))
    validate_config(config)
    commands = config["head_setup_commands"], config["worker_setup_commands"]
    assert all(any("scripts/setup" in command for command in each) for each in commands)
    assert all(any("RAY_AUTH_MODE=token" in command for command in each) for each in commands)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert all((CLUSTER.parent / path).exists() for path in config["file_mounts"].values() if path[0] != "~")
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]


@pytest.mark.parametrize("name", [*FOR_RAY_UP, "kuberay.yaml"])
def test_the_doctor_finds_only_what_is_left_to_edit(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(CLUSTER.parent)
    findings = [finding for _, found in cluster_file.checks(f"cluster/{name}") for finding in found]
    assert all("still has the placeholder" in finding for finding in findings), findings
    assert bool(findings) == (name != "gpu.yaml")


@pytest.mark.slow
@pytest.mark.usefixtures("aws")
def test_the_account_has_all_that_gpu_yaml_starts() -> None:
    boto3.client("cloudformation").create_stack(
        StackName="ray-mnist",
        TemplateBody=(CLUSTER / "aws-account.yaml").read_text(),
        Capabilities=["CAPABILITY_NAMED_IAM"],
    )
    account = boto3.client("sts").get_caller_identity()["Account"]
    assert [bucket["Name"] for bucket in boto3.client("s3").list_buckets()["Buckets"]] == [f"ray-mnist-{account}"]
    config = prepare_config(load("gpu.yaml"))
    config["provider"]["use_internal_ips"] = True  # moto's subnets give no public addresses
    config = AWSNodeProvider.fillout_available_node_types_resources(bootstrap_aws(config))
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    types = config["available_node_types"]
    assert {name: types[name]["resources"].get("GPU", 0) for name in types} == {"head": 0, "gpu": 1, "gpu-on-demand": 1}
    for name in types:
        provider.create_node(types[name]["node_config"], {"ray-node-type": "worker"}, 1)
    reservations = boto3.client("ec2").describe_instances()["Reservations"]
    machines = [machine for reservation in reservations for machine in reservation["Instances"]]
    profiles = {profile["Arn"] for profile in boto3.client("iam").list_instance_profiles()["InstanceProfiles"]}
    assert {machine["IamInstanceProfile"]["Arn"] for machine in machines} == profiles
    assert [machine.get("InstanceLifecycle") for machine in machines].count("spot") == 1
    assert {machine["MetadataOptions"]["HttpTokens"] for machine in machines} == {"required"}
    assert all(volume["Encrypted"] for volume in boto3.client("ec2").describe_volumes()["Volumes"])
    groups = boto3.client("ec2").describe_security_groups(
        GroupIds=sorted({group["GroupId"] for machine in machines for group in machine["SecurityGroups"]})
    )["SecurityGroups"]
    rules = [rule for group in groups for rule in group["IpPermissions"] if rule["IpRanges"]]
    assert [(rule["FromPort"], rule["ToPort"]) for rule in rules] == [(22, 22)], "a port is open to the world"


def test_the_template_is_sound() -> None:
    lint = Path(sys.executable).with_name("cfn-lint")
    done = subprocess.run([lint, CLUSTER / "aws-account.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
