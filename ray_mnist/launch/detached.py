"""A run that goes on without the process that started it: a job of Ray's, whose driver runs on the cluster's head."""

import asyncio
import logging
import os
import re
import shlex
import signal
import socket
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count, pairwise
from urllib.parse import urlsplit

import aiohttp
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from ray_mnist import ray_internals
from ray_mnist.checks import preflight
from ray_mnist.cli import console
from ray_mnist.cli.early import without
from ray_mnist.config import RunConfig
from ray_mnist.errors import RequestError, one_line
from ray_mnist.launch.connection import folder_to_send, is_in_folder, sending
from ray_mnist.launch.termination import GRACE_S
from ray_mnist.run.events import Printed
from ray_mnist.run.folder import RunFolder

API_SERVER = "RAY_API_SERVER_ADDRESS"
STARTED = re.compile("^run folder ", re.MULTILINE)  # a run says so once nothing speaks against it any more
# Between SIGTERM, upon which the run checkpoints, and SIGKILL: Ray would wait 3 s.
PATIENCE = {"RAY_JOB_STOP_WAIT_TIME_S": str(GRACE_S + 10)}
TERMINATED = 128 + signal.SIGTERM  # the exit status of a run that it ended


def detach(config: RunConfig, name: str, arguments: Sequence[str], modules: Iterable[str]) -> None:
    """Has the cluster run `ray_mnist.train`, and shows what that says until it trains.

    Args:
        config: the run's.
        name: of the run folder, and as far as it can be of the job.
        arguments: the command line's.
        modules: in which its classes are.

    Raises:
        RequestError: it cannot be sent there.
        SystemExit: the run has ended, with this status, instead of training.
    """
    if not config.num_workers and not config.tpu_cores:
        raise RequestError("--detach needs --num-workers, such as 1: a run in this process ends with it.")
    client = client_of(config.address)
    with reached(client):
        taken = {job.submission_id for job in client.list_jobs()}
        plain = re.sub(r"[^\w.-]", "-", name)  # it becomes part of addresses
        job_id = next(each for n in count(1) if (each := plain if n == 1 else f"{plain}-{n}") not in taken)
        command = [*without("address|name|storage-path", arguments), "--name", name]
        has_files = is_in_folder(modules) or any(each.partition("=")[0] == "--config" for each in arguments)
        submit(client, config, command, job_id, has_files)
    if show(client, job_id, config.address, until=STARTED):
        console.say(f"detached: the run {name} goes on in the cluster; {how_to_go_on(job_id, config.address)}")


def submit(
    client: JobSubmissionClient, config: RunConfig, arguments: Sequence[str], job_id: str, has_files: bool
) -> None:
    """Submits it to run in the working directory where that is on the same machine, or else in a copy, if needed."""
    here = is_on_this_machine(client, config.address)
    if not here and not ("://" in config.storage_path or os.path.isabs(config.storage_path)):
        raise RequestError(
            f"--storage-path {config.storage_path} is a folder on this machine, and the run will be on another: use a "
            "bucket (s3://…, gs://…) or the whole path of a folder that the cluster's machines mount."
        )
    storage_path = RunFolder(config.storage_path, "").storage_path
    command = shlex.join(["-m", "ray_mnist.train", *arguments, "--storage-path", storage_path])
    python = shlex.quote(sys.executable)
    if not here:  # the same environment may be there at the same path, or be the one that is found first
        python = f"$(command -v {python} || echo python)"
    with sending():
        client.submit_job(
            entrypoint=(f"cd {shlex.quote(os.getcwd())} && " if here else "") + f"exec {python} {command}",
            submission_id=job_id,
            runtime_env={"env_vars": PATIENCE} | (folder_to_send(config) if has_files and not here else {}),
        )


def attach(name: str, address: str | None) -> None:
    """Shows what a run in the cluster has said and says, to its end.

    Args:
        name: of the run, or of its job.
        address: of the cluster, as `--address`.

    Raises:
        RequestError: there is no such run, or no cluster.
        SystemExit: the run ended with this status, which is not 0.
    """
    client = client_of(address)
    with reached(client):
        jobs = [job for job in client.list_jobs() if job.submission_id]
    found = [job for job in jobs if name in (name_of(job), job.submission_id)]
    if not found:
        jobs.sort(key=lambda job: job.start_time or 0, reverse=True)
        others = ", ".join(dict.fromkeys(map(name_of, jobs)))
        raise RequestError(
            f"--attach {name}: the cluster at {client.get_address()} has no such run, "
            f"{f'but {others}' if others else 'nor any other that was submitted to it'}."
        )
    show(client, str(newest(found).submission_id), address)


