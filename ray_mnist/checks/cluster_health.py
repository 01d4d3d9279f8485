"""Checks a running cluster, by asking every node."""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice, pairwise
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_mnist.checks import Check, preflight, probe
from ray_mnist.errors import RequestError, one_line
from ray_mnist.launch.connection import address_to_join
from ray_mnist.ray_internals import UNEXPECTED_TERMINATION, pending_nodes
from ray_mnist.run.folder import RunFolder

ANSWER_TIMEOUT_S = 60
CLOCK_TOLERANCE_S = 1
BLOCK_BYTES = 64_000_000
SLOW_MB_PER_S = 10
NCCL = ("nccl", "cuda")  # torch's back end and its device
GRADIENT_BYTES = 64_000_000
Probes = dict[str, Any]  # by the node's name


def checks(address: str | None, storage_path: str) -> Iterator[Check]:
    """Checks the cluster at `address`, or the one that this machine is part of.

    Raises:
        RequestError: there is no such cluster, it cannot be joined, or it answers no more.
    """
    address = address_to_join(address)
    if address in (None, "local"):
        raise RequestError("No Ray cluster runs here: start one with `ray start --head`, or name one with --address.")
    with joined(address):
        nodes = ray.nodes()
        yield "nodes", [*absent(nodes), *pending_nodes(ray.get_runtime_context().gcs_address)]
        alive = {name_of(node): node for node in nodes if node["Alive"]}
        probes = {name: start_probe(node["NodeID"]) for name, node in alive.items()}
        versions, silent = ask(probes, "versions")
        yield f"answers from {len(probes)} nodes", silent
        probes = {name: probes[name] for name in versions}
        yield "versions", [*version_findings(versions)]
        yield authentication(probes)
        yield "clocks", [*clock_findings(probes)]
        having = {name: probes[name] for name in probes if alive[name]["Resources"].get("GPU")}
        yield "GPUs", [*gpu_findings(having, alive), *driver_findings(having)]
        yield f"storage path {storage_path}", [*storage_findings(storage_path)]
        if len(probes) > 1:
            yield bandwidth(probes)
        if len(having) > 1:
            yield gradients({name: alive[name] for name in having})


@contextmanager
def joined(address: str) -> Iterator[None]:
    """This process is part of the cluster for the time of the `with`."""
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise RequestError(f"the Ray cluster at {address} cannot be joined: {one_line(error)}") from error
    try:
        yield
    except ray.exceptions.RayError as error:
        raise RequestError(f"the Ray cluster at {address} answers no more: {one_line(error)[:200]}") from error
    finally:
        ray.shutdown()


def name_of(node: Mapping[str, Any]) -> str:
    """The node's host, and what tells two nodes of one host apart."""
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {node['NodeID'][:6]})"


def absent(nodes: list[dict[str, Any]]) -> Iterator[str]:
    """Nodes that died, not on purpose as by an autoscaler, and whose machines have not joined again."""
    here = {node["NodeManagerAddress"] for node in nodes if node["Alive"]}
    for node in nodes:
        if node["DeathReason"] == UNEXPECTED_TERMINATION and node["NodeManagerAddress"] not in here:
            why = node["DeathReasonMessage"]
            mend = "start its machine and Ray on it again, unless another has taken its place"
            yield f"node {name_of(node)} died ({why}): {mend}."


def start_probe(node_id: str, gpus: int = 0) -> Any:
    """A Probe on that node and no other, beside whatever else runs there; one with GPUs waits until they are free."""
    ray.cloudpickle.register_pickle_by_value(probe)
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(probe.Probe).options(num_cpus=0, num_gpus=gpus, scheduling_strategy=there).remote()


def ask(probes: Probes, question: str, *arguments: Any) -> tuple[dict[str, Any], list[str]]:
    """The answers of the nodes, and a finding for each that gave none."""
    asked = {name: getattr(node, question).remote(*arguments) for name, node in probes.items()}
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    answers, findings = {}, []
    for name, answer in asked.items():
        try:
            answers[name] = ray.get(answer, timeout=max(0, deadline - time.monotonic()))
        except ray.exceptions.GetTimeoutError:
            why = f"did not answer in {ANSWER_TIMEOUT_S} s (asked: {question})"
            findings.append(f"node {name} {why}: look at `ray status`, and at /tmp/ray/session_latest/logs there.")
        except ray.exceptions.RayError as error:
            why = f"could not answer (asked: {question}): {one_line(error)[:200]}"
            findings.append(f"node {name} {why}: run scripts/setup there, and start its Ray again.")
    return answers, findings


def version_findings(versions: Mapping[str, dict[str, str]]) -> Iterator[str]:
    """Nodes with another Python, Ray, torch or ray_mnist than this machine."""
    here = probe.versions()
    for name, there in versions.items():
        for package in here:
            if there[package] != here[package]:
                differs = f"has {package} {there[package]}, and this machine {here[package]}"
                yield f"node {name} {differs}: copy the project there, run scripts/setup, and start its Ray again."


