"""All that this package uses of Ray Train's controller beyond its public API, and why: to look at with a new Ray.

It imports neither torch nor Lightning, which takes seconds where processes are not forked: workers start after it.

tests/test_internals.py names what a new release moved.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from operator import call
from typing import Any, ClassVar, Protocol

import ray
from ray.exceptions import RayError
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.controller.state import FinishedState
from ray.train.v2._internal.execution.worker_group import Worker, WorkerGroup
from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus
from ray.train.v2._internal.execution.worker_group.state import WorkerGroupState
from ray.train.v2._internal.util import TrainingFramework

from ray_mnist.launch.stalls import Ask
from ray_mnist.ray_scaling_internals import asking

ANSWER_S = 10  # in which a worker that is well answers
LEAVE_S = 10  # in which one that is well leaves its process group; for one that is stopped, Ray waits 30 s
JOIN_S = 1800  # torch's bound on what ranks wait for each other, and Ray's


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
        self.answers.extend(worker.execute_async(call, self.clean) for worker in self.workers)
        KeptWorkerGroup.kept = self

    def serve(self) -> bool:
        """Whether all of them live, and can do another run."""
        try:
            ray.get([worker.actor.get_metadata.remote() for worker in self.workers], timeout=ANSWER_S)
            return all(ray.get(self.answers, timeout=ANSWER_S))
        except RayError:
            return False


class KeptWorkerGroup(WorkerGroup):
    """Takes the workers that the run before has left, if they live."""

    kept: ClassVar[KeptWorkers | None] = None
    taken: list[Worker] | None = None

    def keep(self, clean: Callable[[], bool]) -> None:
        """Has a shutdown leave the workers to the next run, if `clean` is true in all of their processes."""
        self._worker_group_state = KeptWorkers(**vars(self._worker_group_state), clean=clean)

    def _create_placement_group(self, *arguments: Any) -> Any:
        kept, KeptWorkerGroup.kept = self.kept, None
        if kept is not None and kept.serve():
            self.taken = kept.workers
            return kept.placement_group_handle
        if kept is not None:
            super(KeptWorkers, kept).shutdown()
        return super()._create_placement_group(*arguments)

    def _create_workers(self, *arguments: Any, **more: Any) -> Any:
        return self._assign_worker_ranks(self.taken) if self.taken else super()._create_workers(*arguments, **more)


class LastingController(TrainController):
    """Ray Train's controller, for one run after the other."""

    clean: Callable[[], bool] | None = None

    def __init__(self) -> None:
        """There is no run yet."""

    def begin(self, clean: Callable[[], bool] | None, **arguments: Any) -> None:
        """Takes Ray's own arguments for the next run; its workers are kept with `clean`, see `KeptWorkerGroup`."""
        self.clean = clean
        super().__init__(**arguments)


class KeepingController(LastingController):
    """A controller of workers that may be kept, and exchanged."""

    worker_group_cls = KeptWorkerGroup

    def _start_worker_group(self, *arguments: Any, **options: Any) -> None:
        super()._start_worker_group(*arguments, **options)
        policy: Any = self._scaling_policy
        group: Any = self._worker_group
        policy.follow(group.get_workers())

    def _shutdown_worker_group(self) -> None:
        if self.clean and isinstance(getattr(self.get_state(), "next_state", None), FinishedState):
            group: Any = self.get_worker_group()
            group.keep(self.clean)
        super()._shutdown_worker_group()


@dataclass
class ProcessGroup(BackendConfig):
    """In place of Ray's TorchConfig, which imports torch into the controller's process.

    Args:
        backend: torch's name for it, such as gloo.
    """

    backend: str

    @property
    def backend_cls(self) -> type[Backend]:
        """Ray's name for what follows."""
        return JoinsProcessGroup

    @property
    def train_func_context(self) -> Any:
        """What Ray has each worker train in: it takes the worker's GPU for torch's default."""
        from ray.train.torch.config import TorchConfigContextManager

        return TorchConfigContextManager

    @property
    def framework(self) -> TrainingFramework:
        """For Ray's dashboard."""
        return TrainingFramework.TORCH

    def to_dict(self) -> dict[str, Any]:
        """Likewise."""
        return {"backend": self.backend}


class JoinsProcessGroup(Backend):
    """What Ray's own back end for torch does, of which only the workers import it."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Has all ranks join."""
        address, port = worker_group.execute_single(0, get_address_and_port)
        size = len(worker_group)
        to_join = [
            worker_group.execute_single_async(rank, join, backend_config.backend, rank, size, address, port)
            for rank in range(size)
        ]
        ray.get(to_join)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Has all ranks that answer leave."""
        with suppress(ray.exceptions.GetTimeoutError):
            ray.get(worker_group.execute_async(leave, len(worker_group)), timeout=LEAVE_S)


def join(backend: str, rank: int, size: int, address: str, port: int) -> None:
    """Joins the process group, in a worker."""
    from ray.train.torch import config

    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    config._set_torch_distributed_env_vars()
    config._setup_torch_process_group(backend, rank, size, "env://", JOIN_S)


def leave(size: int) -> None:
    """Leaves it."""
    from ray.train.torch import config

    config._shutdown_torch(destroy_process_group=size > 1)
