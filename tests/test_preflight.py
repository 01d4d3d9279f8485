"""What a run needs is held against what there is: numbers where it does not fit, and nothing reserved or left."""

import json
import os
import re
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytorch_lightning as pl
import ray
from conftest import wait_until
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from ray.cluster_utils import Cluster as LocalCluster
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from torch import nn

from ray_mnist import ray_internals
from ray_mnist.checks import preflight
from ray_mnist.checks.preflight import Bundle, Cluster, check_resources, fits
from ray_mnist.config import RunConfig
from ray_mnist.errors import RequestError
from ray_mnist.launch.select import prepare
from ray_mnist.run.folder import RunFolder
from ray_mnist.worker import Job

GPU_WORKER = {"CPU": 1.0, "GPU": 1.0}
SMALL, LARGE = {"CPU": 1.0, "GPU": 1.0}, {"CPU": 3.0}  # the nodes of `two_nodes`


def sentence(call: Callable[[], object]) -> str:
    """The RequestError of `call`, which is one sentence on one line."""
    with pytest.raises(RequestError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


def nobody_waits(line: str) -> None:
    raise AssertionError(f"it waits: {line}")


def everything_in(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


# Counting


@pytest.mark.parametrize(
    ("resources", "bundle", "expected"),
    [
        (SMALL, GPU_WORKER, 1),
        (LARGE, GPU_WORKER, 0),
        (LARGE, {"CPU": 1.0}, 3),
        (LARGE, {"CPU": 2.0}, 1),
        ({"CPU": 8.0, "GPU": 2.0}, GPU_WORKER, 2),
        ({"CPU": 1.0}, {"CPU": 0.5}, 2),
        ({}, {"CPU": 1.0}, 0),
    ],
)
def test_how_many_bundles_a_node_holds(resources: Bundle, bundle: Bundle, expected: int) -> None:
    assert fits(resources, bundle) == expected


@pytest.mark.parametrize(("bundle", "expected"), [({"CPU": 1.0}, 4), ({"CPU": 2.0}, 1), (GPU_WORKER, 1)])
def test_a_bundle_is_not_spread_over_nodes(bundle: Bundle, expected: int) -> None:
    cluster = Cluster("h:1", [{"Resources": SMALL}, {"Resources": LARGE}])
    assert cluster.room_for(bundle) == expected
    assert str(cluster) == "h:1 (2 nodes, 4 CPUs, 1 GPU)"


@pytest.mark.parametrize(
    ("node", "bundle", "expected"),
    [
        ({"CPU": 4.0, "GPU": 3.0}, GPU_WORKER, "use --num-workers 3, or join a larger cluster with --address."),
        ({"CPU": 4.0}, GPU_WORKER, "drop --use-gpu, or join a larger cluster with --address."),
        ({"CPU": 4.0}, GPU_WORKER | {"CPU": 8}, "drop --use-gpu, or join a larger cluster with --address."),
        (SMALL, GPU_WORKER | {"CPU": 8}, "use fewer --cpus-per-worker, or join a larger cluster with --address."),
        ({}, {"CPU": 1.0}, "add nodes, or join a larger cluster with --address."),
    ],
)
def test_the_way_out(node: Bundle, bundle: Bundle, expected: str) -> None:
    assert preflight.way_out(Cluster("h:1", [{"Resources": node}]), bundle) == expected


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([{"CPU": 96.0, "GPU": 8.0}], 11),
        ([{"CPU": 96.0, "GPU": 8.0}, {"CPU": 16.0, "GPU": 4.0}, {"CPU": 64.0}], 3),
        ([{"CPU": 2.0, "GPU": 1.0}], 1),
        ([{"CPU": 1.0, "GPU": 1.0}], 1),
        ([{"GPU": 1.0}], 1),
        ([{"CPU": 8.0}], 1),
        ([], 1),
    ],
)
def test_a_gpus_share_of_the_cpus_leaves_one_and_can_be_had_on_every_node(nodes: list[Bundle], expected: int) -> None:
    assert Cluster("h:1", [{"Resources": resources} for resources in nodes]).cpus_per_gpu() == expected


# Addresses


@pytest.mark.parametrize("address", ["nonsense", "host:", ":6379", "host:x", "ray://h:1", "h:65536", "http://h:1", ""])
def test_an_address_that_is_none(address: str) -> None:
    text = sentence(lambda: preflight.check_address(address))
    assert text.startswith(f"--address {address} is not an address: give HOST:PORT")


def test_an_address_where_nothing_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    assert f"--address {address} does not answer (" in sentence(lambda: preflight.check_address(address))