def authentication(probes: Probes) -> Check:
    """Whether a token is asked for, on every node alike."""
    here = probe.authentication()
    modes, findings = ask(probes, "authentication")
    for name, mode in modes.items():
        if mode != here:
            differs = f"has RAY_AUTH_MODE {mode}, and this machine {here}"
            mend = "start Ray again on every node with RAY_AUTH_MODE=token and the same ~/.ray/auth_token"
            findings.append(f"node {name} {differs}: {mend}.")
    return f"token authentication ({here})", findings


def clock_findings(probes: Probes) -> Iterator[str]:
    """Nodes whose time, when they were asked, was neither before nor after this machine's by so much."""
    for name, node in probes.items():
        asked = time.time()
        answers, silent = ask({name: node}, "clock")
        answered = time.time()
        yield from silent
        for there in answers.values():
            off = max(asked - there, there - answered)
            if off > CLOCK_TOLERANCE_S:
                yield f"node {name} has a clock {off:.1f} s off this machine's: turn on NTP (chrony) on both."


def gpu_findings(probes: Probes, nodes: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    """Nodes of which Ray believes that they have more GPUs than torch can use there."""
    promised = {name: nodes[name]["Resources"]["GPU"] for name in probes}
    counts, silent = ask(probes, "gpus")
    yield from silent
    for name, count in counts.items():
        if count < promised[name]:
            few = f"has {promised[name]:g} GPUs for Ray, but torch can use {count}"
            yield f"node {name} {few}: mend its driver (nvidia-smi), or leave --num-gpus out of its `ray start`."


def driver_findings(probes: Probes) -> Iterator[str]:
    """Nodes whose driver is older than the CUDA that torch was built for; a driver serves all CUDA of one number."""
    found, silent = ask(probes, "cuda")
    yield from silent
    for name, (built, driven) in found.items():
        if built is None:
            mend = "install torch as requirements.lock has it, with scripts/setup"
            yield f"node {name} has GPUs for Ray, and a torch that was built without CUDA: {mend}."
        elif driven and int(driven.partition(".")[0]) < int(built.partition(".")[0]):
            old = f"has a driver for CUDA {driven} at most, and a torch that was built for CUDA {built}"
            yield f"node {name} {old}: update the driver (nvidia-smi shows it), or install a torch for that CUDA."


def storage_findings(storage_path: str) -> Iterator[str]:
    """What keeps this machine or a node from writing there, or from reading what another wrote."""
    try:
        folder = RunFolder(storage_path, "doctor")
        preflight.check_storage(folder, preflight.PROBE_BYTES)
        preflight.check_shared_storage(folder, preflight.Cluster.current())
    except RequestError as error:
        yield str(error)


def bandwidth(probes: Probes) -> Check:
    """Sends a block from each node to the next through Ray's object store, one at a time."""
    speeds, findings = [], []
    for (sender, node), (receiver, following) in pairwise([*probes.items(), *islice(probes.items(), 1)]):
        block = node.block.remote(BLOCK_BYTES)
        ray.wait([block], timeout=ANSWER_TIMEOUT_S, fetch_local=False)
        answers, silent = ask({receiver: following}, "seconds_to_fetch", [block])
        findings += silent
        for seconds in answers.values():
            speeds.append(BLOCK_BYTES / 1e6 / seconds)
            if speeds[-1] < SLOW_MB_PER_S:
                slow = f"from node {sender} to node {receiver} go {speeds[-1]:.1f} MB/s"
                findings.append(f"{slow}, and training sends its gradients this way: put both in one zone or network.")
    return f"bandwidth between neighbours (MB/s: {', '.join(f'{speed:.0f}' for speed in speeds)})", findings


def gradients(nodes: Mapping[str, dict[str, Any]]) -> Check:
    """Has each node with GPUs and the next one add up numbers, as workers do with gradients, two at a time."""
    speeds, findings = [], []
    pairs = len(nodes) if len(nodes) > 2 else 1
    for pair in islice(pairwise([*nodes, *nodes]), pairs):
        probes = {name: start_probe(nodes[name]["NodeID"], gpus=1) for name in pair}
        try:
            speeds.append(GRADIENT_BYTES / 1e6 / seconds_to_add(probes))
        except RequestError as error:
            findings.append(str(error))
        finally:
            for node in probes.values():
                ray.kill(node)
    return f"NCCL between neighbours (MB/s: {', '.join(f'{speed:.0f}' for speed in speeds)})", findings


def seconds_to_add(probes: Probes) -> float:
    """The seconds that two nodes take to add up so many bytes of each. Raises RequestError if they cannot."""
    addresses, _ = ask(probes, "free_address")
    if busy := [name for name in probes if name not in addresses]:
        raise RequestError(f"node {busy[0]} has had no GPU free to try NCCL with: run the doctor again later.")
    first, second = probes
    settings = (addresses[first], *NCCL, GRADIENT_BYTES, ANSWER_TIMEOUT_S / 2)
    sums = [node.all_reduce.remote(rank, *settings) for rank, node in enumerate(probes.values())]
    try:
        return max(ray.get(sums, timeout=ANSWER_TIMEOUT_S))
    except (ray.exceptions.GetTimeoutError, ray.exceptions.RayError) as error:
        why = f"cannot add up gradients over {NCCL[0]} ({one_line(error)[-200:]})"
        mend = "open all ports between them, or name their network in NCCL_SOCKET_IFNAME"
        raise RequestError(f"node {first} and node {second} {why}: {mend}.") from error
