"""Every defect that the doctor knows of is put into a sound cluster file, or a sound cluster, and has to be found."""

import copy
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import yaml
from conftest import wait_until
from ray.autoscaler.v2.schema import ClusterStatus, LaunchRequest, NodeInfo
from ray.cluster_utils import Cluster as LocalCluster

from ray_mnist import doctor, ray_internals
from ray_mnist.checks import aws, cluster_file, cluster_health, ray_up, versions
from ray_mnist.cli import console
from ray_mnist.ray_internals import SCHEMA, UNEXPECTED_TERMINATION

Outcome = tuple[int, list[str], str]
RAY = min(versions.locked()["ray"])


def load(text: str) -> Any:
    """What the text describes; where an anchor repeats something, a change of the one is none of the other."""
    return json.loads(json.dumps(yaml.safe_load(text)))


COMMON = """
cluster_name: ours
file_mounts: {~/.ray/auth_token: ~/.ray/auth_token, ~/project: .}
setup_commands: [scripts/setup]
head_setup_commands: []
"""
AWS = load(
    COMMON
    + """
max_workers: 2
provider: {type: aws, region: us-west-2, availability_zone: us-west-2a, cache_stopped_nodes: false}
head_node_type: head
available_node_types:
  head:
    resources: {}
    node_config: &machine
      InstanceType: m7i.large
      ImageId: ami-0123456789abcdef0
      SubnetIds: [subnet-0123456789abcdef0]
      IamInstanceProfile: {Name: ours}
      BlockDeviceMappings:
        - {DeviceName: /dev/sda1, Ebs: {VolumeSize: 100, VolumeType: gp3, Encrypted: true}}
        - {DeviceName: /dev/sdb, VirtualName: ephemeral0}
      MetadataOptions: {HttpTokens: required, HttpPutResponseHopLimit: 2}
  gpu:
    min_workers: 1
    max_workers: 2
    resources: {}
    node_config:
      <<: *machine
      InstanceMarketOptions: {MarketType: spot, SpotOptions: {ValidUntil: '2030-01-01T00:00:00Z'}}
"""
)
GCP = load(
    COMMON
    + """
max_workers: 2
provider: {type: gcp, project_id: ours, region: us-central1, availability_zone: us-central1-a}
head_node_type: head
available_node_types:
  head: {resources: {CPU: 2}, node_config: {machineType: e2-standard-2}}
  gpu: {resources: {CPU: 4, GPU: 1}, node_config: {machineType: g2-standard-4}}
"""
)
LOCAL = yaml.safe_load(
    """
cluster_name: ours
provider: {type: local, head_ip: 198.18.0.1, worker_ips: [198.18.0.2, 198.18.0.3]}
auth: {ssh_user: ubuntu}
max_workers: 2
file_mounts: {~/.ray/auth_token: ~/.ray/auth_token}
setup_commands: [python3.11 -m venv .venv]
head_start_ray_commands: [ray stop, 'export RAY_enable_autoscaler_v2=0; ray start --head']
"""
)
KUBERAY = yaml.safe_load(
    f"""
apiVersion: ray.io/v1
kind: RayCluster
metadata: {{name: ours}}
spec:
  rayVersion: "{RAY}"
  headGroupSpec:
    rayStartParams: {{num-cpus: "0"}}
    template: {{spec: {{containers: [{{name: ray, image: "rayproject/ray:{RAY}-py311-gpu"}}]}}}}
  workerGroupSpecs:
    - groupName: gpu
      replicas: 1
      minReplicas: 0
      maxReplicas: 4
      rayStartParams: {{num-gpus: "1"}}
      template:
        spec:
          containers:
            - name: ray
              image: rayproject/ray:{RAY}-py311-gpu
              resources: {{limits: {{cpu: "4", nvidia.com/gpu: 1}}}}
"""
)
RAY_JOB = {
    **KUBERAY,
    "kind": "RayJob",
    "spec": {"entrypoint": "python -m ray_mnist.train", "rayClusterSpec": KUBERAY["spec"]},
}
JOB_ELSEWHERE = {**RAY_JOB, "spec": {"clusterSelector": {"ray.io/cluster": "ours"}}}
GONE = object()
NODE = "available_node_types.gpu.node_config"
WORKERS = "spec.workerGroupSpecs.0"
WORKER = f"{WORKERS}.template.spec.containers.0"


