"""What the run needs against what there is, before anything starts.

Ray is imported only where a cluster is asked: a run in this process does without it.
"""

import math
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from ray_mnist.errors import RequestError, one_line
from ray_mnist.run.folder import RunFolder

Bundle = dict[str, float]
PROBE_BYTES = 1_000_000
PROBE_TIMEOUT_S = 60
# For Ray Data: a stream that is trained on keeps its own while another one validates.
CPUS_FOR_DATA = 2
WAIT_FOR_NODES_S = 600  # a cloud's machine takes minutes to start and to be set up


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster as a run sees it."""

    address: str
    nodes: list[dict[str, Any]]

    @classmethod
    def current(cls) -> "Cluster":
        """The one that this process is connected to."""
        import ray

        nodes = [node for node in ray.nodes() if node["Alive"]]
        return cls(ray.get_runtime_context().gcs_address, nodes)

    def __str__(self) -> str:
        nodes = "1 node" if len(self.nodes) == 1 else f"{len(self.nodes)} nodes"
        return f"{self.address} ({nodes}, {count(self.total('CPU'), 'CPU')}, {count(self.total('GPU'), 'GPU')})"

    def total(self, resource: str) -> float:
        """Of all nodes."""
        return sum(node["Resources"].get(resource, 0) for node in self.nodes)

    def cpus_per_gpu(self) -> int:
        """How many CPUs go with a GPU on every node that has any, at least 1; one of the node's is left to others."""
        having = [node["Resources"] for node in self.nodes if node["Resources"].get("GPU")]
        shares = [int((resources.get("CPU", 0) - 1) // resources["GPU"]) for resources in having]
        return max(1, min(shares, default=1))

    def room_for(self, bundle: Bundle) -> int:
        """How many such bundles the nodes hold: a bundle cannot be spread over two nodes."""
        return sum(fits(node["Resources"], bundle) for node in self.nodes)


def fits(resources: dict[str, float], bundle: Bundle) -> int:
    """How many such bundles one node holds."""
    return min(int(resources.get(name, 0) // amount) for name, amount in bundle.items())


def check_resources(num_workers: int, bundle: Bundle, wait_s: float, say: Callable[[str], None]) -> Cluster:
    """The cluster, once it has room for `num_workers` bundles.

    Args:
        num_workers: how many bundles are needed at the same time.
        bundle: what each needs of one node, such as {"CPU": 1, "GPU": 1}.
        wait_s: seconds to wait for resources that are in use, or for nodes that the autoscaler has to start.
        say: takes a line that tells what is being waited for.

    Raises:
        RequestError: there is no room, and there cannot be or was not in `wait_s` seconds.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    from ray_mnist import ray_internals

    cluster = Cluster.current()
    room = cluster.room_for(bundle)
    needs = f"The run needs {wanted(num_workers, bundle)}"
    has = f"the cluster at {cluster} has room for {room} of the {num_workers} workers"
    grows_on_demand = ray_internals.has_autoscaler()
    if room < num_workers and not grows_on_demand and not ray_internals.nodes_are_joining():
        raise RequestError(f"{needs}; {has}: {way_out(cluster, bundle)}")
    group = placement_group([bundle] * num_workers)
    try:
        if not group.wait(2):
            why = "resources that are in use" if room >= num_workers else "nodes that the autoscaler is starting"
            say(f"waiting up to {wait_s:.0f} s for {why}: {wanted(num_workers, bundle)}")
            deadline = time.monotonic() + wait_s
            while not group.wait(1):
                if room < num_workers and grows_on_demand and ray_internals.is_beyond_the_autoscaler(group):
                    raise RequestError(
                        f"{needs}; {has}, and its autoscaler cannot add nodes enough: {way_out(cluster, bundle)}"
                    )
                if time.monotonic() > deadline:
                    raise RequestError(
                        f"{needs}, and {why} on the cluster at {Cluster.current()} were not free after {wait_s:.0f} s: "
                        "look at `ray status`, and try again later or with fewer --num-workers."
                    )
    finally:
        remove_placement_group(group)
    return Cluster.current()


def check_cpus_for_data() -> float:
    """How many CPUs each stream of Ray Data may use, of those that no run's workers have reserved.

    Raises:
        RequestError: there are too few, and its tasks would wait for ever.
    """
    import ray
    from ray.util import placement_group_table

    from ray_mnist import ray_internals

    total = ray.cluster_resources().get("CPU", 0)
    groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
    reserved = sum(bundle.get("CPU", 0) for group in groups for bundle in group["bundles"].values())
    free = total - reserved
    if free < CPUS_FOR_DATA and not ray_internals.has_autoscaler():
        raise RequestError(
            f"Ray Data needs {CPUS_FOR_DATA} CPUs beside the workers, which have {reserved:g} of the "
            f"{count(total, 'CPU')} of the cluster at {Cluster.current().address}: use fewer --num-workers or "
            "--cpus-per-worker, or give Ray more, as with `ray start --num-cpus`."
        )
    return max(1, free // CPUS_FOR_DATA)


def wanted(num_workers: int, bundle: Bundle) -> str:
    """Such as `4 CPUs and 4 GPUs (1 CPU and 1 GPU on one node for each of 4 workers)`."""
    total = " and ".join(count(amount * num_workers, name) for name, amount in bundle.items())
    each = " and ".join(count(amount, name) for name, amount in bundle.items())
    return f"{total} ({each} on one node for each of {num_workers} workers)"


def count(amount: float, name: str) -> str:
    """Such as `1 CPU` or `4 GPUs`."""
    return f"{amount:g} {name}" + ("" if amount == 1 else "s")


def way_out(cluster: Cluster, bundle: Bundle) -> str:
    """What to do where there is not room enough."""
    if room := cluster.room_for(bundle):
        fewer = f"use --num-workers {room}"
    elif cluster.room_for(bundle | {"CPU": 1}):
        fewer = "use fewer --cpus-per-worker"
    else:
        fewer = "drop --use-gpu" if "GPU" in bundle else "add nodes"
    return f"{fewer}, or join a larger cluster with --address."


def this_machines_cluster() -> str | None:
    """The address of the cluster that this machine is part of, or None."""
    from ray_mnist import ray_internals

    address = ray_internals.this_machines_address()
    return address if address and ray_internals.unreachable(address) is None else None


def check_address(address: str) -> None:
    """Raises RequestError if no Ray head answers at host:port; Ray itself would try for half a minute, or for ever."""
    if address in ("auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535 or "/" in host:
        raise RequestError(f"--address {address} is not an address: give HOST:PORT, as `ray start --head` prints it.")
    from ray_mnist import ray_internals

    if problem := ray_internals.unreachable(address):
        raise RequestError(f"--address {address} does not answer ({problem}): is `ray start --head` running there?")


def check_storage(folder: RunFolder, needed_bytes: int) -> None:
    """Writes and reads a megabyte where the run folder is to be, and asks the file system whether the rest fits.

    Raises:
        RequestError: this process cannot write there, or there is no room for `needed_bytes`.
    """
    tried_bytes = min(PROBE_BYTES, needed_bytes)
    with _probe(folder) as probe:
        try:
            probe.write("driver", bytes(tried_bytes))
            if len(probe.read("driver")) != tried_bytes:
                raise OSError("what was written could not be read back")
            if (free := tried_bytes + _free_bytes(probe)) < needed_bytes:
                raise OSError(f"only {free / 1e6:,.1f} MB are free there")
        except OSError as error:
            raise RequestError(
                f"--storage-path {folder.storage_path} cannot take the run's {needed_bytes / 1e6:,.1f} MB of "
                f"checkpoints: {one_line(error)}; use another folder or make room."
            ) from error


def _free_bytes(folder: RunFolder) -> float:
    """Where the file system tells it: object stores do not, nor do some mounts, which report a size of 0."""
    usage = shutil.disk_usage(folder.path) if folder.is_local else None
    return usage.free if usage and usage.total else math.inf


def check_shared_storage(folder: RunFolder, cluster: Cluster) -> None:
    """Has every node read what this process wrote, and this process what every node wrote.

    Raises:
        RequestError: the storage path is not one place for the whole cluster.
    """
    if len(cluster.nodes) == 1:
        return
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    probe_from = ray.remote(num_cpus=0, max_retries=0)(_probe_from_node)
    with _probe(folder) as probe:
        probe.write("driver", b"driver")
        answers = [
            probe_from.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                probe.storage_path, probe.name, node["NodeID"]
            )
            for node in cluster.nodes
        ]
        deadline = time.monotonic() + PROBE_TIMEOUT_S
        for answer, node in zip(answers, cluster.nodes, strict=True):
            problem = _answer(answer, deadline)
            if problem is None and not probe.has(node["NodeID"]):
                problem = "what it wrote cannot be seen from here"
            if problem:
                raise RequestError(
                    f"--storage-path {folder.storage_path} is not shared with node {node['NodeManagerHostname']} "
                    f"({problem}): use a bucket (s3://…, gs://…) or a folder that every machine mounts."
                )


def _probe_from_node(storage_path: str, name: str, node_id: str) -> str | None:
    probe = RunFolder(storage_path, name)
    try:
        if probe.read("driver") != b"driver":
            return "it reads something else there"
        probe.write(node_id, b"node")
    except OSError as error:
        return one_line(error)
    return None


def _answer(answer: Any, deadline: float) -> str | None:
    import ray

    try:
        problem: str | None = ray.get(answer, timeout=max(0.0, deadline - time.monotonic()))
    except ray.exceptions.GetTimeoutError:
        return f"it did not answer in {PROBE_TIMEOUT_S} s"
    except ray.exceptions.RayError as error:
        return one_line(error)[:200]
    return problem


@contextmanager
def _probe(folder: RunFolder) -> Iterator[RunFolder]:
    """A folder beside the run folder, for the time of the `with`; what had to be made for it goes too."""
    probe = RunFolder(folder.storage_path, f".probe-{uuid.uuid4().hex}")
    with probe.empty_ones_removed():
        try:
            yield probe
        finally:
            with suppress(OSError):
                probe.remove()
