"""Picks where a run goes to, and checks that it can start there."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn.parameter import is_lazy

from ray_mnist.checks import preflight
from ray_mnist.cli import console
from ray_mnist.compiling import refuse_compiled_in_place
from ray_mnist.config import RunConfig
from ray_mnist.data import MNISTDataModule
from ray_mnist.errors import RequestError
from ray_mnist.run.events import Tell
from ray_mnist.worker import Job

Launch = Callable[[Tell], Any]
Prepared = Iterator[tuple[str, Launch]]


@contextmanager
def prepare(job: Job, config: RunConfig, keep_s: float = 0) -> Prepared:
    """Checks that the run can start where it is to run; gives the words for where, and the call that runs.

    Ray's workers stay for the next call `keep_s` seconds.

    What takes no time is checked first; then the data, and last the cluster, which may be minutes in starting.
    """
    if config.dashboard and not config.num_workers:
        raise RequestError("--dashboard shows workers on Ray: give --num-workers, such as 1, or drop it.")
    if datamodule := own_datamodule(job):
        datamodule.check_batch_size(world_size(config))
    preflight.check_storage(job.folder, preflight.PROBE_BYTES + checkpoint_bytes(job))
    if config.tpu_cores:
        yield from on_tpu(job, config)
    elif config.num_workers:
        yield from on_ray(job, config, keep_s)
    else:
        yield from here(job, config)


def checkpoint_bytes(job: Job) -> int:
    """What a fit's three checkpoints take: the best, the newest and the one being written.

    Each has the weights, and twice their size of an optimizer's state, as Adam has it.
    """
    weights = sum(weight.nbytes for weight in job.model.parameters() if not is_lazy(weight))
    return 3 * 3 * weights if job.task == "fit" else 0


def own_datamodule(job: Job) -> MNISTDataModule | None:
    """The run's data module if it is ours, which knows what can be trained on."""
    datamodule = job.data.get("datamodule")
    return datamodule if isinstance(datamodule, MNISTDataModule) else None


def check_data(job: Job, config: RunConfig) -> None:
    """Raises RequestError unless the data is to be had here, whole, and enough of it for all workers."""
    if datamodule := own_datamodule(job):
        datamodule.check(world_size(config))


def world_size(config: RunConfig) -> int:
    """How many ranks train together, at most."""
    return max(1, config.max_workers, config.tpu_cores)


def here(job: Job, config: RunConfig) -> Prepared:
    """In this process."""
    from ray_mnist.launch import local

    local.check(config.use_gpu)
    check_data(job, config)

    def launch(tell: Tell) -> Any:
        return local.launch(job, local.LocalContext(job, config.use_gpu, tell))

    yield f"this process, on {'GPU' if config.use_gpu else 'CPU'}", launch


def on_ray(job: Job, config: RunConfig, keep_s: float) -> Prepared:
    """On workers that Ray Train starts, or those of the call before."""
    from ray_mnist.launch import connection, ray
    from ray_mnist.launch.keeping import KEEPER

    check_serializable_job(job)
    if config.elastic and not job.lightning.get("use_distributed_sampler", True):
        raise RequestError(
            "num_workers as a range and use_distributed_sampler=False were both given: what your loaders share out "
            "themselves would be shared out anew with each change, give one number."
        )
    check_data(job, config)
    with connection.connect(config, job, keep_s=keep_s):
        cluster = preflight.Cluster.current()
        placed = ray.with_cpus(config, cluster)
        if KEEPER.controller is None:
            cluster = preflight.check_resources(
                config.min_workers, ray.bundle(placed), preflight.WAIT_FOR_NODES_S, console.say
            )
        preflight.check_shared_storage(job.folder, cluster)
        where = f"{workers(config)} on {'GPU' if config.use_gpu else 'CPU'}, Ray {cluster}"
        # Kept workers have room that an elastic run would wait for.
        keep = keep_s > 0 and not config.elastic
        yield where, lambda tell: ray.launch(job, placed, tell, keep=keep)


def workers(config: RunConfig) -> str:
    """Such as `1 worker`, `4 workers` or `2 to 4 workers`."""
    least = f"{config.min_workers} to " if config.elastic else ""
    return f"{least}{config.max_workers} worker{'s' if config.max_workers > 1 else ''}"


def on_tpu(job: Job, config: RunConfig) -> Prepared:
    """On this TPU host, or on the hosts of a TPU slice in a Ray cluster; `Trainer` has checked what they need."""
    from ray_mnist.launch import connection, tpu

    cores = f"{config.tpu_cores} TPU core{'s' if config.tpu_cores > 1 else ''}, Lightning's XLA trainer"
    if config.tpu_cores > 1:
        check_serializable_job(job)
    check_data(job, config)
    if not tpu.on_cluster(config):
        from ray_mnist.launch import xla

        yield cores, lambda tell: xla.launch(job, config.tpu_cores, tell)
        return
    from ray_mnist.launch import pod

    wait_s = preflight.WAIT_FOR_NODES_S
    with connection.connect(config, job), pod.reserved(config.tpu_cores, wait_s, console.say) as hosts:
        cluster = preflight.Cluster.current()
        preflight.check_shared_storage(job.folder, cluster)
        on_hosts = f"on {hosts.num_hosts} host{'s' if hosts.num_hosts > 1 else ''}"
        yield f"{cores} {on_hosts}, Ray {cluster}", lambda tell: pod.launch(job, hosts, tell)


def check_serializable_job(job: Job) -> None:
    """Raises RequestError unless the job can be sent to other processes."""
    from ray_mnist.distributed.serialization import check_serializable

    refuse_compiled_in_place(job.model)
    if "datamodule" in job.data:
        job.data["datamodule"].trainer = None  # of a run before, in this process
    check_serializable(
        model=job.model, **job.data, callbacks_and_loggers=job.callbacks_and_loggers, plugins=job.lightning["plugins"]
    )
