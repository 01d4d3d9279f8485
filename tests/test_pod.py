"""A TPU slice of several hosts in a Ray cluster: found, reserved whole, run on. The TPUs are made up."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import yaml
from conftest import wait_until
from ray.autoscaler._private.gcp.config import GCPNodeType, get_node_type
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.cluster_utils import Cluster as LocalCluster

from ray_mnist.errors import RequestError, TrainingError
from ray_mnist.launch import pod
from ray_mnist.run.events import EpochEnded

pytestmark = pytest.mark.slow

HOSTS = 4


def host_of(name: str, worker: int) -> dict[str, Any]:
    """A host of a v6e-16 slice, as Ray's own start-up on Google Cloud describes it."""
    labels = {"tpu-slice-name": name, "tpu-worker-id": str(worker), "tpu-topology": "4x4", "tpu-pod-type": "v6e-16"}
    return {
        "num_cpus": 1,
        "resources": {"TPU": 4, name: 1} | ({"TPU-v6e-16-head": 1} if worker == 0 else {}),
        "labels": {f"ray.io/{key}": value for key, value in labels.items()},
        "env_vars": {"TPU_NAME": name, "TPU_WORKER_ID": str(worker), "TPU_ACCELERATOR_TYPE": "v6e-16"},
    }


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """Two slices of four hosts with four chips each, and a head without any."""
    cluster = LocalCluster(initialize_head=True, head_node_args={"num_cpus": 1})
    for name in ("first", "second"):
        for worker in range(HOSTS):
            cluster.add_node(wait=False, **host_of(name, worker))
    cluster.wait_for_nodes()
    # The workers import what this file defines.
    imports = {"env_vars": {"PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), *sys.path))}}
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR", runtime_env=imports)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def silence(line: str) -> None:
    raise AssertionError(f"nothing was to be waited for: {line}")


def where() -> tuple[str, str, float]:
    context = ray.get_runtime_context()
    return os.environ["TPU_NAME"], context.get_node_id(), context.get_assigned_resources()["TPU"]


def test_every_host_of_one_slice_runs_once(cluster: LocalCluster) -> None:
    with pod.reserved(16, 60, silence) as hosts:
        assert (hosts.num_hosts, hosts.chips_per_host) == (HOSTS, 4)
        found = pod.on_every_host(where, hosts=hosts)
    assert len({name for name, *_ in found}) == 1
    assert len({node for _, node, _ in found}) == HOSTS
    assert {chips for *_, chips in found} == {4}
    assert_all_is_free()


def test_slices_are_given_to_one_run_each_and_then_waited_for(cluster: LocalCluster) -> None:
    said: list[str] = []
    with pod.reserved(16, 60, silence) as first, pod.reserved(16, 60, silence) as second:
        names = {pod.on_every_host(where, hosts=hosts)[0][0] for hosts in (first, second)}
        assert names == {"first", "second"}
        with (
            pytest.raises(RequestError, match=r"v6e 4x4 with 16 chips .* was not free after 1 s: try again later"),
            pod.reserved(16, 1, said.append),
        ):
            pass
    assert said == ["waiting up to 1 s for a TPU slice that is in use: v6e 4x4 with 16 chips"]
    assert_all_is_free()


def assert_all_is_free() -> None:
    def free() -> bool:
        resources = ray.available_resources()
        return resources.get("TPU", 0) == 8 * HOSTS and resources.get("TPU-v6e-16-head", 0) == 2

    wait_until(free, 600, "all chips to be free")


@pytest.mark.parametrize("cores", [4, 8, 32])
def test_a_part_of_a_slice_or_more_than_one_is_refused(cluster: LocalCluster, cores: int) -> None:
    said = rf"--tpu-cores {cores}: the Ray cluster at .* has no TPU slice of {cores} chips \(it has v6e 4x4 with 16 c"
    with pytest.raises(RequestError, match=said), pod.reserved(cores, 60, silence):
        pass


def fail_on_one() -> None:
    if os.environ["TPU_WORKER_ID"] == "2":
        raise RequestError("this host has it not")
    time.sleep(10_000)


def die_on_one() -> None:
    if os.environ["TPU_WORKER_ID"] == "2":
        os._exit(1)
    time.sleep(10_000)


@pytest.mark.parametrize(
    ("function", "kind", "said"),
    [(fail_on_one, RequestError, "this host has it not"), (die_on_one, TrainingError, "a TPU host failed: .*died")],
)
def test_a_host_that_fails_ends_the_others(cluster: LocalCluster, function: Any, kind: Any, said: str) -> None:
    with pytest.raises(kind, match=said), pod.reserved(16, 60, silence) as hosts:
        pod.on_every_host(function, hosts=hosts)
    assert_all_is_free()


def test_the_outcome_is_the_host_s_that_has_it(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def train_on_host(job: Any, cores: int, address: tuple[str, int], folder: Any, send: Any) -> Any:
        # What `xla.launch_host` does with them: the processes of all hosts meet at one store of the driver's.
        from torch.distributed import TCPStore

        store = TCPStore(*address, is_master=False)
        ranks = store.add("ranks", cores)
        while store.add("ranks", 0) < cores * HOSTS:
            time.sleep(0.05)
        send([EpochEnded({"epoch": ranks})])
        return (job, cores) if ranks == cores else None

    monkeypatch.setattr(pod, "train_on_host", train_on_host)
    job: Any = SimpleNamespace(name="the job")
    told: list[Any] = []
    with pod.reserved(16, 60, silence) as hosts:
        assert pod.launch(job, hosts, told.append) == (job, 4)  # type: ignore[comparison-overlap]
    assert {event.row["epoch"] for event in told} == {4, 8, 12, 16}


def test_no_slice_at_all() -> None:
    assert pod.slices([{"Labels": {}, "Resources": {"CPU": 1}}]) == []
    alone = {"Labels": host_of("x", 0)["labels"], "Resources": {"TPU": 4}}
    assert [str(each) for each in pod.slices([alone])] == ["v6e 4x4 with 4 chips"]  # of which three hosts are missing


def test_the_cluster_file_is_one_that_ray_takes() -> None:
    root = Path(__file__).parents[1]
    config = prepare_config(yaml.safe_load((root / "cluster/tpu.yaml").read_text()))
    validate_config(config)
    kinds = {name: get_node_type(kind["node_config"]) for name, kind in config["available_node_types"].items()}
    assert kinds == {"head": GCPNodeType.COMPUTE, "slice": GCPNodeType.TPU}
    assert config["available_node_types"]["slice"]["resources"] == {"TPU": 4}
    sent = [source for target, source in config["file_mounts"].items() if target.startswith("~/ray_mnist")]
    assert all((root / source).exists() for source in sent)
    pinned = next(line for line in config["initialization_commands"] if "uv==" in line)
    uv = next(line for line in (root / "requirements-tpu.lock").read_text().splitlines() if line.startswith("uv=="))
    assert uv.split()[0] in pinned
