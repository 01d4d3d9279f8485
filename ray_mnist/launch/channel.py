"""Brings events from other processes to the one that started the run, and never harms the run.

It imports neither torch nor Lightning, which takes seconds.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import groupby
from multiprocessing import Pipe
from typing import Any

import ray
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_mnist.run.events import Event, Printed, Tell

Send = Callable[[list[Event]], None]
QUEUED = 1000  # batches that wait for a driver which does not take them; more are dropped
PENDING = 100_000  # events of a worker that wait to be sent; older ones are dropped
BATCH_S = 0.2
PATIENCE_S = 10  # with a queue that does not answer


@contextmanager
def over_ray(tell: Tell) -> Iterator[Send]:
    """What sends events from anywhere in the cluster to `tell` in this process; at the end all that were sent are told.

    They are dropped where the queue in between is full, dead or out of reach.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    queue = Queue(QUEUED, {"num_cpus": 0, "scheduling_strategy": here})

    def deliver() -> None:
        with suppress(Exception):  # such as the queue's death
            while (events := queue.get()) is not None:
                for event in events:
                    tell(event)

    thread = threading.Thread(target=deliver, daemon=True)
    thread.start()
    try:
        yield partial(put, queue)
    finally:
        with suppress(Exception):
            actor: Any = queue.actor
            actor.put.remote(None)  # after all that was sent
            thread.join(PATIENCE_S)
            queue.shutdown(force=True)  # which ends the thread, whatever it waits for
            thread.join(PATIENCE_S)


def put(queue: Queue, events: list[Event]) -> None:
    """Puts events into the queue if it is there and has room."""
    actor: Any = queue.actor  # the queue's own methods have no time-out where it does not answer
    with suppress(Exception):
        ray.get(actor.put_nowait.remote(events), timeout=PATIENCE_S)


class StopSign:
    """An actor that worker processes ask, and which answers once the process that started them has set it."""

    def __init__(self) -> None:
        self.is_set = asyncio.Event()

    async def set(self) -> None:
        """Answers all who wait."""
        self.is_set.set()

    async def wait(self) -> None:
        """Returns once it is set."""
        await self.is_set.wait()


@contextmanager
def stop_sign() -> Iterator[Any]:
    """A StopSign on this node, for the time of the `with`."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    sign: Any = ray.remote(StopSign).options(num_cpus=0, scheduling_strategy=here).remote()
    try:
        yield sign
    finally:
        with suppress(Exception):  # such as the cluster's death
            ray.kill(sign)


def wait_for(sign: Any, stop: threading.Event) -> None:
    """Sets `stop` once `sign` is set, if it is there; from a thread of its own."""

    def wait() -> None:
        with suppress(Exception):
            ray.get(sign.wait.remote())
            stop.set()

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def over_pipe(tell: Tell) -> Iterator[Send]:
    """What sends events from one process that is forked to `tell` in this one; at the end it is to be gone."""
    receiving, sending = Pipe(duplex=False)

    def deliver() -> None:
        with suppress(EOFError, OSError):
            while True:
                for event in receiving.recv():
                    tell(event)

    thread = threading.Thread(target=deliver, daemon=True)
    thread.start()
    try:
        yield sending.send
    finally:
        sending.close()  # the last of its writers
        thread.join(PATIENCE_S)


def merged(events: list[Event]) -> Iterator[Event]:
    """The events, with what was printed in pieces in one piece."""
    for stream, group in groupby(events, key=lambda event: event.stream if isinstance(event, Printed) else None):
        if stream:
            yield Printed("".join(event.text for event in group if isinstance(event, Printed)), stream)
        else:
            yield from group


class Outbox:
    """Hands events on in their order, from a thread of its own, so that whoever tells them never waits.

    Args:
        send: takes batches of them; it may wait, and must not fail.
    """

    def __init__(self, send: Send) -> None:
        self.send = send
        self.pending: deque[Event] = deque(maxlen=PENDING)
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self._send_batches, daemon=True)
        self.thread.start()

    def tell(self, event: Event) -> None:
        """Takes an event. There is no lock in it: a process that is forked meanwhile could wait for that for ever."""
        self.pending.append(event)

    def _send_batches(self) -> None:
        last = False
        while not last:
            last = self.closing.wait(BATCH_S)
            if batch := [self.pending.popleft() for _ in range(len(self.pending))]:
                self.send(list(merged(batch)))

    def close(self) -> None:
        """Sends what is left."""
        self.closing.set()
        self.thread.join(PATIENCE_S)
