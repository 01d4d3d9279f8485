"""All that this package uses of how Ray Train scales beyond its public API, and why: to look at with a new Ray.

tests/test_internals.py names what a new release moved.
"""

import time
from typing import Any

from ray._private.state import available_resources_per_node
from ray._private.state import state as global_state
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    FixedScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingPolicy,
)
from ray.train.v2._internal.execution.worker_group import Worker

from ray_mnist.launch.exchange import Exchange, Member
from ray_mnist.launch.stalls import Ask


def asking(worker: Any) -> Ask:
    """What has the process of one of Ray Train's workers call a function, beside its training."""
    return lambda function: worker.execute_async(function).future()


class NoAutoscaler:
    """In place of what asks one: Ray's own starts an actor for that, for which the run's first workers wait."""

    def send_resource_request(self, *_: Any) -> None:
        """Asks nobody."""

    maybe_send_resource_request = cancel_resource_request = send_resource_request


class ExchangedWorkers(ScalingPolicy):
    """Has healthy workers make room for others once an exchange says that they are ready; Ray's own just ends them.

    On a Ray that is `here`, on this machine alone, nobody is asked for more machines.
    """

    _coordinator_client: Any

    def __init__(self, scaling_config: Any, exchange: Exchange, here: bool) -> None:
        super().__init__(scaling_config)
        self.exchange, self.here = exchange, here

    def after_controller_start(self, *arguments: Any) -> None:
        """Ray's own asks an autoscaler for the workers."""
        if self.here:
            self._coordinator_client = NoAutoscaler()
        else:
            super().after_controller_start(*arguments)

    def follow(self, workers: list[Worker]) -> None:
        """Takes those that have started."""
        members = [Member(worker.metadata.node_id, worker.metadata.hostname, asking(worker)) for worker in workers]
        self.exchange.began(members)

    def before_controller_execute_resize_decision(self, decision: ResizeDecision) -> None:
        """Tells what is about to be started."""
        self.exchange.starting(decision.num_workers)

    def make_decision_for_running_worker_group(self, *arguments: Any, **options: Any) -> Any:
        """Others take the place of healthy workers where Ray's policy wants more, or a node will be taken away."""
        wanted = super().make_decision_for_running_worker_group(*arguments, **options)  # type: ignore[safe-super]
        room = wanted.num_workers if isinstance(wanted, ResizeDecision) else None
        if self.exchange.is_ready(room, global_state.get_draining_nodes()):
            return self.make_decision_for_non_running_worker_group()
        return NoopDecision()


class FixedWorkers(ExchangedWorkers, FixedScalingPolicy):
    """As many as the run began with."""


class ElasticWorkers(ExchangedWorkers, ElasticScalingPolicy):
    """As many as there is room for."""

    def make_decision_for_non_running_worker_group(self) -> Any:
        """Waits here for room, which Ray's controller does by asking again at once, for ever."""
        while True:
            self.exchange.keep_waiting()
            decision = super().make_decision_for_non_running_worker_group()
            if not isinstance(decision, NoopDecision):
                return decision
            time.sleep(self.GET_RESERVED_RESOURCES_INTERVAL_S)

    def _get_reserved_resources(self) -> dict[str, dict[str, float]]:
        """What each node has free or this run has of it, without nodes that will be taken away.

        Ray's own goes by what nodes have, whoever uses it, and counts those in that will be taken away.
        """
        draining = global_state.get_draining_nodes()
        free = {node: each for node, each in available_resources_per_node().items() if node not in draining}
        for node in (member.node for member in self.exchange.members if member.node in free):
            for name, amount in self.scaling_config._resources_per_worker_not_none.items():
                free[node][name] = free[node].get(name, 0) + amount
        return free


class PatientFailurePolicy(DefaultFailurePolicy):
    """Has an elastic run look anew where the workers did not get the room that there seemed to be."""

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        """That is no failure; `Exchange.keep_waiting` bounds it."""
        if isinstance(getattr(training_failed_error, "controller_failure", None), WorkerGroupStartupTimeoutError):
            return FailureDecision.RETRY
        return super().make_decision(training_failed_error)


def policies(scaling_config: Any, failure_config: Any, exchange: Exchange, here: bool = False) -> dict[str, Any]:
    """What has Ray Train's controller decide how many workers there are, and what is tried again."""
    if not scaling_config.elasticity_enabled:
        return {"scaling_policy": FixedWorkers(scaling_config, exchange, here)}
    return {
        "scaling_policy": ElasticWorkers(scaling_config, exchange, here),
        "failure_policy": PatientFailurePolicy(failure_config),
    }
