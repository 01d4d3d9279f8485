"""Trains on a TPU slice in a Ray cluster: the XLA trainer of `xla.py` once on each host of the slice, all together."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.tpu import SlicePlacementGroup, run_on_slice, slice_placement_group
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from ray_mnist.checks.preflight import Cluster
from ray_mnist.errors import RequestError, TrainingError, one_line
from ray_mnist.launch import tpu
from ray_mnist.launch.channel import Send, over_ray
from ray_mnist.launch.connection import go_to, this_folder
from ray_mnist.run.events import Tell
from ray_mnist.run.outcome import Evaluation, Outcome
from ray_mnist.worker import Job

FREE_S = 3  # for a slice that nobody uses
# What Ray finds out from the cloud and writes on each node of a slice.
NAME, TOPOLOGY, POD_TYPE = "ray.io/tpu-slice-name", "ray.io/tpu-topology", "ray.io/tpu-pod-type"


@dataclass(frozen=True)
class Slice:
    """A TPU slice: `version` and `topology` such as v6e and 4x4; as many `chips` as its hosts have together."""

    version: str
    topology: str
    chips: int

    def __str__(self) -> str:
        return f"{self.version} {self.topology} with {self.chips} chips"


def slices(nodes: list[dict[str, Any]]) -> list[Slice]:
    """Those of a cluster's nodes, as `ray.nodes()` lists them."""
    found: dict[str, list[dict[str, Any]]] = {}
    for node in nodes:
        if NAME in node["Labels"]:
            found.setdefault(node["Labels"][NAME], []).append(node)
    return [
        Slice(
            version=hosts[0]["Labels"][POD_TYPE].partition("-")[0],
            topology=hosts[0]["Labels"][TOPOLOGY],
            chips=int(sum(host["Resources"].get("TPU", 0) for host in hosts)),
        )
        for hosts in found.values()
    ]


@contextmanager
def reserved(cores: int, wait_s: float, say: Callable[[str], None]) -> Iterator[SlicePlacementGroup]:
    """All hosts of one slice, for the time of the `with`: half a slice cannot compute.

    Args:
        cores: of the whole slice.
        wait_s: seconds to wait for a slice that is in use.
        say: takes a line that tells what is being waited for.

    Raises:
        RequestError: there is no such slice, or none was free in `wait_s` seconds.
    """
    cluster = Cluster.current()
    there = slices(cluster.nodes)
    wanted = next((each for each in there if each.chips == cores), None)
    if wanted is None:
        raise RequestError(
            f"--tpu-cores {cores}: the Ray cluster at {cluster.address} has no TPU slice of {cores} chips (it has "
            f"{', '.join(map(str, there)) or 'none at all'}): use all chips of one of those."
        )
    try:
        hosts = place(wanted, FREE_S)
        if hosts is None:
            say(f"waiting up to {wait_s:.0f} s for a TPU slice that is in use: {wanted}")
            hosts = place(wanted, wait_s)
    except ValueError as error:  # such as a topology that Ray does not know
        raise RequestError(f"--tpu-cores {cores}: Ray cannot reserve {wanted}: {one_line(error)}") from error
    if hosts is None:
        raise RequestError(
            f"--tpu-cores {cores}: {wanted} on the cluster at {cluster.address} was not free after {wait_s:.0f} s: try "
            "again later, or look who uses it with `ray status`."
        )
    try:
        yield hosts
    finally:
        hosts.shutdown()


def place(wanted: Slice, timeout_s: float) -> SlicePlacementGroup | None:
    """A slice of this kind, reserved; None if none was free in time."""
    try:
        hosts = slice_placement_group(wanted.topology, wanted.version, head_reservation_timeout_s=timeout_s)
    except TimeoutError:
        return None
    if hosts.placement_group.wait(timeout_s):
        return hosts
    hosts.shutdown()
    return None


def launch(job: Job, hosts: SlicePlacementGroup, tell: Tell) -> Outcome | Evaluation:
    """Does the job on all cores of all hosts, and tells of it.

    Raises:
        RequestError: a host found that the request cannot be met.
        TrainingError: training failed.
    """
    address = ray.util.get_node_ip_address()
    store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
    arguments = (job, hosts.chips_per_host, (address, store.port), this_folder())
    with over_ray(tell, job.name) as send:
        outcomes = on_every_host(train_on_host, *arguments, send, hosts=hosts)
    return next(outcome for outcome in outcomes if outcome is not None)


def train_on_host(job: Job, cores: int, address: Any, folder: Any, send: Send) -> Outcome | Evaluation | None:
    """What each host runs; the outcome comes from the one with rank 0."""
    go_to(folder)
    tpu.check_torch_xla()  # this host's
    from ray_mnist.launch import xla

    return xla.launch_host(job, cores, address, lambda event: send([event]))


def on_every_host(function: Callable[..., Any], *arguments: Any, hosts: SlicePlacementGroup) -> list[Any]:
    """What `function` returned on each host, in no order. Where one fails the others are ended: they wait for it.

    Raises:
        RequestError: one of them did.
        TrainingError: anything else went wrong on a host.
    """
    running = run_on_slice(ray.remote(max_retries=0)(function), *arguments, tpu_slice=hosts)
    returned = []
    try:
        while running:
            done, running = ray.wait(running)
            returned += ray.get(done)
    except RayTaskError as error:
        known = isinstance(error.cause, RequestError | TrainingError)
        raise error.cause if known else TrainingError(one_line(error.cause)[:300], str(error)) from None
    except RayError as error:
        raise TrainingError(f"a TPU host failed: {one_line(error)[:300]}") from None
    finally:
        for task in running:
            ray.cancel(task, force=True)
    return returned