def with_change(sound: dict[str, Any], place: str | list[Any], value: Any) -> dict[str, Any]:
    """A copy in which `value` is at `place`, such as `provider.worker_ips.0`."""
    changed = copy.deepcopy(sound)
    inner: Any = changed
    if isinstance(place, str):
        place = [int(step) if step.isdigit() else step for step in place.split(".")]
    for step in place[:-1]:
        inner = inner[step]
    if value is GONE:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return changed


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`python -m ray_mnist.doctor <arguments>` in this process: (status, lines, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["doctor", *arguments])
        capsys.readouterr()
        try:
            status = console.exit_status(doctor.examine)
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        return status, out.splitlines(), err

    return call


@pytest.fixture
def examine(run: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """The findings in a file with these documents, in a home that has a token."""
    monkeypatch.setenv("HOME", str(tmp_path))
    token = tmp_path / ".ray/auth_token"
    token.parent.mkdir()
    token.write_text("secret")

    def call(*documents: Any) -> list[str]:
        (tmp_path / "cluster.yaml").write_text(yaml.safe_dump_all(documents))
        status, lines, err = run("cluster.yaml")
        findings = [line.removeprefix("finding: ") for line in lines if line.startswith("finding: ")]
        noun = "finding" if len(findings) == 1 else "findings"
        assert lines[-1] == (f"{len(findings)} {noun} in cluster.yaml" if findings else "cluster.yaml is well")
        assert (status, err) == (int(bool(findings)), "")
        assert all(line.startswith(("ok: ", "finding: ")) for line in lines[:-1])
        return findings

    return call


# Cluster files


@pytest.mark.parametrize(
    "documents", [[AWS], [GCP], [LOCAL], [KUBERAY], [RAY_JOB, {"apiVersion": "v1", "kind": "Service"}], [JOB_ELSEWHERE]]
)
def test_a_sound_file_has_no_findings(examine: Callable[..., list[str]], documents: list[Any]) -> None:
    assert examine(*documents) == []


@pytest.mark.parametrize(
    ("place", "value", "expected"),
    [
        ("max_wokers", 2, "the file has max_wokers, which Ray does not know: did you mean max_workers?"),
        ("available_node_types.gpu.xyz", 2, "available_node_types.gpu has xyz, which Ray does not know: leave it out"),
        ("cluster_name", GONE, "the file lacks cluster_name: add it."),
        ("available_node_types.gpu.resources", GONE, "available_node_types.gpu lacks resources: add it."),
        ("max_workers", "two", "max_workers is not of type integer: write one."),
        ("idle_timeout_minutes", -1, "idle_timeout_minutes does not fit Ray's schema (minimum: 0): write what does."),
        ("provider.type", "awz", "Ray refuses the file, and says why: NotImplementedError: Unsupported node provider"),
        ("docker", {"image": "a"}, "Ray refuses the file, and says why: AssertionError: Must provide a container"),
        ("provider.regoin", "x", "provider.regoin is not known to Ray for aws: did you mean region?"),
        ("provider.project_id", "x", "provider.project_id is not known to Ray for aws: leave it out, or use one of"),
        ("head_node_type", "haed", "head_node_type haed is not one of available_node_types: write one of gpu, head."),
        ("available_node_types.gpu.max_workers", 0, "gpu has min_workers 1, more than its max_workers 0: raise that"),
        ("available_node_types.head.min_workers", 1, "head has min_workers 1, more than its max_workers 0: raise that"),
        ("max_workers", 0, "min_workers are 1 in all, more than max_workers 0: raise the latter."),
        ("file_mounts.~/x", "data", "file_mounts.~/x: there is no data here: start from the folder that has it."),
        ("file_mounts.~/auth_token", "~/no", "there is no ~/no here: make it with `ray get-auth-token --generate`."),
        ("cluster_name", "YOUR-NAME", "cluster_name still has the placeholder YOUR-NAME: write your own."),
        ("setup_commands.0", "export A=s3://YOUR-BUCKET/x", "setup_commands[0] still has the placeholder YOUR-BUCKET:"),
    ],
)
def test_a_defect_in_a_file_for_ray_up(
    examine: Callable[..., list[str]], place: str, value: Any, expected: str
) -> None:
    (finding,) = examine(with_change(AWS, place, value))
    assert expected in finding


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("pip install 'ray[default,train]==2.9.0'", "setup_commands[0] (Ray's own, if you wrote none) names ray 2.9.0"),
        ("pip install Torch_Metrics torchmetrics==0.1", "names torchmetrics 0.1, but every node gets the"),
        ("pip install https://h/ray-3.0.0.dev0-cp311-cp311-linux.whl", "names ray 3.0.0.dev0, but every node gets the"),
        (
            "docker pull rayproject/ray-ml:latest",
            f"names ray latest, but every node gets the {RAY} of",
        ),
        ("python3.10 -m venv .venv", "Python 3.10 is named, but this project needs "),
        ("uv python install 3.14", "Python 3.14 is named, but this project needs "),
        ("python3.11 a; conda create python=3.12", "Python 3.11 and 3.12 are named, but all nodes need the same"),
    ],
)
def test_a_version_that_differs_from_the_lock(examine: Callable[..., list[str]], command: str, expected: str) -> None:
    (finding,) = examine(with_change(AWS, "setup_commands.0", command))
    assert expected in finding


