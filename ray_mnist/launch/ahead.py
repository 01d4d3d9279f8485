"""Starts a local Ray, and the workers of a run before there is one: starting and importing takes them seconds.

It imports neither torch nor Lightning, which takes seconds, so that a command can start Ray before it imports them.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import ray

from ray_mnist import ray_internals
from ray_mnist.checks.preflight import CPUS_FOR_DATA, WAIT_FOR_NODES_S
from ray_mnist.config import RunConfig
from ray_mnist.lightning_package import import_heavy, package_in_use

# Ray Train reads these when a run starts. A value that is set already is somebody's wish and stays.
RAY_TRAIN_SETTINGS = {
    # Relative paths in the user's code mean the same as in the script.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # After a failure, for a machine that takes the place of a lost one.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(WAIT_FOR_NODES_S),
    # What is printed is printed, and not logged.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # The exchange of workers leaves a machine as soon as all have checkpointed; Ray waits until it is gone.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # How often Ray looks whether the workers are done or dead: 2 s would be added to every run.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}
# Ray Data reads it: for each time through Parquet files it starts so many processes, 32 unless told.
RAY_DATA_SETTINGS = {"RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": str(os.cpu_count() or 1)}
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}

_workers: list[Any] = []  # of the next run


def init(**options: Any) -> None:
    """`ray.init`, quietly, whatever was seeded before, and with the same draws after it."""
    with ray_internals.unseeded():
        ray.init(**options, **QUIET)


def start_ray(config: RunConfig, cpus: int = 0) -> None:
    """Starts a local Ray with enough logical CPUs for the run, or with `cpus` for trials.

    Not started yet are the workers of trials, and those that have a GPU: Ray gives them theirs as it starts them.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    defaults = RAY_TRAIN_SETTINGS | RAY_DATA_SETTINGS
    settings = {name: os.environ.get(name, value) for name, value in defaults.items()}
    options: dict[str, Any] = {"num_cpus": enough_cpus(config, cpus), "include_dashboard": config.dashboard}
    options["runtime_env"] = {"env_vars": settings}
    with nullcontext() if config.dashboard else ray_internals.no_monitors():  # a dashboard shows what they say
        init(address="local", **options, **ray_internals.NO_IDLE_WORKERS)
    if not cpus and not config.use_gpu:
        prepare = partial(import_worker, package_in_use())
        _workers[:] = ray_internals.start_workers(config.max_workers, prepare, numpy_threads(config))


def enough_cpus(config: RunConfig, cpus: int = 0) -> int:
    """How many logical CPUs a local Ray needs for the run, or for `cpus` of trials, which take all that there are.

    More workers than cores run in turns: slower, and good enough to try a run out. Ray Data has some beside them.
    """
    for_workers = config.max_workers * (config.cpus_per_worker or 1)
    return max(os.cpu_count() or 1, cpus or for_workers + CPUS_FOR_DATA)


def numpy_threads(config: RunConfig) -> str:
    """On how many threads NumPy computes in a worker that is started before it is needed.

    As Ray tells those that it starts itself: the environment's wish, or as many as the worker has CPUs.
    """
    return os.environ.get("OMP_NUM_THREADS", str(config.cpus_per_worker or 1))


def import_worker(package: str) -> None:
    """Imports what a worker runs, torch and Lightning with it, of which `package` is the one in use."""
    import_heavy(package, "ray_mnist.worker")


def import_worker_when_idle(package: str) -> None:
    """The same, beside a training: only while a core has nothing else to do, where the system (Linux) can do that.

    Raises:
        MemoryError: more than half of the memory is in use, of which the training may need more.
    """

    def run() -> None:
        if ray_internals.memory_used() > 0.5:
            raise MemoryError
        with suppress(AttributeError, OSError):
            # Of this thread, not of the process: to leave it again takes privileges.
            os.sched_setscheduler(0, os.SCHED_IDLE | os.SCHED_RESET_ON_FORK, os.sched_param(0))
        import_worker(package)

    with ThreadPoolExecutor(1) as thread:
        thread.submit(run).result()
