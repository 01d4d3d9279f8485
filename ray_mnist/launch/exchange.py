"""When a run's workers make room for others, decided in Ray Train's controller: machines join, or will be taken away.

It imports neither torch nor Lightning, which takes seconds.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from ray_mnist.checks.preflight import WAIT_FOR_NODES_S
from ray_mnist.errors import TrainingError
from ray_mnist.launch import pause
from ray_mnist.launch.channel import Send
from ray_mnist.launch.failures import in_time
from ray_mnist.launch.stalls import Ask
from ray_mnist.run.events import WorkersChanged
from ray_mnist.run.folder import RunFolder
from ray_mnist.run.records import add_change

ASK_S = 1.0  # how often the workers are asked whether they are ready
LOOK_S = 60.0  # how often a run looks for room for more workers: an exchange costs it some ten seconds
PLACE_S = 5  # for workers to be placed where there seems to be room; a machine may have died a moment ago


@dataclass(frozen=True)
class Member:
    """A worker of the run: its node's id, that machine's name, and what has its process call a function."""

    node: str
    host: str
    ask: Ask


class Exchange:
    """Has all workers checkpoint before others take their place, tells of it and writes it down.

    Args:
        folder: the run folder.
        least: the fewest workers that the run goes on with.
        most: the most that it has use for.
        send: takes the news.
        can_pause: whether the task can go on from a checkpoint; if not, no worker makes room.
        clock: in seconds.
    """

    def __init__(
        self,
        folder: RunFolder,
        least: int,
        most: int,
        send: Send,
        can_pause: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.storage_path, self.name = folder.storage_path, folder.name
        self.least, self.most, self.send, self.can_pause, self.clock = least, most, send, can_pause, clock
        self.members: Sequence[Member] = ()
        self.count: int | None = None  # of the workers that were started last
        self.waiting_since: float | None = None
        self._forget()

    def _forget(self) -> None:
        self.why = ""
        self.question = pause.announce
        self.answers: list[Future[Any]] = []
        self.asked_at = 0.0

    def began(self, members: Sequence[Member]) -> None:
        """These are the workers, by their ranks, from here on."""
        self.members, self.waiting_since = members, None

    def starting(self, count: int) -> None:
        """So many workers are about to be started, in place of those that there may be."""
        if self.count is None and self.least < self.most:
            self._tell(f"{count} start, of {self.least} to {self.most}")
        elif self.count is not None and (self.why or count != self.count):
            why, before = self.why or "workers failed", self.count
            in_time(lambda: add_change(RunFolder(self.storage_path, self.name), before, count, why))
            self._tell(f"{count} start{f' instead of {self.count}' if count != self.count else ''}: {why}")
        self.count, self.members = count, ()
        self._forget()

    def is_ready(self, room: int | None, draining: Mapping[str, int]) -> bool:
        """Whether the workers have checkpointed and wait for others to take their place; asks them to where it is time.

        Args:
            room: for how many workers there is room, if somebody looked.
            draining: the nodes that will be taken away, and when: UNIX time in milliseconds, or 0.
        """
        if not self.can_pause:
            return False
        self._find_reason(room, draining)
        if not self.why or not all(answer.done() for answer in self.answers):
            return False
        if any(answer.exception() for answer in self.answers):
            return False  # a worker died, which Ray tells
        if self.answers and all(answer.result() for answer in self.answers):
            if self.question is pause.begin:
                return True
            self.question = pause.begin
        elif self.answers and self.clock() - self.asked_at < ASK_S:
            return False
        self.asked_at = self.clock()
        self.answers = [member.ask(self.question) for member in self.members]
        return False

    def _find_reason(self, room: int | None, draining: Mapping[str, int]) -> None:
        hosts = {member.host: draining[member.node] for member in self.members if member.node in draining}
        if self.why:
            return
        if hosts:
            known = [at / 1000 - time.time() for at in hosts.values() if at]
            when = f" in {max(0, min(known)):.0f} s" if known else ""
            self.why = f"{' and '.join(sorted(hosts))} will be taken away"
            self._tell(f"{self.why}{when}: all checkpoint, for others to go on")
        elif room is not None and room > len(self.members):
            self.why = f"there is room for {room}"
            self._tell(f"{self.why}: all checkpoint, for {room} to go on instead of {len(self.members)}")

    def keep_waiting(self) -> None:
        """There are no workers; returns as long as they may still get room.

        Raises:
            TrainingError: they have waited for that for too long.
        """
        now = self.clock()
        self.waiting_since = now if self.waiting_since is None else self.waiting_since
        if now - self.waiting_since > WAIT_FOR_NODES_S:
            raise TrainingError(
                f"there was no room for at least {self.least} workers in {WAIT_FOR_NODES_S} s: look at `ray status`, "
                "and go on with --resume once there is."
            )

    def _tell(self, message: str) -> None:
        self.send([WorkersChanged(message)])