def newest(jobs: Sequence[JobDetails]) -> JobDetails:
    """The job that goes on, or else the last one that was not refused, as a second one of a name is that goes on."""
    return max(jobs, key=lambda job: (not job.status.is_terminal(), job.driver_exit_code != 2, job.start_time or 0))


def name_of(job: JobDetails) -> str:
    """The run's name, as the job's command has it, or else the job's own."""
    with suppress(ValueError):  # it is a shell's, and may be anything
        words = [part for word in shlex.split(job.entrypoint) for part in word.split("=", 1)]
        names = [value for option, value in pairwise(words) if option == "--name"]
        if names:
            return names[-1]
    return str(job.submission_id)


def client_of(given: str | None) -> JobSubmissionClient:
    """What speaks to the cluster given, the environment's, or the one that this machine is part of.

    Raises:
        RequestError: there is none, or it does not answer.
    """
    for name in ("ray", *(kind.__module__ for kind in JobSubmissionClient.__mro__)):  # which have levels of their own
        logging.getLogger(name).setLevel(logging.ERROR)
    ray_internals.show_token()
    address = given or os.environ.get(API_SERVER) or os.environ.get("RAY_ADDRESS") or preflight.this_machines_cluster()
    if address in (None, "local"):
        raise RequestError(
            "There is no Ray cluster here that goes on without this process: start one with `ray start --head`, or "
            "name one with --address."
        )
    if not is_http(address):
        preflight.check_address(address)
    os.environ[API_SERVER] = address  # which Ray puts before what it is given
    try:
        return JobSubmissionClient()
    except (OSError, RuntimeError, ValueError) as error:
        raise unreached(address, error) from error


@contextmanager
def reached(client: JobSubmissionClient) -> Iterator[None]:
    """Raises RequestError where the cluster does not answer, or not with what was asked for."""
    try:
        yield
    except (aiohttp.ClientError, OSError, RuntimeError, ValueError) as error:
        raise unreached(client.get_address(), error) from error


def unreached(address: str, error: Exception) -> RequestError:
    """What to say of a cluster that gives no answer."""
    return RequestError(
        f"The Ray cluster at {address} takes no jobs ({one_line(error)}): its dashboard has to run, and to be reached, "
        "on its head or through `ray dashboard` with --address http://localhost:8265."
    )


def is_http(address: str) -> bool:
    """Whether it is the dashboard's address, which may be another's machine: it is often forwarded."""
    return address.startswith(("http://", "https://"))


def is_on_this_machine(client: JobSubmissionClient, given: str | None) -> bool:
    """Whether the cluster's head, which runs the job, is this machine."""
    if is_http(given or os.environ[API_SERVER]):
        return False
    host = urlsplit(client.get_address()).hostname or ""
    with suppress(OSError), socket.create_server((host, 0)):
        return True
    return False


def show(client: JobSubmissionClient, job_id: str, address: str | None, until: re.Pattern[str] | None = None) -> bool:
    """Shows what the job has said and says, to its end or `until` that; whether it goes on.

    Raises:
        RequestError: the connection was lost.
        KeyboardInterrupt: Ctrl-C, which ends nothing but this.
        SystemExit: the job ended with this status, which is not 0.
    """
    display = console.Display()

    async def follow() -> bool:
        said = ""
        async for text in client.tail_job_logs(job_id):
            display(Printed(text, "stdout"))
            if until and until.search(said := said + text):
                return True
        return False

    try:
        with reached(client):
            if asyncio.run(follow()):
                return True
            job = client.get_job_info(job_id)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"the run goes on in the cluster; {how_to_go_on(job_id, address)}") from None
    if not job.status.is_terminal():
        raise RequestError(f"The connection was lost, and the run goes on; {how_to_go_on(job_id, address)}")
    if job.driver_exit_code is None and job.status == JobStatus.FAILED:
        console.say(str(job.message))  # nobody else has said why
    if status := status_of(job):
        raise SystemExit(status)
    return False


def status_of(job: JobDetails) -> int:
    """The exit status of a job that has ended; that of a shell where a signal ended it."""
    if job.status == JobStatus.STOPPED:
        return TERMINATED
    code = 1 if job.driver_exit_code is None else job.driver_exit_code
    return 0 if job.status == JobStatus.SUCCEEDED else 128 - code if code < 0 else code


def how_to_go_on(job_id: str, address: str | None) -> str:
    """How to see more of a job, and how to end it."""
    at = f" --address {address}" if address else ""
    return f"follow it with `python -m ray_mnist.train --attach {job_id}{at}`, stop it with `ray job stop {job_id}{at}`"