def test_commands_that_ray_fills_in_count_too(examine: Callable[..., list[str]]) -> None:
    findings = examine(with_change(with_change(GCP, "setup_commands", GONE), "head_setup_commands", GONE))
    assert any("names ray 3.0.0.dev0, but every node gets the" in finding for finding in findings)


@pytest.mark.parametrize(
    ("place", "value", "expected"),
    [
        ("InstanceTyp", "m7i.large", "InstanceTyp is not known to EC2: did you mean InstanceType?"),
        ("InstanceType", "g6.xlrge", "InstanceType is g6.xlrge, which EC2 does not have: write one such as g6.xlarge"),
        ("EbsOptimized", "true", "EbsOptimized is not of type boolean, as EC2 wants it: write one."),
        ("BlockDeviceMappings.0.Ebs.VolumeSize", True, "BlockDeviceMappings[0].Ebs.VolumeSize is not of type integer"),
        ("BlockDeviceMappings.0.Ebs.VolumeType", "gp33", "[0].Ebs.VolumeType is gp33, which EC2 does not have: write"),
        ("BlockDeviceMappings.0.Ebs.Zzz", 1, "BlockDeviceMappings[0].Ebs.Zzz is not known to EC2: leave it out."),
        ("CreditSpecification", {}, "CreditSpecification lacks CpuCredits, which EC2 demands: add it."),
        ("IamInstanceProfile", "ours", "IamInstanceProfile is not of type structure, as EC2 wants it: write one."),
        ("MetadataOptions.HttpTokens", "optional", "to whatever reaches its metadata service: write MetadataOptions:"),
        ("MetadataOptions", GONE, f"{NODE} gives the node's rights to whatever reaches its metadata service: write"),
        ("BlockDeviceMappings.0.Ebs.Encrypted", False, f"{NODE} has a volume that is not encrypted: write Ebs:"),
        ("BlockDeviceMappings", GONE, f"{NODE} has a volume that is not encrypted: write Ebs: {{Encrypted: true}}"),
    ],
)
def test_a_defect_in_the_node_config_of_aws(
    examine: Callable[..., list[str]], place: str, value: Any, expected: str
) -> None:
    (finding,) = examine(with_change(AWS, f"{NODE}.{place}", value))
    assert finding.startswith(NODE)
    assert expected in finding


