"""A TorchTrainer inside a trial of Ray Tune, whose workers live in the trial's own placement group.

Ray's own keeps the workers of a run in a placement group of their own. That group outlives the run where Tune kills
the trial, until Ray's state API, if it can be reached, tells a watchdog that the run is gone; and the trial holds its
own resources while it waits for those of its workers. Here Tune reserves trial and workers together or not at all, and
frees them together when the trial ends, however it ends: the workers' owner is gone then, and Ray ends them with it.

Ray Train has no public way to name the placement group, so this file is the one place that reaches into it.
"""

from typing import Any

import ray
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.execution.worker_group.placement_group_handle import DefaultPlacementGroupHandle
from ray.util import get_current_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

TRIAL_CPU = 0.01  # a trial cannot ask for nothing


def bundles(num_workers: int, worker: dict[str, float]) -> list[dict[str, float]]:
    """What a trial reserves: the trial itself, then each of its workers; a lone worker is the trial itself."""
    return [worker] if num_workers <= 1 else [{"CPU": TRIAL_CPU}] + [worker] * num_workers


def of_the_trial() -> PlacementGroup:
    """The placement group that this process is in."""
    found = get_current_placement_group()
    assert found is not None, "a nested run needs a trial around it"
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


class NestedWorkerGroup(WorkerGroup):
    """Workers in the bundles after the trial's own."""

    def _create_placement_group(self, *_: Any) -> BorrowedPlacementGroup:
        return BorrowedPlacementGroup(of_the_trial())

    def _create_workers(self, num_workers: int, *arguments: Any, **options: Any) -> Any:
        options.setdefault("placement_group_bundle_indices", list(range(1, num_workers + 1)))
        return super()._create_workers(num_workers, *arguments, **options)


class NestedController(TrainController):
    """Ray Train's controller, inside the trial's placement group."""

    worker_group_cls = NestedWorkerGroup


class NestedTorchTrainer(TorchTrainer):
    """See the top of this file."""

    def _create_default_callbacks(self) -> list[Any]:
        # The watchdog, a detached actor that nobody would end where the state API is out of reach.
        return [
            callback
            for callback in super()._create_default_callbacks()
            if not isinstance(callback, PlacementGroupCleanerCallback)
        ]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        trial = PlacementGroupSchedulingStrategy(of_the_trial(), placement_group_bundle_index=0)
        arguments["scaling_policy"] = PlacedAlready(self.scaling_config)
        settings = {"env_vars": get_env_vars_to_propagate()}
        actor: Any = ray.remote(num_cpus=0, scheduling_strategy=trial, runtime_env=settings)(NestedController)
        controller = actor.remote(**arguments)
        ray.get(controller.run.remote())
        return ray.get(controller.get_result.remote())
