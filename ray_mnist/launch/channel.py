"""Brings events from other processes to the one that started the run, and never harms the run.

It imports neither torch nor Lightning, which takes seconds.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from multiprocessing import Pipe
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_mnist.launch.metrics import RunMetrics
from ray_mnist.run.events import Event, Printed, Progress, Tell

Send = Callable[[list[Event]], None]
QUEUED = 1000  # batches that wait for a driver which does not take them; more are dropped
BEHIND = 10  # batches that wait for a driver which is late, and is not told how far the run is until it is not
PENDING = 100_000  # events of a worker that wait to be sent; older ones are dropped
BATCH_S = 0.2
PATIENCE_S = 10  # with a queue that does not answer


class Mailbox:
    """The actor between a run's workers and the process that started it: events go home, the word to stop goes out.

    What the events say of the metrics of `run` it has Ray export, for as long as it lives.
    """

    def __init__(self, room: int, run: str | None) -> None:
        self.metrics = RunMetrics(run) if run else None
        self.events: asyncio.Queue[list[Event] | None] = asyncio.Queue(room)
        self.stopped = asyncio.Event()

    async def put(self, events: list[Event]) -> None:
        """Takes a batch; raises QueueFull where there is no room, which how far the run is takes from nothing else."""
        if self.metrics:
            for event in events:
                self.metrics.take(event)
        if self.events.qsize() >= BEHIND:
            events = [event for event in events if not isinstance(event, Progress)]
        if events:
            self.events.put_nowait(events)

    async def put_last(self) -> None:
        """Has `get` return None after all batches, for which there need be no room."""
        await self.events.put(None)

    async def get(self) -> list[Event] | None:
        """The next batch, once there is one; None after the last."""
        return await self.events.get()

    async def stop(self) -> None:
        """Answers all who wait for it."""
        self.stopped.set()

    async def wait_for_stop(self) -> None:
        """Returns once there was a `stop`."""
        await self.stopped.wait()


@dataclass(frozen=True)
class Sender:
    """A worker's end of `mailbox`, which may be full, dead or out of reach: no call fails, or waits for long."""

    mailbox: Any

    def __call__(self, events: list[Event]) -> None:
        """Sends events, or drops them."""
        with suppress(Exception):
            ray.get(self.mailbox.put.remote(events), timeout=PATIENCE_S)

    def call_on_stop(self, stop: Callable[[], None]) -> None:
        """Has a thread call `stop` once the run is to stop."""

        def wait() -> None:
            with suppress(Exception):
                ray.get(self.mailbox.wait_for_stop.remote())
                stop()

        threading.Thread(target=wait, daemon=True).start()


@contextmanager
def over_ray(tell: Tell, run: str | None = None) -> Iterator[Sender]:
    """What sends events from anywhere in the cluster to `tell` in this process; all are told at the end.

    They are those of `run`, or of several, which have their metrics exported themselves.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    mailbox: Any = ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=here).remote(QUEUED, run)

    def deliver() -> None:
        with suppress(Exception):  # such as the actor's death
            while (events := ray.get(mailbox.get.remote())) is not None:
                for event in events:
                    tell(event)

    thread = threading.Thread(target=deliver, daemon=True)
    thread.start()
    try:
        yield Sender(mailbox)
    finally:
        with suppress(Exception):
            mailbox.put_last.remote()
            thread.join(PATIENCE_S)
            ray.kill(mailbox)  # which ends the thread, whatever it waits for
            thread.join(PATIENCE_S)


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