def test_a_launch_template_may_say_what_is_safe(examine: Callable[..., list[str]]) -> None:
    templated = with_change(with_change(AWS, f"{NODE}.MetadataOptions", GONE), f"{NODE}.BlockDeviceMappings", GONE)
    assert len(examine(templated)) == 2
    assert examine(with_change(templated, f"{NODE}.LaunchTemplate", {"LaunchTemplateName": "ours"})) == []


def test_without_boto3_the_node_config_is_not_checked(
    examine: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    aws.run_instances.cache_clear()
    monkeypatch.setitem(sys.modules, "botocore.session", None)
    (finding,) = examine(with_change(AWS, f"{NODE}.InstanceTyp", "m7i.large"))
    assert finding.startswith("AWS's node_config was not checked, since boto3 is missing: pip install boto3")
    assert examine(GCP) == []


@pytest.mark.parametrize(
    ("place", "value", "expected"),
    [
        ("provider.worker_ips", ["198.18.0.2", "198.18.0.3", "198.18.0.2"], "worker_ips has 198.18.0.2 2 times: leave"),
        ("provider.worker_ips.0", "198.18.0.1", "provider.worker_ips has 198.18.0.1, which is the head_ip: leave it"),
        ("provider.head_ip", "192.0.2.10", "provider.head_ip still has the placeholder 192.0.2.10: write your own."),
        ("provider.worker_ips.1", "192.0.2.9", "provider.worker_ips[1] still has the placeholder 192.0.2.9: write"),
        ("max_workers", 1, "max_workers is 1, fewer than the 2 worker_ips: leave max_workers out."),
        ("provider.head_pi", "198.18.0.1", "provider.head_pi is not known to Ray for local: did you mean head_ip?"),
        ("provider.head_ip", GONE, "provider lacks head_ip: add it."),
    ],
)
def test_a_defect_in_a_file_for_machines_of_ones_own(
    examine: Callable[..., list[str]], place: str, value: Any, expected: str
) -> None:
    findings = examine(with_change(LOCAL, place, value))
    assert any(expected in finding for finding in findings), findings


def test_ray_would_leave_out_a_machine(examine: Callable[..., list[str]]) -> None:
    plain = {key: LOCAL[key] for key in ("cluster_name", "provider")}
    (finding,) = examine(plain)
    assert finding.startswith("head_start_ray_commands start Ray's second autoscaler, which brings up one machine")


@pytest.mark.parametrize(
    ("place", "value", "expected"),
    [
        ("kind", "RayClutser", "kind RayClutser is not known to KubeRay: did you mean RayCluster?"),
        (
            "spec.rayVersion",
            "2.9.0",
            "RayCluster ours: rayVersion 2.9.0 is not the Ray of requirements.lock: write",
        ),
        (
            f"{WORKER}.image",
            "rayproject/ray:2.9.0",
            "worker group gpu has image rayproject/ray:2.9.0 and the head ra",
        ),
        (
            f"{WORKER}.image",
            "rayproject/ray:2.9.0",
            f"names ray 2.9.0, but every node gets the {RAY} of",
        ),
        (f"{WORKER}.image", "rayproject/ray:X-py310", "Python 3.10 is named, but this project needs"),
        (f"{WORKER}.image", GONE, "worker group gpu has no image: write the one of the head."),
        (f"{WORKERS}.replicas", 5, "worker group gpu has 5 replicas, and minReplicas 0, maxReplicas 4: write a number"),
        (f"{WORKERS}.minReplicas", 2, "worker group gpu has 1 replicas, and minReplicas 2, maxReplicas 4: write a"),
        (
            f"{WORKER}.resources",
            GONE,
            "promises Ray num-gpus 1, and its container has a limit of 0: write nvidia.com",
        ),
        (
            f"{WORKERS}.rayStartParams.num-gpus",
            "2",
            "promises Ray num-gpus 2, and its container has a limit of 1: wr",
        ),
        (
            f"{WORKER}.env",
            [{"value": "s3://YOUR-BUCKET"}],
            "containers[0].env[0].value still has the placeholder YOUR-",
        ),
    ],
)
def test_a_defect_in_kuberays_documents(
    examine: Callable[..., list[str]], place: str, value: Any, expected: str
) -> None:
    findings = examine({"apiVersion": "v1", "kind": "Service"}, with_change(KUBERAY, place, value))
    assert any(expected in finding for finding in findings), findings


def test_all_findings_are_listed(examine: Callable[..., list[str]]) -> None:
    broken = AWS
    for place, value in (
        ("max_wokers", 2),
        ("upscaling_speed", "fast"),
        ("provider.regoin", "x"),
        ("head_node_type", "haed"),
        (f"{NODE}.InstanceTyp", "x"),
        (f"{NODE}.Monitoring", True),
        ("setup_commands", ["pip install ray==2.9.0", "python3.10 x"]),
        ("cluster_name", "YOUR-NAME"),
    ):
        broken = with_change(broken, place, value)
    assert len(examine(broken)) == 9


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1", "it is not YAML, which Ray would say too: while parsing"),
        ("just text", "it is no cluster: write one mapping for `ray up`, or documents of ray.io for KubeRay."),
        ("", "it is no cluster: write one mapping"),
        ("a: 1\n---\nb: 2", "it is no cluster: write one mapping"),
    ],
)
def test_what_is_no_cluster_file(run: Callable[..., Outcome], tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "cluster.yaml").write_text(text)
    status, lines, _ = run("cluster.yaml")
    assert status == 1
    assert any(line.startswith(f"finding: {expected}") for line in lines)


