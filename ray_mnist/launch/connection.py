"""Connects to a Ray cluster, and takes the working directory along."""

import atexit
import logging
import math
import os
import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from ray_mnist import ray_internals
from ray_mnist.checks import preflight
from ray_mnist.cli import console
from ray_mnist.config import RunConfig
from ray_mnist.errors import RequestError, one_line
from ray_mnist.launch import ahead
from ray_mnist.launch.keeping import KEEPER

if TYPE_CHECKING:
    from ray_mnist.worker import Job  # which imports torch


@contextmanager
def connect(config: RunConfig, job: "Job", cpus: int = 0, keep_s: float = 0) -> Iterator[None]:
    """A Ray cluster to train on: the one that this process already has, one to join, or a new local one.

    Whatever was started or joined here is left again, `keep_s` seconds after a run that went well if there is no other
    call; a connection that was there stays as it was. Other machines get a copy of the working directory where the
    job's code is in it, and are left at once: the next call may have another one. A new cluster has `cpus` logical
    CPUs, if not more.
    """
    KEEPER.take_up(config, ahead.enough_cpus(config, cpus))
    if KEEPER.ray_for is not None and needs_folder(job) and may_use_other_machines():
        KEEPER.give_back()  # a folder can be sent only as one connects
    if not ray.is_initialized() and start_or_join(config, job, cpus):
        keep_s = 0
    try:
        if config.dashboard:
            console.say(f"Ray's dashboard http://{dashboard()}")
        yield
    except BaseException:
        KEEPER.give_back()
        raise
    KEEPER.wait(keep_s)


def start_or_join(config: RunConfig, job: "Job", cpus: int) -> bool:
    """Has this process in a Ray cluster; whether that got a copy of the working directory."""
    copied = False
    address = address_to_join(config.address)
    try:
        if address:
            forked = ahead.forked(config)
            ahead.init(address=address, runtime_env=forked)
            if needs_folder(job) and may_use_other_machines():
                ray.shutdown()  # a folder can be sent only as one connects
                copied = True
                with sending():
                    ahead.init(address=address, runtime_env=folder_to_send(config) | forked)
        else:
            ahead.start_ray(config, cpus)
    except RequestError:
        raise
    except Exception as error:  # of no class of its own where the dashboard does not start
        where = f"the Ray cluster at {address} cannot be joined" if address else "Ray cannot be started here"
        raise RequestError(f"{where}: {one_line(error)}") from error
    KEEPER.own_ray(config, math.inf if address else ahead.enough_cpus(config, cpus))
    return copied


def dashboard() -> str:
    """Where the dashboard of the Ray is that this process is connected to: host:port, as seen from its head.

    Raises:
        RequestError: it has none.
    """
    context: Any = ray.init(ignore_reinit_error=True, **ahead.QUIET)
    about = context.address_info
    if not about["webui_url"]:
        raise RequestError(
            f"--dashboard: the Ray at {about['address']} was started without its dashboard, drop --dashboard or start "
            "Ray with it."
        )
    return str(about["webui_url"])


def start_if_local(config: RunConfig) -> None:
    """Starts Ray if the run will need a new local one, for `connect` to find; the process's end ends it.

    What is wrong with Ray or its address `connect` says, after what is wrong with the rest.
    """
    with console.quiet(), suppress(Exception):
        if address_to_join(config.address) is None:
            ahead.start_ray(config)
            atexit.register(ray.shutdown)  # before Ray's own, which sleeps half a second for logs that nobody is shown


def address_to_join(given: str | None) -> str | None:
    """The cluster given, the environment's, or the one that this machine is part of; None if there is none.

    Raises:
        RequestError: no Ray head answers there.
    """
    logging.getLogger("ray").setLevel(logging.ERROR)  # Ray's import has set its loggers up anew
    ray_internals.show_token()
    address = given or os.environ.get("RAY_ADDRESS") or preflight.this_machines_cluster()
    if address:
        preflight.check_address(address)
    return address


def needs_folder(job: "Job") -> bool:
    """Whether the job's code is in the working directory, and may expect files there, unless a Ray job brought it."""
    if "working_dir" in ray.get_runtime_context().runtime_env:
        return False
    return is_in_folder({type(item).__module__ for item in (job.model, *job.data.values(), *job.callbacks_and_loggers)})


def is_in_folder(modules: Iterable[str]) -> bool:
    """Whether one of these modules, that is not of this package, is in the working directory."""
    theirs = {name for name in modules if name.partition(".")[0] != "ray_mnist"}
    files = (getattr(sys.modules.get(name), "__file__", None) for name in theirs)
    here = Path.cwd()
    return any(file and here in Path(file).resolve().parents and sys.prefix not in file for file in files)


def may_use_other_machines() -> bool:
    """Whether the cluster has a node that is not on this machine, or something that adds nodes."""
    others = any(node["Alive"] and node["NodeManagerHostname"] != socket.gethostname() for node in ray.nodes())
    return others or ray_internals.has_autoscaler() or ray_internals.nodes_are_joining()


def folder_to_send(config: RunConfig) -> dict[str, Any]:
    """Ray's description of the working directory, without what every machine has or makes for itself."""
    return {"working_dir": os.getcwd(), "excludes": [".git", ".venv*", "__pycache__", f"/{config.storage_path}"]}


@contextmanager
def sending() -> Iterator[None]:
    """For the time of the `with`, a folder is sent with what git ignores, which data often is.

    Raises:
        RequestError: it is too large.
    """
    try:
        with environment({"RAY_RUNTIME_ENV_IGNORE_GITIGNORE": "1"}):
            yield
    except (RuntimeError, ValueError) as error:
        if "Package size" in str(error):
            raise RequestError(
                f"The working directory {os.getcwd()} is too large to be sent to the other machines: start from the "
                "project's own folder, or name in a .rayignore file what the workers do not need."
            ) from error
        raise


def this_folder() -> tuple[str, str, int, int]:
    """The working directory, and what tells whether a folder of that path on another machine is the same one."""
    return os.getcwd(), socket.gethostname(), os.stat(".").st_ino, os.stat(".").st_mtime_ns


def go_to(folder: tuple[str, str, int, int]) -> None:
    """Changes to the driver's working directory where it is to be had: on its machine, or mounted on several."""
    path, host, *identity = folder
    if os.path.isdir(path):
        there = os.stat(path)
        if socket.gethostname() == host or [there.st_ino, there.st_mtime_ns] == identity:
            os.chdir(path)


@contextmanager
def environment(defaults: dict[str, str]) -> Iterator[None]:
    """Sets the variables that are not set, for the time of the `with`."""
    added = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
