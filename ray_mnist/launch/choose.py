"""Picks the place that a run goes to, and checks that it can start there."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn.parameter import is_lazy

from ray_mnist import terminal
from ray_mnist.config import RunConfig
from ray_mnist.errors import RequestError
from ray_mnist.worker import Job

Launch = Callable[[], Any]


@contextmanager
def ready(job: Job, config: RunConfig) -> Iterator[tuple[str, Launch]]:
    """Checks that the run can start where it is to run; gives the words for the place, and the call that runs."""
    if config.tpu_cores:
        raise RequestError("--tpu-cores: this version cannot train on a TPU yet, leave it out.")
    # Best, newest and the one being written.
    needed_bytes = 3 * 3 * sum(weight.nbytes for weight in job.model.parameters() if not is_lazy(weight)) + 1_000_000
    from ray_mnist import preflight

    preflight.check_storage(job.folder, needed_bytes)
    if config.num_workers == 0:
        from ray_mnist.launch import local

        local.check(config.use_gpu)
        yield f"this process, on {'GPU' if config.use_gpu else 'CPU'}", lambda: local.launch(job, config.use_gpu)
        return
    from ray_mnist import travel
    from ray_mnist.launch import connect, ray

    if "datamodule" in job.data:
        job.data["datamodule"].trainer = None  # of a run before, in this process
    travel.check(model=job.model, **job.data, callbacks_and_loggers=job.helpers, plugins=job.lightning["plugins"])
    with connect.connection(config, job):
        cluster = preflight.check_resources(
            config.num_workers, ray.bundle(config), preflight.WAIT_FOR_NODES_S, terminal.say
        )
        preflight.check_shared_storage(job.folder, cluster)
        workers = f"{config.num_workers} worker{'s' if config.num_workers > 1 else ''}"
        yield f"{workers} on {'GPU' if config.use_gpu else 'CPU'}, Ray {cluster}", lambda: ray.launch(job, config)