@pytest.mark.parametrize("sound", [AWS, LOCAL, KUBERAY], ids=["aws", "local", "kuberay"])
@pytest.mark.parametrize("value", [None, "text", [{}], {1: [None]}], ids=str)
def test_nothing_anywhere_trips_a_check(tmp_path: Path, sound: dict[str, Any], value: Any) -> None:
    def places(inner: Any, place: list[Any]) -> Iterator[list[Any]]:
        pairs = inner.items() if isinstance(inner, dict) else enumerate(inner) if isinstance(inner, list) else ()
        for key, below in pairs:
            yield [*place, key]
            yield from places(below, [*place, key])

    file = tmp_path / "cluster.yaml"
    for place in places(sound, []):
        file.write_text(yaml.safe_dump(with_change(sound, place, value)))
        for _, findings in cluster_file.checks(str(file)):
            assert all(isinstance(finding, str) for finding in findings)


# What is asked of Ray


def test_ray_still_reads_these_keys_of_a_provider() -> None:
    source = Path(ray.autoscaler.__file__).parent / "_private"
    common = "".join(file.read_text() for file in source.glob("*.py"))
    for provider, keys in ray_up.PROVIDERS.items():
        own = "".join(file.read_text() for file in (source / provider).rglob("*.py"))
        for key in keys | ray_up.ANY_PROVIDER:
            assert re.search(rf"[\"']{key}[\"']", own + common), f"{provider}: {key}"


def test_ray_still_has_what_is_asked_of_it() -> None:
    assert {"provider", "available_node_types", "max_workers"} <= SCHEMA["properties"].keys()
    whole, refusal = ray_internals.prepare_cluster_file(AWS)
    assert refusal is None
    assert whole["available_node_types"]["head"]["max_workers"] == 0


# The request itself


