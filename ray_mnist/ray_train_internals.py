"""All that this package uses of Ray Train beyond its public API, and why: to look at with a new Ray.

tests/test_internals.py names what a new release moved.
"""

import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import ray
from ray._private.state import state as global_state
from ray._private.worker import global_worker
from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]
from ray.exceptions import RayActorError, RayError
from ray.train.constants import TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.controller.state import FinishedState
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import Worker, WorkerGroup
from ray.train.v2._internal.execution.worker_group.placement_group_handle import DefaultPlacementGroupHandle
from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus
from ray.train.v2._internal.execution.worker_group.state import WorkerGroupState
from ray.util import get_current_placement_group
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from ray_mnist.launch.exchange import Exchange
from ray_mnist.launch.spares import Spares
from ray_mnist.launch.stalls import Ask
from ray_mnist.ray_internals import end_workers, ray_was_started_here, worker_name
from ray_mnist.ray_scaling_internals import NoAutoscaler, asking, policies

ANSWER_S = 10  # in which a worker that is well answers
LEAVE_S = 10  # in which one that is well leaves its process group; for one that is stopped, Ray waits 30 s


def output_files() -> str:
    """The files that Ray keeps of what this worker process writes to stdout and stderr, and their machine."""
    written = global_worker.get_out_file_path(), global_worker.get_err_file_path()
    return f"{' and '.join(written)} on {socket.gethostname()}"


class Watch(Protocol):
    """What `WatchedGroup` needs of a `StallWatch`."""

    def begin(self, workers: list[tuple[str, Ask]]) -> None:
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
        self.watch.begin([(worker.metadata.hostname, asking(worker)) for worker in worker_group.get_workers()])

    def after_worker_group_poll_status(self, worker_group_status: WorkerGroupPollStatus) -> None:
        """Adds the watch's errors to those that Ray has found, if those are none."""
        if not worker_group_status.errors:
            for rank, error in self.watch.look().items():
                worker_group_status.worker_statuses[rank].error = error


@dataclass(frozen=True)
class KeptWorkers(WorkerGroupState):
    """Those of a run that ended well, with what they hold of the cluster, for the controller's next run."""

    clean: Callable[[], bool]  # what each answers, in its process
    answers: list[Any] = field(default_factory=list)

    def shutdown(self) -> None:
        """Leaves them; Ray's own ends them."""
        for worker in self.workers:
            worker.actor.shutdown.remote()  # which has Ray's callbacks there put an end to what they do
        ray.kill(self.sync_actor)
        self.answers.extend(worker.execute_async(self.clean) for worker in self.workers)
        StartedWorkerGroup.kept = self

    def serve(self) -> bool:
        """Whether all of them live, and can do another run."""
        try:
            ray.get([worker.actor.get_metadata.remote() for worker in self.workers], timeout=ANSWER_S)
            return all(ray.get(self.answers, timeout=ANSWER_S))
        except RayError:
            return False


class StartedWorkerGroup(WorkerGroup):
    """Takes the workers that the run before has left, or those that were started already, if they live."""

    kept: ClassVar[KeptWorkers | None] = None
    spares: ClassVar[Spares | None] = None
    taken: list[Worker] | None = None

    def keep(self, clean: Callable[[], bool]) -> None:
        """Has a shutdown leave the workers to the next run, if `clean` is true in all of their processes."""
        self._worker_group_state = KeptWorkers(**vars(self._worker_group_state), clean=clean)

    def _create_placement_group(self, *arguments: Any) -> Any:
        kept, StartedWorkerGroup.kept = self.kept, None
        if kept is not None and kept.serve():
            self.taken = kept.workers
            return kept.placement_group_handle
        if kept is not None:
            super(KeptWorkers, kept).shutdown()
        return super()._create_placement_group(*arguments)

    def _create_workers(
        self, num_workers: int, placement_group: Any, resources_per_worker: Any, *others: Any, **more: Any
    ) -> Any:
        if self.taken:
            return self._assign_worker_ranks(self.taken)
        nodes = placement_group_table(placement_group)["bundles_to_node_id"]
        started = {bundle: self.started_on(nodes[bundle], bundle) for bundle in range(num_workers)}
        workers = [
            Worker(*found, resources_per_worker, placement_group_bundle_index=bundle)
            for bundle, found in started.items()
            if found
        ]
        new = [bundle for bundle, found in started.items() if not found]
        if new:
            workers += super()._create_workers(len(new), placement_group, resources_per_worker, new, **more)
        return self._assign_worker_ranks(workers)

    def started_on(self, node: str, bundle: int) -> tuple[Any, Any] | None:
        """A worker on the node that was started already, and what it tells of itself; None if there is none."""
        with suppress(ValueError, RayActorError):
            actor = ray.get_actor(worker_name(bundle))
            return actor, ray.get(actor.get_metadata.remote())
        return self.spares.take(node) if self.spares else None

    def poll_status(self, *arguments: Any, **options: Any) -> WorkerGroupPollStatus:
        """Has spare workers started, as long as all is well."""
        status = super().poll_status(*arguments, **options)
        if self.spares and not status.errors:
            self.spares.look([worker.metadata.node_id for worker in self.get_workers()])
        return status


