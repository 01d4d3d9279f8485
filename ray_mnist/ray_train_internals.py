"""All that this package uses of Ray Train beyond its public API, and why: to look at with a new Ray.

tests/test_internals.py names what a new release moved.
"""

import socket
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, Protocol

import ray
from ray._private.state import state as global_state
from ray._private.worker import global_worker
from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]
from ray.exceptions import RayActorError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import Worker, WorkerGroup
from ray.train.v2._internal.execution.worker_group.placement_group_handle import DefaultPlacementGroupHandle
from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus
from ray.util import get_current_placement_group
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from ray_mnist.ray_internals import end_workers, worker_name


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


class StartedWorkerGroup(WorkerGroup):
    """Takes the workers that `start_workers` has started, if they live."""

    def _create_workers(
        self, num_workers: int, placement_group: Any, resources_per_worker: Any, *others: Any, **more: Any
    ) -> Any:
        try:
            actors = [ray.get_actor(worker_name(rank)) for rank in range(num_workers)]
            about: list[Any] = ray.get([actor.get_metadata.remote() for actor in actors])
        except (ValueError, RayActorError):  # there are none, or none any more
            return super()._create_workers(num_workers, placement_group, resources_per_worker, *others, **more)
        ranks = zip(range(num_workers), actors, about, strict=True)
        workers = [
            Worker(actor, one, resources_per_worker, placement_group_bundle_index=rank) for rank, actor, one in ranks
        ]
        return self._assign_worker_ranks(workers)


class StartedController(TrainController):
    """Ray Train's controller, of workers that may have been started already."""

    worker_group_cls = StartedWorkerGroup


class AbortableTorchTrainer(TorchTrainer):
    """A TorchTrainer whose run can be ended from another thread; Ray's own answers Ctrl-C in the main thread only."""

    controller_class: type[TrainController] = StartedController
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
        end_workers()  # which are in no placement group

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