def test_a_request_that_is_wrong(run: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for arguments, expected in (
        (["none.yaml"], "error: none.yaml cannot be read: "),
        ([str(tmp_path)], f"error: {tmp_path} cannot be read: "),
        (["binary.yaml"], "error: binary.yaml cannot be read: "),
        (["--no-such"], "error: "),
        (["--address", "nonsense"], "error: --address nonsense is not an address: give HOST:PORT"),
        (["--address", "127.0.0.1:1"], "error: --address 127.0.0.1:1 does not answer ("),
        (["--address", "local"], "error: No Ray cluster runs here: start one with `ray start --head`, or name one"),
    ):
        status, lines, err = run(*arguments)
        assert (status, lines) == (2, [])
        assert err.startswith(expected)
        assert err.count("\n") == 1


def test_no_cluster_runs_here(run: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    status, _, err = run()
    assert (status, err.startswith("error: No Ray cluster runs here: start one")) == (2, True)


def test_a_file_outside_of_a_checkout_cannot_be_compared(
    run: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "LOCK", tmp_path / "requirements.lock")
    versions.locked.cache_clear()
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(KUBERAY))
    status, _, err = run("cluster.yaml")
    versions.locked.cache_clear()
    assert (status, err.startswith(f"error: There is no {tmp_path}/requirements.lock to compare")) == (2, True)


def test_the_module_runs(command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(with_change(GCP, "file_mounts", GONE)))
    done = command("cluster.yaml", module="doctor")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "cluster.yaml is well")


# A running cluster


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[LocalCluster]:
    """A head, and a node that has an address of its own; that a node has gone is noticed within seconds."""
    quick = {"health_check_period_ms": 500, "health_check_timeout_ms": 20_000, "health_check_failure_threshold": 3}
    with tempfile.TemporaryDirectory(prefix="ray-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        cluster = LocalCluster(initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": quick})
        try:
            cluster.add_node(num_cpus=1, node_ip_address="127.0.0.2")
            yield cluster
        finally:
            cluster.shutdown()


def test_a_sound_cluster_has_no_findings(run: Callable[..., Outcome], two_nodes: LocalCluster, tmp_path: Path) -> None:
    status, lines, _ = run("--address", two_nodes.address)
    assert (status, lines[-1]) == (0, "the cluster is well"), lines
    assert [re.sub(r"[0-9]{2,}", "N", line) for line in lines[:-1]] == [
        "ok: nodes",
        "ok: answers from 2 nodes",
        "ok: versions",
        "ok: token authentication (disabled)",
        "ok: clocks",
        "ok: GPUs",
        "ok: storage path runs",
        "ok: bandwidth between neighbours (MB/s: N, N)",
    ]
    assert list(tmp_path.iterdir()) == []