class LastingController(TrainController):
    """Ray Train's controller, for one run after the other: its process imports torch, which takes seconds."""

    clean: Callable[[], bool] | None = None

    def __init__(self) -> None:
        """There is no run yet."""

    def begin(self, clean: Callable[[], bool] | None, spares: Spares | None, **arguments: Any) -> None:
        """Takes Ray's own arguments for the next run; its workers are kept with `clean`, see `StartedWorkerGroup`."""
        self.clean, StartedWorkerGroup.spares = clean, spares
        super().__init__(**arguments)


class StartedController(LastingController):
    """A controller of workers that may have been started already, and may be exchanged."""

    worker_group_cls = StartedWorkerGroup

    def _start_worker_group(self, *arguments: Any, **options: Any) -> None:
        super()._start_worker_group(*arguments, **options)
        policy: Any = self._scaling_policy
        group: Any = self._worker_group
        policy.follow(group.get_workers())

    def _shutdown_worker_group(self) -> None:
        next_state = getattr(self.get_state(), "next_state", None)
        if next_state and StartedWorkerGroup.spares:  # the run ends
            StartedWorkerGroup.spares.end()
        if self.clean and isinstance(next_state, FinishedState):
            group: Any = self.get_worker_group()
            group.keep(self.clean)
        super()._shutdown_worker_group()


def end_run(controller: Any) -> None:
    """Ends a controller and its workers at once, also where the cluster goes on.

    The controller's own `abort` waits for workers that are starting. Their placement group outlives a controller
    that is killed, and keeps them alive.
    """
    ray.kill(controller)
    # The public table does not say who made a group.
    for packed in global_state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(packed)
        if group.creator_actor_id == controller._actor_id.binary():
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
    end_workers()  # which are in no placement group


class AbortableTorchTrainer(TorchTrainer):
    """A TorchTrainer whose run can be ended from another thread; Ray's own answers Ctrl-C in the main thread only."""

    controller_class: type[LastingController] = StartedController
    controller: Any = None  # of this run; before it, one that an earlier run has left
    clean: Callable[[], bool] | None = None  # see `LastingController`
    spares: Spares | None = None  # likewise
    aborted = False
    exchange: Exchange  # of its workers

    def abort(self) -> None:
        """Ends the run."""
        self.aborted = True
        if self.controller is not None:
            end_run(self.controller)

    def controller_placement(self) -> Any:
        """On the node of this process."""
        return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)

    def _create_default_callbacks(self) -> list[Any]:
        # The watchdog that removes the placement group of a controller that died, as `abort` does: a detached actor,
        # that nobody would end where Ray's state API is out of reach. And the actor for Ray's data sets, of which there
        # are none: it takes each start a second, and each worker the import of Ray Data.
        left_out = PlacementGroupCleanerCallback, DatasetsCallback
        kept = [each for each in super()._create_default_callbacks() if not isinstance(each, left_out)]
        # The watch first: what it finds is for the run's UserCallback, too.
        return sorted(kept, key=lambda callback: not isinstance(callback, WatchedGroup))

    def policies(self) -> dict[str, Any]:
        """What decides how many workers there are, and what is tried again, in place of Ray's own."""
        return policies(self.scaling_config, self.run_config.failure_config, self.exchange, here=ray_was_started_here())

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        arguments |= self.policies()
        if self.controller is None:
            settings = {
                "env_vars": get_env_vars_to_propagate() | {TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S: f"{LEAVE_S}"}
            }
            actor: Any = ray.remote(num_cpus=0, scheduling_strategy=self.controller_placement(), runtime_env=settings)
            self.controller = actor(self.controller_class).remote()
        if self.aborted:  # before there was one to end
            self.abort()
        ray.get(self.controller.begin.remote(self.clean, self.spares, **arguments))
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
    """Asks no autoscaler for what the trial has: the actor that Ray's own starts for that would outlive the sweep."""

    _coordinator_client: Any

    def after_controller_start(self, *_: Any) -> None:
        """Ray's own asks."""
        self._coordinator_client = NoAutoscaler()


class TrialWorkerGroup(WorkerGroup):
    """Workers in the bundles after the trial's own."""

    def _create_placement_group(self, *_: Any) -> BorrowedPlacementGroup:
        return BorrowedPlacementGroup(trial_placement_group())

    def _create_workers(self, num_workers: int, *arguments: Any, **options: Any) -> Any:
        options.setdefault("placement_group_bundle_indices", list(range(1, num_workers + 1)))
        return super()._create_workers(num_workers, *arguments, **options)


class TrialController(LastingController):
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

    def policies(self) -> dict[str, Any]:
        """As many workers as the trial has room for, from its start to its end."""
        return {"scaling_policy": PlacedAlready(self.scaling_config)}
