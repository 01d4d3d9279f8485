"""All that this package uses of Ray beyond its public API, and why: the one file to look at with a new Ray.

tests/test_internals.py names what a new release moved.
"""

import copy
import io
import json
import socket
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Protocol

import grpc  # type: ignore[import-untyped]
import jsonschema  # type: ignore[import-untyped]
import ray
import ray.autoscaler
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.grpc_utils import init_grpc_channel
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray._private.state import state as global_state
from ray._private.utils import read_ray_address
from ray._private.worker import global_worker
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]
from ray.core.generated.common_pb2 import NodeDeathInfo  # type: ignore[attr-defined]
from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]
from ray.experimental.internal_kv import _internal_kv_get
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME, get_env_vars_to_propagate
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.execution.worker_group.placement_group_handle import DefaultPlacementGroupHandle
from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus
from ray.util import get_current_placement_group
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from ray_mnist.errors import one_line

CONNECT_TIMEOUT_S = 5
ANSWER_TIMEOUT_S = 15
SNAPSHOT = CHECKPOINT_MANAGER_SNAPSHOT_FILENAME  # what Ray Train remembers of a run, in its folder
SCHEMA = json.loads(Path(ray.autoscaler.__file__).with_name("ray-schema.json").read_text())  # of a cluster file
FIRST_AUTOSCALER = "RAY_enable_autoscaler_v2=0"  # where `ray start --head` would take the second
UNEXPECTED_TERMINATION: int = NodeDeathInfo.Reason.Value("UNEXPECTED_TERMINATION")  # the DeathReason in ray.nodes()


# Joining a cluster


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


# Ray Train


def output_files() -> str:
    """The files that Ray keeps of what this worker process writes to stdout and stderr, and their machine."""
    written = global_worker.get_out_file_path(), global_worker.get_err_file_path()
    return f"{' and '.join(written)} on {socket.gethostname()}"


class Watch(Protocol):
    """What `WatchedGroup` needs of a `StallWatch`."""

    def begin(self, workers: list[tuple[str, Callable[[Callable[[], Any]], "Future[Any]"]]]) -> None:
        """Takes each rank's host, and what has its process call a function."""

    def look(self) -> Mapping[int, Exception]:
        """The errors that workers are to have failed with."""


class WatchedGroup(WorkerGroupCallback):
    """Has the controller ask a watch, each time that it looks after the workers, for those that are to have failed.

    Of Ray's public callbacks, none is called while all is well, or has the workers.
    """

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def after_worker_group_training_start(self, worker_group: WorkerGroup) -> None:
        """Begins to watch, each time that workers are started."""

        def asking(worker: Any) -> Any:
            return lambda function: worker.execute_async(function).future()

        self.watch.begin([(worker.metadata.hostname, asking(worker)) for worker in worker_group.get_workers()])

    def after_worker_group_poll_status(self, worker_group_status: WorkerGroupPollStatus) -> None:
        """Adds the watch's errors to those that Ray has found, if those are none."""
        if not worker_group_status.errors:
            for rank, error in self.watch.look().items():
                worker_group_status.worker_statuses[rank].error = error


class AbortableTorchTrainer(TorchTrainer):
    """A TorchTrainer whose run can be ended from another thread; Ray's own answers Ctrl-C in the main thread only."""

    controller_class: type[TrainController] = TrainController
    controller: Any = None
    aborted = False

    def abort(self) -> None:
        """Ends the controller and its workers at once, also where the cluster goes on.

        The controller's own `abort` waits for workers that are starting. Their placement group outlives a controller
        that is killed, and keeps them alive.
        """
        self.aborted = True
        if self.controller is None:
            return
        ray.kill(self.controller)
        # The public table does not say who made a group.
        for packed in global_state._connect_and_get_accessor().get_placement_group_table():
            group = PlacementGroupTableData.FromString(packed)
            if group.creator_actor_id == self.controller._actor_id.binary():
                remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))

    def controller_placement(self) -> Any:
        """On the node of this process."""
        return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)

    def _create_default_callbacks(self) -> list[Any]:
        # The watchdog that removes the placement group of a controller that died, as `abort` does: a detached actor,
        # that nobody would end where Ray's state API is out of reach.
        kept = [
            callback
            for callback in super()._create_default_callbacks()
            if not isinstance(callback, PlacementGroupCleanerCallback)
        ]
        # The watch first: what it finds is for the run's UserCallback, too.
        return sorted(kept, key=lambda callback: not isinstance(callback, WatchedGroup))

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        settings = {"env_vars": get_env_vars_to_propagate()}
        actor: Any = ray.remote(num_cpus=0, scheduling_strategy=self.controller_placement(), runtime_env=settings)
        self.controller = actor(self.controller_class).remote(**arguments)
        if self.aborted:  # before there was one to end
            self.abort()
        ray.get(self.controller.run.remote())
        return ray.get(self.controller.get_result.remote())


def trial_placement_group() -> PlacementGroup:
    """The placement group that this process is in."""
    found = get_current_placement_group()
    assert found is not None, "this runs inside a trial"
    return found


class BorrowedPlacementGroup(DefaultPlacementGroupHandle):
    """The trial's, which is Tune's to remove."""

    def shutdown(self) -> None:
        """Leaves it."""


class PlacedAlready(FixedScalingPolicy):
    """Asks no autoscaler for what the trial has: Ray's own would start an actor for that, which outlives the sweep."""

    def _send_resource_request(self) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass

    def _cancel_resource_request(self) -> None:
        pass


class TrialWorkerGroup(WorkerGroup):
    """Workers in the bundles after the trial's own."""

    def _create_placement_group(self, *_: Any) -> BorrowedPlacementGroup:
        return BorrowedPlacementGroup(trial_placement_group())

    def _create_workers(self, num_workers: int, *arguments: Any, **options: Any) -> Any:
        options.setdefault("placement_group_bundle_indices", list(range(1, num_workers + 1)))
        return super()._create_workers(num_workers, *arguments, **options)


class TrialController(TrainController):
    """Ray Train's controller, inside the trial's placement group."""

    worker_group_cls = TrialWorkerGroup


class TrialTorchTrainer(AbortableTorchTrainer):
    """A TorchTrainer inside a trial of Ray Tune, whose workers live in the trial's own placement group.

    Ray's own keeps the workers of a run in a placement group of their own. That group outlives the run where Tune
    kills the trial, until Ray's state API, if it can be reached, tells a watchdog that the run is gone; and the trial
    holds its own resources while it waits for those of its workers. Here Tune reserves trial and workers together or
    not at all, and frees them together when the trial ends, however it ends: the workers' owner is gone then, and Ray
    ends them with it.
    """

    controller_class = TrialController

    def controller_placement(self) -> Any:
        """In the trial's own bundle."""
        return PlacementGroupSchedulingStrategy(trial_placement_group(), placement_group_bundle_index=0)

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        return super()._initialize_and_run_controller(
            **arguments | {"scaling_policy": PlacedAlready(self.scaling_config)}
        )
