"""Stands in for Ray: a run's workers are forked from a process that has everything imported, and meet over gloo.

What runs in them is what runs in Ray's workers: `train_function`, in the local mode of Ray's TorchTrainer, which finds
its rank in the environment as under torchrun. Only the two things that Ray's controller has a hand in are made here.
"""

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from multiprocessing import connection, parent_process, set_start_method
from multiprocessing.connection import Connection
from typing import Any

import ray.train
import torch.distributed as dist
from processes import processes
from ray import cloudpickle
from ray.train.torch import TorchTrainer

from ray_mnist.config import RunConfig
from ray_mnist.errors import RequestError, Stopped
from ray_mnist.launch import ray as launch
from ray_mnist.launch import select
from ray_mnist.launch.connection import this_folder
from ray_mnist.launch.failures import describe_all
from ray_mnist.launch.output import root_logger
from ray_mnist.launch.termination import on_sigterm
from ray_mnist.run.events import Event, Tell
from ray_mnist.run.outcome import Evaluation, Outcome
from ray_mnist.worker import Job

JOB_S = 600  # all that a job may take
PEERS_S = 10  # what the others may take once one has failed: they notice that it is gone, unless they are stuck


def on_gloo(job: Job, config: RunConfig, _: float) -> Iterator[tuple[str, Any]]:
    """In place of `select.on_ray`."""
    select.check_serializable_job(job)
    stop = processes.Event()

    def launch(tell: Tell) -> Outcome | Evaluation:
        with on_sigterm(stop.set):
            return run(job, config, tell, stop)

    yield f"{config.num_workers} workers over gloo", launch


def run(job: Job, config: RunConfig, tell: Tell, stop: Any) -> Outcome | Evaluation:
    """Does the job, without second tries; errors are those of `launch.ray.launch`."""
    num_workers, threads = config.num_workers, config.cpus_per_worker or 1
    settings = {"job": BytesIO(cloudpickle.dumps(job)), "use_gpu": False, "threads": threads, "folder": this_folder()}
    settings["keep"] = False
    packed = cloudpickle.dumps(settings | {"root_logger": root_logger()})
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    meet |= {"WORLD_SIZE": str(num_workers), "LOCAL_WORLD_SIZE": str(num_workers)}
    meet |= {"CUDA_VISIBLE_DEVICES": ""}  # or Ray Train would have them meet over NCCL
    meet |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}  # the store is there
    ranks, workers = {}, []
    for rank in range(num_workers):
        mine, theirs = processes.Pipe(duplex=False)
        environment = os.environ | meet | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        worker = processes.Process(target=work, args=(packed, environment, theirs, stop))
        worker.start()
        theirs.close()
        ranks[mine] = rank
        workers.append(worker)
    try:
        outcomes, errors = receive(ranks, tell)
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    assert [rank for rank, outcome in outcomes.items() if outcome is not None] in ([], [0])  # Ray would bring it home
    if wrong := [error for error in errors.values() if isinstance(error, RequestError | Stopped)]:
        raise type(wrong[0])(*wrong[0].args)  # without the note, which is no news
    if errors:
        raise describe_all(errors)
    return outcomes[0]


def receive(ranks: dict[Connection, int], tell: Tell) -> tuple[dict[int, Any], dict[int, Exception]]:
    """What the ranks returned, and what they raised; what they tell meanwhile is handed on."""
    outcomes, errors = dict[int, Any](), dict[int, Exception]()
    while ranks:
        ready = connection.wait(ranks, PEERS_S if errors else JOB_S)
        if not ready and errors:
            break
        assert ready, f"ranks {sorted(ranks.values())} said nothing for {JOB_S} s"
        for pipe in ready:
            try:
                events, outcome, error = cloudpickle.loads(pipe.recv_bytes())
            except EOFError:
                events, outcome, error = [], None, ChildProcessError("the process is gone")
            for event in events:
                tell(event)
            if events:
                continue
            rank = ranks.pop(pipe)
            if error:
                errors[rank] = error
            else:
                outcomes[rank] = outcome
    return outcomes, errors


def work(packed: bytes, environment: dict[str, str], home: Connection, stop: Any) -> None:
    """What the process of each rank runs."""
    threading.Thread(target=die_with_the_tests, daemon=True).start()
    set_start_method(None, force=True)  # a loader's processes start as everywhere
    os.environ.clear()
    os.environ.update(environment)
    config = cloudpickle.loads(packed) | {"send": PipeSender(home, stop)}
    outcome = error = None
    try:
        # With no workers for Ray to start.
        trainer = TorchTrainer(
            launch.train_function,
            train_loop_config=config,
            scaling_config=ray.train.ScalingConfig(num_workers=0),
        )
        outcome = cloudpickle.loads(trainer.fit().return_value)
    except Exception as raised:
        error = raised
    home.send_bytes(cloudpickle.dumps(([], outcome, error)))


@dataclass
class PipeSender:
    """In place of `launch.channel.Sender`."""

    home: Connection
    stop: Any

    def __call__(self, events: list[Event]) -> None:
        self.home.send_bytes(cloudpickle.dumps((events, None, None)))

    def call_on_stop(self, stop: Callable[[], None]) -> None:
        threading.Thread(target=lambda: self.stop.wait() and stop(), daemon=True).start()


def die_with_the_tests() -> None:
    """Ends this process when pytest's is gone, however it went."""
    tests = parent_process()
    assert tests is not None
    tests.join()
    os._exit(1)
