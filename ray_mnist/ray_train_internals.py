"""All that this package uses of Ray Train beyond its public API, and why: to look at with a new Ray.

tests/test_internals.py names what a new release moved.
"""

import socket
from collections.abc import Callable
from typing import Any

import ray
from ray._private.state import state as global_state
from ray._private.worker import global_worker
from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.execution.worker_group.placement_group_handle import DefaultPlacementGroupHandle
from ray.util import get_current_placement_group
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from ray_mnist.launch.exchange import Exchange
from ray_mnist.ray_controller_internals import KeepingController, LastingController, WatchedGroup
from ray_mnist.ray_internals import ray_was_started_here
from ray_mnist.ray_scaling_internals import NoAutoscaler, policies


def output_files() -> str:
    """The files that Ray keeps of what this worker process writes to stdout and stderr, and their machine."""
    written = global_worker.get_out_file_path(), global_worker.get_err_file_path()
    return f"{' and '.join(written)} on {socket.gethostname()}"


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


class AbortableTorchTrainer(TorchTrainer):
    """A TorchTrainer whose run can be ended from another thread; Ray's own answers Ctrl-C in the main thread only."""

    controller_class: type[LastingController] = KeepingController
    controller: Any = None  # of this run; before it, one that an earlier run has left
    clean: Callable[[], bool] | None = None  # see `LastingController`
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
            settings = {"env_vars": get_env_vars_to_propagate()} | self.run_config.worker_runtime_env
            actor: Any = ray.remote(num_cpus=0, scheduling_strategy=self.controller_placement(), runtime_env=settings)
            self.controller = actor(self.controller_class).remote()
        if self.aborted:  # before there was one to end
            self.abort()
        ray.get(self.controller.begin.remote(self.clean, **arguments))
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
