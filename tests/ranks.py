"""A few processes with a process group over gloo, for what needs nothing else of a run."""

import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from ray import cloudpickle

FORK = multiprocessing.get_context("fork")
ANSWER_S = 60


def on_ranks(work: Callable[[int], Any], world_size: int = 2, backend: str = "gloo") -> list[Any]:
    """What `work(rank)` returns on each rank, or the exception that it raises there."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def run(rank: int, home: Any) -> None:
        try:
            here = dist.TCPStore("127.0.0.1", store.port, is_master=False)
            wait = timedelta(seconds=ANSWER_S / 2)
            dist.init_process_group(backend, store=here, rank=rank, world_size=world_size, timeout=wait)
            found = work(rank)
        except Exception as error:
            found = error
        home.send_bytes(cloudpickle.dumps(found))
        home.poll(ANSWER_S)  # stays until all have answered, and no longer if there are no tests to kill it

    pipes = [FORK.Pipe() for _ in range(world_size)]
    ranks = [FORK.Process(target=run, args=(rank, pipes[rank][1])) for rank in range(world_size)]
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
