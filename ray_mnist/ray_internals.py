"""All that this package uses of Ray beyond its public API, and why: to look at with a new Ray.

That of Ray Train is in ray_train_internals.py, since it imports torch, which takes seconds.

tests/test_internals.py names what a new release moved.
"""

import copy
import io
import json
import os
import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]
import jsonschema  # type: ignore[import-untyped]
import ray
import ray.autoscaler
from ray._private import parameter, services
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.grpc_utils import init_grpc_channel
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray._private.utils import read_ray_address
from ray._private.worker import global_worker
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]
from ray.core.generated.common_pb2 import NodeDeathInfo  # type: ignore[attr-defined]
from ray.experimental.internal_kv import _internal_kv_get
from ray.util.placement_group import PlacementGroup

from ray_mnist.errors import one_line

CONNECT_TIMEOUT_S = 5
ANSWER_TIMEOUT_S = 15
SCHEMA = json.loads(Path(ray.autoscaler.__file__).with_name("ray-schema.json").read_text())  # of a cluster file
FIRST_AUTOSCALER = "RAY_enable_autoscaler_v2=0"  # where `ray start --head` would take the second
# Ray would start a process for each CPU, of which a run takes none: its own have other settings.
NO_IDLE_WORKERS: dict[str, Any] = {"_system_config": {"prestart_worker_first_driver": False}}
UNEXPECTED_TERMINATION: int = NodeDeathInfo.Reason.Value("UNEXPECTED_TERMINATION")  # the DeathReason in ray.nodes()


# Starting a local Ray, or joining another


@contextmanager
def unseeded() -> Iterator[None]:
    """Has Python's `random`, with which `ray.init` draws ids and ports, draw what it draws in no other process.

    Two drivers of a cluster that have the same seed, and so the same ids, take each other's messages, and keep its head
    busy: 0.7 of a core.
    """
    state = random.getstate()
    random.seed()
    try:
        yield
    finally:
        random.setstate(state)


@contextmanager
def local_ray(dashboard: bool, **settings: Any) -> Iterator[None]:
    """Has a local Ray that `ray.init` starts have these settings, and little else that a run here has no use for.

    Without a dashboard that is: no autoscaler, which has no nodes to add, nothing that follows logs for the driver, and
    no server to count who uses Ray. Each imports for a second while the workers do, and Ray waits for the last to start
    and for the first to end. `ray.init` has no options for these.
    """
    params, start_api_server = parameter.RayParams, services.start_api_server
    if not dashboard:
        settings |= {"no_monitor": True, "include_log_monitor": False}
        services.start_api_server = lambda *_, **__: ("", None)
    parameter.RayParams = partial(params, **settings)  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        parameter.RayParams = params  # type: ignore[misc]
        services.start_api_server = start_api_server


def runtime_env_of_submitted_job() -> dict[str, Any]:
    """What `ray job submit` was given, if it started this process: `ray.init` refuses another `py_executable`."""
    job: dict[str, Any] = json.loads(os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}"))
    return job.get("runtime_env") or {}


def show_token() -> None:
    """What `ray start` does, and `ray.init` for a cluster it finds itself: show the token if this user has one."""
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def this_machines_address() -> str | None:
    """What `ray start` leaves in a file for `ray.init()` to find; a cluster that died leaves the file behind."""
    address: str | None = read_ray_address()
    return address


def unreachable(address: str) -> str | None:
    """Why no Ray head answers at host:port, or None: with anything else that listens there, Ray tries for ever."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        return one_line(error)
    with init_grpc_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        head = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        try:
            request = gcs_service_pb2.CheckAliveRequest()  # type: ignore[attr-defined]
            head.CheckAlive(request, timeout=ANSWER_TIMEOUT_S)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                return "it asks for a token: copy ~/.ray/auth_token from its head"
            return "something listens there, but no Ray head"
    return None


def ray_was_started_here() -> bool:
    """Whether the Ray that this process is connected to was started by it, and has this machine alone."""
    node = global_worker.node
    return node is not None and bool(node.is_head())


# The autoscaler of the cluster that this process is connected to


def has_autoscaler() -> bool:
    """Whether an autoscaler that says what it cannot add looks after the cluster: version 2, which `ray up` starts."""
    return bool(is_autoscaler_v2(fetch_from_server=True))


def nodes_are_joining() -> bool:
    """Whether an autoscaler of version 1, as `cluster/local.yaml` has it, is bringing up nodes."""
    report = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or "{}").get("autoscaler_report", {})
    return bool(report.get("pending_nodes") or report.get("pending_launches"))


def is_beyond_the_autoscaler(group: PlacementGroup) -> bool:
    """Whether the autoscaler has found that it cannot add the nodes that the placement group waits for."""
    status = GetClusterStatusReply.FromString(global_worker.gcs_client.get_cluster_status())  # type: ignore[attr-defined]
    infeasible = status.autoscaling_state.infeasible_gang_resource_requests
    return any(request.details.startswith(group.id.hex()) for request in infeasible)


def somebody_waits() -> bool:
    """Whether tasks, actors or placement groups wait for resources of the cluster, whoever's they are."""
    status = GetClusterStatusReply.FromString(global_worker.gcs_client.get_cluster_status())  # type: ignore[attr-defined]
    state = status.cluster_resource_state
    return bool(state.pending_resource_requests or state.pending_gang_resource_requests)


def pending_nodes(address: str) -> Iterator[str]:
    """What the autoscaler of the cluster at `address` waits for, or failed to launch; nothing where there is none.

    `ray status` shows it too, but only as text.
    """
    status = get_cluster_status(address)
    for node in status.pending_nodes:
        why = node.details or "no details"
        yield f"a node of type {node.ray_node_type_name} is still starting ({why}): wait, then look at `ray status`."
    for launch in (*status.pending_launches, *status.failed_launches):
        how = "failed" if launch.failed_ts_s else "is under way"
        what = f"the launch of {launch.count} nodes of type {launch.ray_node_type_name} {how}"
        yield f"{what} ({launch.details or 'no details'}): look at `ray status`, and at monitor.log on the head."


# Cluster files: `ray up` has no dry run, so its first steps, which fill in defaults and validate, are taken one by one


def schema_errors(config: dict[str, Any]) -> Iterator[jsonschema.ValidationError]:
    """All that Ray's own schema finds; `validate_config` stops at the first."""
    written = json.loads(json.dumps(config, default=str))  # in JSON, whose schema it is, every key is text
    written.pop("min_workers", None)  # as Ray does first
    yield from jsonschema.Draft7Validator(SCHEMA).iter_errors(written)


def prepare_cluster_file(config: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The cluster file with Ray's defaults filled in, as far as Ray comes, and why it refuses the file, if it does."""
    whole, hidden = config, io.StringIO()
    try:
        with redirect_stdout(hidden), redirect_stderr(hidden):
            whole = prepare_config(copy.deepcopy(config))
            validate_config(whole)
    except Exception as error:  # of many kinds, KeyError and AssertionError among them
        return whole, f"Ray refuses the file, and says why: {type(error).__name__}: {one_line(error)}"
    return whole, None