class Greeter(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.request.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


@pytest.mark.parametrize("server", [socket.create_server, lambda at: socketserver.TCPServer(at, Greeter)])
def test_an_address_where_something_else_listens(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as the dashboard's: Ray would try to join it for ever."""
    monkeypatch.setattr(ray_internals, "ANSWER_TIMEOUT_S", 1)
    with server(("127.0.0.1", 0)) as other:
        if isinstance(other, socketserver.TCPServer):
            threading.Thread(target=other.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
            address = "{}:{}".format(*other.server_address)
        else:
            address = "{}:{}".format(*other.getsockname())
        text = sentence(lambda: preflight.check_address(address))
        if isinstance(other, socketserver.TCPServer):
            other.shutdown()
    assert f"--address {address} does not answer (something listens there, but no Ray head)" in text


@pytest.mark.parametrize("address", ["auto", "local"])
def test_an_address_that_ray_resolves_itself(address: str) -> None:
    preflight.check_address(address)


# Storage


def test_storage_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    before = everything_in(tmp_path)
    for place in (".", "there", "new", "new/below/it"):
        preflight.check_storage(RunFolder(str(tmp_path / place), "run"), 5_000_000)
        assert everything_in(tmp_path) == before


def test_storage_is_left_as_it_was_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: RunFolder, file: str) -> bytes:
        assert Path(folder.at(file)).stat().st_size == 1_000_000
        raise OSError("the disk is\nbroken")

    monkeypatch.setattr(RunFolder, "read", fail)
    text = sentence(lambda: preflight.check_storage(RunFolder(str(tmp_path / "new/below"), "run"), 5_000_000))
    assert text.startswith(f"--storage-path {tmp_path}/new/below cannot take the run's 5.0 MB of checkpoints")
    assert "the disk is broken; use another folder or make room" in text
    assert everything_in(tmp_path) == set()


class Huge(pl.LightningModule):
    """Has 4 TB of weights, in no memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1_000_000, 1_000_000, bias=False, device="meta")


def test_room_for_the_checkpoints_is_asked_of_the_disk_and_only_where_there_will_be_some(tmp_path: Path) -> None:
    folder = str(tmp_path / "new/runs")
    config = RunConfig(storage_path=folder)
    jobs = {task: Job(task, Huge(), {}, folder, "run", seed=0) for task in ("fit", "validate", "test", "predict")}
    with pytest.raises(RequestError) as refusal, prepare(jobs.pop("fit"), config):
        pass
    assert re.fullmatch(
        rf"--storage-path {folder} cannot take the run's 36,000,001\.0 MB of checkpoints: "
        r"only [\d,.]+ MB are free there; use another folder or make room\.",
        str(refusal.value),
    )
    for job in jobs.values():
        with prepare(job, config):
            pass
    assert everything_in(tmp_path) == set()


def test_storage_is_tried_with_as_many_bytes_as_it_takes(full_disk: Path) -> None:
    folder = RunFolder(str(full_disk / "runs"), "run")
    preflight.check_storage(folder, 50_000)
    text = sentence(lambda: preflight.check_storage(folder, 100_000))
    assert everything_in(full_disk) == set()
    assert f"--storage-path {full_disk}/runs cannot take the run's 0.1 MB of checkpoints" in text
    assert "No space left on device" in text


# On Ray

RAY_START = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]


@pytest.fixture(scope="module")
def ray_folder() -> Iterator[str]:
    """Where Ray's own files go; nobody finds the clusters of this file who was not given their address."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="ray-") as folder:
        patch.setenv("RAY_TMPDIR", folder)
        yield folder


@contextmanager
def killed_at_the_end(command: list[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)
    try:
        yield process
    finally:
        processes = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for one in processes:
            with suppress(psutil.NoSuchProcess):  # it went with its parent
                one.kill()
        psutil.wait_procs(processes, timeout=30)


@contextmanager
def autoscaling_cluster(folder: Path) -> Iterator[str]:
    """A head with 1 CPU, and Ray's own autoscaler, which may add two nodes of 2 CPUs and 1 GPU on this machine.

    `ray.cluster_utils.AutoscalingCluster` would begin and end with `ray stop`, for every cluster of this machine.
    """
    with socket.create_server(("", 0)) as free:
        address = f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"
    provider = "ray.autoscaler._private.fake_multi_node.node_provider"
    commands = ["initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray"]
    (folder / "autoscaling.json").write_text(
        json.dumps(
            {
                "cluster_name": "here",
                "max_workers": 2,
                "provider": {
                    "type": "external",
                    "module": f"{provider}.FakeMultiNodeProvider",
                    "gcs_address": address,
                    "head_node_id": FAKE_HEAD_NODE_ID,
                    "launch_multiple": True,
                },
                "head_node_type": "ray.head.default",
                "available_node_types": {
                    "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
                    "gpu": {"resources": {"CPU": 2, "GPU": 1}, "node_config": {}, "max_workers": 2},
                },
                **{f"{name}_commands": [] for name in commands},
                **{name: {} for name in ("auth", "file_mounts")},
                **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
                "file_mounts_sync_continuously": False,
                "idle_timeout_minutes": 5,
                "upscaling_speed": 10,
            }
        )
    )
    environment = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",  # as `ray up` does
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }
    options = ["--head", "--port", address.rpartition(":")[2], "--num-cpus", "1", "--num-gpus", "0"]
    config = ["--include-dashboard", "false", "--autoscaling-config", str(folder / "autoscaling.json")]
    with killed_at_the_end([*RAY_START, *options, *config], env=os.environ | environment) as head:
        file = Path(os.environ["RAY_TMPDIR"], "ray/ray_current_cluster")
        wait_until(lambda: file.exists() and head.poll() is None, 600, "the Ray head to start")
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        try:
            yield address
        finally:
            ray.shutdown()


@pytest.mark.slow
def test_an_autoscaler_adds_what_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with tempfile.TemporaryDirectory(prefix="ray-") as ray_folder:
        monkeypatch.setenv("RAY_TMPDIR", ray_folder)
        with autoscaling_cluster(tmp_path) as address:
            text = sentence(lambda: check_resources(3, GPU_WORKER, 600, said.append))
            assert text.startswith(
                "The run needs 3 CPUs and 3 GPUs (1 CPU and 1 GPU on one node for each of 3 workers)"
            )
            assert f"the cluster at {address} (1 node, 1 CPU, 0 GPUs) has room for 0 of the 3 workers" in text
            assert "its autoscaler cannot add nodes enough: drop --use-gpu" in text
            said.clear()
            cluster = check_resources(2, GPU_WORKER, 600, said.append)
            assert_nothing_is_reserved()
    wanted = "2 CPUs and 2 GPUs (1 CPU and 1 GPU on one node for each of 2 workers)"
    assert said == [f"waiting up to 600 s for nodes that the autoscaler is starting: {wanted}"]
    assert str(cluster) == f"{address} (3 nodes, 5 CPUs, 2 GPUs)"


@pytest.fixture(scope="module")
def two_nodes(ray_folder: str) -> Iterator[LocalCluster]:
    """This process is connected to a cluster of two nodes: one with 1 CPU and 1 GPU, one with 3 CPUs."""
    cluster = LocalCluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1})
    try:
        cluster.add_node(num_cpus=3)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_the_address_of_a_cluster(two_nodes: LocalCluster) -> None:
    preflight.check_address(two_nodes.address)