def test_defects_of_a_cluster(
    run: Callable[..., Outcome], two_nodes: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that claims GPUs that it does not have, and has other packages, the doctor's own too; then it dies."""
    other_torch = tmp_path / "other/torch-9.9.9.dist-info/METADATA"
    other_torch.parent.mkdir(parents=True)
    other_torch.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9.9\n")
    other_ray_mnist = tmp_path / "other/ray_mnist/__init__.py"
    other_ray_mnist.parent.mkdir()
    other_ray_mnist.touch()
    storage = tmp_path / "a file"
    storage.touch()
    path = f"{old_driver(tmp_path).parent}:{os.environ['PATH']}"
    node = two_nodes.add_node(
        num_gpus=64,
        node_ip_address="127.0.0.3",
        env_vars={"PYTHONPATH": str(tmp_path / "other"), "PATH": path},
    )
    with monkeypatch.context() as patch:
        ahead = SimpleNamespace(time=lambda: time.time() + 100, monotonic=time.monotonic)
        patch.setattr(cluster_health, "time", ahead)
        patch.setattr(cluster_health, "SLOW_MB_PER_S", 1e9)
        patch.setattr(ray_internals, "get_cluster_status", lambda address: starting_up())
        status, lines, err = run("--address", two_nodes.address, "--storage-path", str(storage))
    findings = [line.removeprefix("finding: ") for line in lines if line.startswith("finding: ")]
    assert (status, err, lines[-1]) == (1, "", f"{len(findings)} findings in the cluster")
    there, anyone = r"node \S+ \(127\.0\.0\.3, \w{6}\)", r"node \S+ \([\d.]+, \w{6}\)"
    for expected, times in (
        (r"a node of type gpu is still starting \(booting\): wait, then look at `ray status`\.", 1),
        (r"the launch of 2 nodes of type gpu is under way \(no details\): look at `ray status`", 1),
        (r"the launch of 1 nodes of type gpu failed \(no capacity\): look at `ray status`, and at monitor.log", 1),
        (rf"{there} has torch 9\.9\.9, and this machine \S+: copy the project there, run scripts/setup", 1),
        (rf"{there} has ray-mnist \S+ \(\w{{8}}\), and this machine \S+ \(\w{{8}}\): copy the project there", 1),
        (rf"{there} has 64 GPUs for Ray, but torch can use \d: mend its driver \(nvidia-smi\)", 1),
        (rf"{there} has a driver for CUDA 11\.4 at most, and a torch that was built for CUDA \d", 1),
        (rf"{anyone} has a clock (\d\d|100)\.\d s off this machine's: turn on NTP \(chrony\) on both\.", 3),
        (rf"--storage-path {storage} cannot take the run's 1\.0 MB of checkpoints: .*; use another folder", 1),
        (rf"from {anyone} to {anyone} go \d+\.\d MB/s, and training sends its gradients this way", 3),
    ):
        assert sum(bool(re.match(expected, finding)) for finding in findings) == times, (expected, findings)
    assert len(findings) == 14

    two_nodes.remove_node(node, allow_graceful=False)
    with cluster_health.joined(two_nodes.address):
        wait_until(lambda: sum(node["Alive"] for node in ray.nodes()) == 2, 600, "Ray to notice that the node died")
        (finding,) = cluster_health.absent(ray.nodes())
    assert re.match(rf"{there} died \(.+\): start its machine and Ray on it again, unless another", finding)


def old_driver(folder: Path) -> Path:
    """A stand-in for nvidia-smi, as a driver of CUDA 11.4 has it: there is no GPU here."""
    tool = folder / "bin/nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho '<nvidia_smi_log><cuda_version>11.4</cuda_version></nvidia_smi_log>'\n")
    tool.chmod(0o755)
    return tool


@pytest.mark.parametrize(
    ("built", "driven", "finding"),
    [
        ("13.2", "13.0", None),  # any driver of the same number
        ("12.8", "13.0", None),
        ("13.2", None, None),  # no nvidia-smi, as in some containers
        ("13.2", "12.9", "node a has a driver for CUDA 12.9 at most, and a torch that was built for CUDA 13.2: update"),
        (None, "13.0", "node a has GPUs for Ray, and a torch that was built without CUDA: install torch as"),
    ],
)
def test_a_driver_is_held_against_the_cuda_of_torch(
    built: str | None, driven: str | None, finding: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_health, "ask", lambda *_: ({"a": (built, driven)}, []))
    found = list(cluster_health.driver_findings({}))
    assert len(found) == (finding is not None)
    assert all(each.startswith(str(finding)) for each in found)


