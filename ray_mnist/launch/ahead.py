"""Starts a local Ray, and what its workers are forked from before there is a run: to import it takes seconds.

It imports neither torch nor Lightning, which takes seconds, so that a command can start Ray before it imports them.
"""

import os
import shlex
import subprocess
import sys
from typing import Any

import ray

from ray_mnist import ray_internals
from ray_mnist.checks.preflight import CPUS_FOR_DATA, WAIT_FOR_NODES_S
from ray_mnist.config import RunConfig
from ray_mnist.launch import forked_python, ray_setup_worker
from ray_mnist.lightning_package import package_in_use

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
# What of a `runtime_env` says which Python there is.
OWN_PYTHON = {"pip", "uv", "conda", "container", "image_uri"}
# For a node that has not the same folders, which is to start its own Python. What follows is Ray's script.
IF_IT_IS_THERE = """
test -x "$0" -a -f "$3" && exec "$0" "$@"
shift 5
python="${1%/lib/python*}/bin/python3"
test -x "$python" || python=python3
exec "$python" "$@"
"""
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}


def init(**options: Any) -> None:
    """`ray.init`, quietly, whatever was seeded before, and with the same draws after it."""
    with ray_internals.unseeded():
        ray.init(**options, **QUIET)


def start_ray(config: RunConfig, cpus: int = 0) -> None:
    """Starts a local Ray with enough logical CPUs for the run, or with `cpus` for trials."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    defaults = RAY_TRAIN_SETTINGS | RAY_DATA_SETTINGS
    settings = {name: os.environ.get(name, value) for name, value in defaults.items()}
    options: dict[str, Any] = {"num_cpus": enough_cpus(config, cpus), "include_dashboard": config.dashboard}
    forks = forked(config, begin=True)
    options["runtime_env"] = {"env_vars": settings} | forks
    script = {"setup_worker_path": ray_setup_worker.__file__} if forks else {}
    with ray_internals.local_ray(config.dashboard, **script):
        init(address="local", **options, **ray_internals.NO_IDLE_WORKERS)
    if forks:
        ray.remote(num_cpus=0)(lambda: None).remote()  # has what workers are forked from import Ray, too


def enough_cpus(config: RunConfig, cpus: int = 0) -> int:
    """How many logical CPUs a local Ray needs for the run, or for `cpus` of trials, which take all that there are.

    More workers than cores run in turns: slower, and good enough to try a run out. Ray Data has some beside them.
    """
    for_workers = config.max_workers * (config.cpus_per_worker or 1)
    return max(os.cpu_count() or 1, cpus or for_workers + CPUS_FOR_DATA)


def forked(config: RunConfig, begin: bool = False) -> dict[str, str]:
    """The part of a `runtime_env` that has Ray's processes forked, see `forked_python`.

    It is empty where the system can't, or where the user's own `ray.init` or Ray job says what Python its processes
    have. With `begin`, what they are forked from begins to import. NumPy, which reads it as it is imported, computes on
    as many threads there as Ray tells those that it starts itself: the environment's wish, or as many as a worker has
    CPUs.
    """
    if not hasattr(os, "pidfd_open") or has_own_python():  # Linux has the first
        return {}
    threads = os.environ.get("OMP_NUM_THREADS", str(config.cpus_per_worker or 1))
    python = [sys.executable, "-P", "-S", forked_python.__file__, package_in_use(), threads]
    if begin:
        environment = os.environ | {"SPT_NOENV": "1"}  # as Ray has it in its processes
        subprocess.run(python, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return {"py_executable": shlex.join(["sh", "-c", IF_IT_IS_THERE, *python])}


def has_own_python() -> bool:
    """Whether the processes of the cluster that is, or will be, joined have a Python of their own."""
    connected = ray.is_initialized()
    given = ray.get_runtime_context().runtime_env if connected else ray_internals.runtime_env_of_submitted_job()
    return bool(OWN_PYTHON & given.keys()) or forked_python.__file__ not in given.get(
        "py_executable", forked_python.__file__
    )