def test_the_cluster_of_this_machine(two_nodes: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert preflight.this_machines_cluster() is None
    file = tmp_path / "ray/ray_current_cluster"
    file.parent.mkdir()
    file.write_text(f"{two_nodes.address}\n")
    assert preflight.this_machines_cluster() == two_nodes.address
    # Ray takes TMPDIR where there is no RAY_TMPDIR, and so must we, to look where it looks.
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert preflight.this_machines_cluster() == (two_nodes.address if sys.platform == "linux" else None)


def test_a_cluster_of_this_machine_that_died(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    file = tmp_path / "ray/ray_current_cluster"
    file.parent.mkdir()
    for content in (address, "", "nonsense", "host:port"):
        file.write_text(content)
        assert preflight.this_machines_cluster() is None


def assert_nothing_is_reserved() -> None:
    def states() -> set[str]:
        return {group["state"] for group in placement_group_table().values()}

    wait_until(lambda: states() <= {"REMOVED"}, 600, "the reservations to be removed")


@pytest.mark.parametrize(
    ("workers", "bundle", "needs", "room", "way_out"),
    [
        (2, {"CPU": 2.0}, "4 CPUs (2 CPUs on one node for each of 2 workers)", 1, "use --num-workers 1"),
        (1, {"CPU": 2.0, "GPU": 1.0}, "2 CPUs and 1 GPU (2 CPUs and 1 GPU on", 0, "use fewer --cpus-per-worker"),
        (1, {"CPU": 1.0, "GPU": 2.0}, "1 CPU and 2 GPUs (1 CPU and 2 GPUs on", 0, "drop --use-gpu"),
        (4, GPU_WORKER, "4 CPUs and 4 GPUs (1 CPU and 1 GPU on one node for each of 4", 1, "use --num-workers 1"),
        (5, {"CPU": 1.0}, "5 CPUs (1 CPU on one node for each of 5 workers)", 4, "use --num-workers 4"),
        (1, {"CPU": 4.0}, "4 CPUs (4 CPUs on one node for each of 1 workers)", 0, "use fewer --cpus-per-worker"),
    ],
)
def test_more_than_the_nodes_hold_is_refused_at_once(
    two_nodes: LocalCluster, workers: int, bundle: Bundle, needs: str, room: int, way_out: str
) -> None:
    text = sentence(lambda: check_resources(workers, bundle, 600, nobody_waits))
    assert text.startswith(f"The run needs {needs}")
    has = f"the cluster at {two_nodes.address} (2 nodes, 4 CPUs, 1 GPU) has room for {room} of the {workers} workers"
    assert has in text
    assert f": {way_out}, or join a larger cluster with --address." in text
    assert_nothing_is_reserved()


@pytest.mark.parametrize(("workers", "bundle"), [(4, {"CPU": 1.0}), (1, {"CPU": 3.0}), (1, GPU_WORKER)])
def test_what_fits_passes(two_nodes: LocalCluster, workers: int, bundle: Bundle) -> None:
    cluster = check_resources(workers, bundle, 600, nobody_waits)
    assert str(cluster) == f"{two_nodes.address} (2 nodes, 4 CPUs, 1 GPU)"
    assert_nothing_is_reserved()


@contextmanager
def in_use(bundle: Bundle) -> Iterator[Any]:
    """Somebody else's reservation."""
    group = placement_group([bundle])
    try:
        assert group.wait(240)
        yield group
    finally:
        remove_placement_group(group)


WAITING = "for resources that are in use: 2 CPUs (2 CPUs on one node for each of 1 workers)"


def test_resources_in_use_are_waited_for(two_nodes: LocalCluster) -> None:
    said = []
    with in_use({"CPU": 3.0}) as theirs:

        def say(line: str) -> None:
            said.append(line)
            remove_placement_group(theirs)

        check_resources(1, {"CPU": 2.0}, 60, say)
    assert said == [f"waiting up to 60 s {WAITING}"]
    assert_nothing_is_reserved()


def test_resources_that_stay_in_use_are_waited_for_no_longer_than_said(two_nodes: LocalCluster) -> None:
    said: list[str] = []
    with in_use({"CPU": 3.0}):
        text = sentence(lambda: check_resources(1, {"CPU": 2.0}, 1, said.append))
    assert said == [f"waiting up to 1 s {WAITING}"]
    assert "The run needs 2 CPUs" in text
    assert f"in use on the cluster at {two_nodes.address} (2 nodes, 4 CPUs, 1 GPU) were not free after 1 s" in text
    assert "`ray status`" in text
    assert "fewer --num-workers" in text
    assert_nothing_is_reserved()


def test_a_folder_that_all_nodes_see(two_nodes: LocalCluster, tmp_path: Path) -> None:
    cluster = Cluster.current()
    assert len(cluster.nodes) == 2
    preflight.check_shared_storage(RunFolder(str(tmp_path / "new/runs"), "run"), cluster)
    assert everything_in(tmp_path) == set()


def test_every_node_is_asked(two_nodes: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    has = RunFolder.has
    monkeypatch.setattr(RunFolder, "has", lambda folder, file: asked.append(file) or has(folder, file))
    cluster = Cluster.current()
    preflight.check_shared_storage(RunFolder(str(tmp_path), "run"), cluster)
    assert asked == [node["NodeID"] for node in cluster.nodes]


# The last one on `two_nodes`: it adds a node, and Ray takes half a minute to find that it has gone.
def test_a_folder_that_a_node_does_not_see(two_nodes: LocalCluster, tmp_path: Path) -> None:
    """The node has a disk of its own where the others have the storage folder."""
    if os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("only root can give a node a file system of its own")
    storage = tmp_path / "runs"
    storage.mkdir()
    mount_and_run = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs "$0" && exec "$@"', str(storage)]
    join = [*RAY_START, "--address", two_nodes.address, "--num-cpus", "1", "--num-gpus", "0"]
    with killed_at_the_end([*mount_and_run, *join]) as node:
        wait_until(lambda: len(Cluster.current().nodes) == 3 and node.poll() is None, 600, "the node to join")
        text = sentence(lambda: preflight.check_shared_storage(RunFolder(str(storage), "run"), Cluster.current()))
        preflight.check_shared_storage(RunFolder(str(tmp_path / "shared"), "run"), Cluster.current())
    assert f"--storage-path {storage} is not shared with node {socket.gethostname()} (" in text
    assert "No such file" in text
    assert "s3://" in text
    assert everything_in(tmp_path) == {storage}