@pytest.mark.slow
def test_neighbours_with_gpus_add_up_gradients(two_nodes: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs that are only numbers, over gloo and on the CPU in NCCL's place."""
    monkeypatch.setattr(cluster_health, "NCCL", ("gloo", "cpu"))
    monkeypatch.setattr(cluster_health, "ANSWER_TIMEOUT_S", 600)
    gpus = [two_nodes.add_node(num_cpus=0, num_gpus=1) for _ in range(2)]
    try:
        with cluster_health.joined(two_nodes.address):
            wait_until(lambda: ray.cluster_resources().get("GPU") == 2, 600, "the nodes to join")
            having = {cluster_health.name_of(node): node for node in ray.nodes() if node["Resources"].get("GPU")}
            about, findings = cluster_health.gradients(having)
            assert (re.sub(r"\d+", "N", about), findings) == ("NCCL between neighbours (MB/s: N)", [])
            first, second = having
            monkeypatch.setattr(cluster_health, "NCCL", ("nccl", "cpu"))
            _, (finding,) = cluster_health.gradients(having)
            assert finding.startswith(f"node {first} and node {second} cannot add up gradients over nccl (")
            assert "NCCL_SOCKET_IFNAME" in finding
            monkeypatch.setattr(cluster_health, "ANSWER_TIMEOUT_S", 1)
            taken = [cluster_health.start_probe(node["NodeID"], gpus=1) for node in having.values()]
            ray.get([probe.clock.remote() for probe in taken], timeout=600)
            _, (finding,) = cluster_health.gradients(having)
            assert finding == f"node {first} has had no GPU free to try NCCL with: run the doctor again later."
    finally:
        for node in gpus:
            two_nodes.remove_node(node)


def starting_up() -> ClusterStatus:
    """What Ray says of an autoscaler at work."""
    launch = {"instance_type_name": "g6", "ray_node_type_name": "gpu", "request_ts_s": 1}
    return ClusterStatus(
        pending_nodes=[NodeInfo("g6", "gpu", "i-1", "10.0.0.1", details="booting")],
        pending_launches=[LaunchRequest(**launch, count=2, state=LaunchRequest.Status.PENDING)],
        failed_launches=[
            LaunchRequest(**launch, count=1, state=LaunchRequest.Status.FAILED, failed_ts_s=2, details="no capacity")
        ],
    )


def test_nodes_that_do_not_answer_are_named(two_nodes: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stuck:
        def clock(self) -> None:
            time.sleep(10_000)

        def gpus(self) -> None:
            raise ImportError("no torch")

    with cluster_health.joined(two_nodes.address):
        probes = {"a": ray.remote(Stuck).options(num_cpus=0).remote()}
        _, findings = cluster_health.ask(probes, "gpus")
        (finding,) = findings
        assert finding.startswith("node a could not answer (asked: gpus): ")
        assert "run scripts/setup there" in finding
        monkeypatch.setattr(cluster_health, "ANSWER_TIMEOUT_S", 1)
        (finding,) = cluster_health.clock_findings(probes)
        assert finding.startswith("node a did not answer in 1 s (asked: clock): look at `ray status`, and at /tmp/ray/")


@pytest.mark.parametrize(
    ("there", "expected"), [(98.9, ["1.1 s"]), (99.1, []), (100, []), (110, []), (110.9, []), (111.1, ["1.1 s"])]
)
def test_how_long_the_answer_took_is_not_held_against_a_clock(
    monkeypatch: pytest.MonkeyPatch, there: float, expected: list[str]
) -> None:
    moments = iter([100.0, 110.0])
    monkeypatch.setattr(cluster_health, "time", SimpleNamespace(time=lambda: next(moments)))
    monkeypatch.setattr(cluster_health, "ask", lambda *_: ({"a": there}, []))
    findings = list(cluster_health.clock_findings({"a": None}))
    assert findings == [
        f"node a has a clock {off} off this machine's: turn on NTP (chrony) on both." for off in expected
    ]


def test_token_authentication_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setattr(cluster_health, "ask", lambda *_: ({"a": "token", "b": "disabled"}, []))
    about, findings = cluster_health.authentication({})
    mend = "start Ray again on every node with RAY_AUTH_MODE=token and the same ~/.ray/auth_token"
    assert about == "token authentication (token)"
    assert findings == [f"node b has RAY_AUTH_MODE disabled, and this machine token: {mend}."]


def test_a_machine_that_joined_again_is_not_missed() -> None:
    node = {"NodeManagerHostname": "a", "NodeID": "0123456789", "NodeManagerAddress": "10.0.0.1", "Alive": True}
    dead = node | {"Alive": False, "DeathReason": UNEXPECTED_TERMINATION, "DeathReasonMessage": "lost"}
    assert list(cluster_health.absent([node | {"DeathReason": 0}, dead])) == []
    assert len(list(cluster_health.absent([dead]))) == 1
    assert list(cluster_health.absent([dead | {"DeathReason": 4}])) == []  # idle: the autoscaler's doing
