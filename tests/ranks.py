"""A few processes with a process group over gloo, for what needs nothing else of a run."""

import os
import threading
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import set_start_method
from multiprocessing.connection import Connection
from typing import Any

import torch.distributed as dist
from gloo_workers import die_with_the_tests
from processes import processes
from ray import cloudpickle

ANSWER_S = 240


def on_ranks(work: Callable[[int], Any], world_size: int = 2, backend: str = "gloo") -> list[Any]:
    """What `work(rank)` returns on each rank, or the exception that it raises there.

    `work` is sent there by value: what it changes outside of itself stays there.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    packed = cloudpickle.dumps((work, world_size, backend, store.port, dict(os.environ)))
    pipes = [processes.Pipe() for _ in range(world_size)]
    ranks = [processes.Process(target=run, args=(packed, rank, pipes[rank][1])) for rank in range(world_size)]
    for process in ranks:
        process.start()
    try:
        answered = [home.poll(ANSWER_S) for home, _ in pipes]
        assert all(answered), f"no answer: {answered}"
        return [cloudpickle.loads(home.recv_bytes()) for home, _ in pipes]
    finally:
        for process in ranks:
            process.kill()
            process.join()


def run(packed: bytes, rank: int, home: Connection) -> None:
    """What the process of each rank runs."""
    threading.Thread(target=die_with_the_tests, daemon=True).start()
    set_start_method(None, force=True)  # a loader's processes start as everywhere
    try:
        work, world_size, backend, port, environment = cloudpickle.loads(packed)
        os.environ.clear()
        os.environ.update(environment)
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        wait = timedelta(seconds=ANSWER_S / 2)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=wait)
        found = work(rank)
    except Exception as error:
        found = error
    home.send_bytes(cloudpickle.dumps(found))
    home.poll(ANSWER_S)  # stays until all have answered, and no longer if there are no tests to kill it
