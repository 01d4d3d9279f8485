"""Notices workers that do not go on, in Ray Train's controller.

It imports neither torch nor Lightning, which takes seconds.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Any

from ray_mnist.checks.preflight import WAIT_FOR_NODES_S
from ray_mnist.errors import Stalled
from ray_mnist.launch.failures import in_time
from ray_mnist.run.folder import RunFolder
from ray_mnist.run.progress import START_UP, Position, Stacks, position, stacks

STALLS = "stalls"  # the folder, in the run folder
ASKED = 20  # times in the time that makes a stall
ANSWER_S = 5  # in which a worker answers that can

Ask = Callable[[Callable[[], Any]], "Future[Any]"]  # has a worker call a function, beside its training


class WatchedWorker:
    """What is known of one worker; times are of the question, since its answer may have waited to be read."""

    def __init__(self, host: str, ask: Ask, now: float) -> None:
        self.host, self.ask = host, ask
        self.position = Position()
        self.moved_at = self.heard_at = now
        self.ask_position(now)

    def ask_position(self, now: float) -> None:
        """Asks where it is."""
        self.asked_at, self.answer = now, self.ask(position)

    def hear(self) -> None:
        """Takes in its answer."""
        self.heard_at = self.asked_at
        with suppress(Exception):  # it died, which Ray tells
            found = self.answer.result()
            if found != self.position:
                self.position, self.moved_at = found, self.asked_at

    def stalled(self, why: str, stack: str) -> Stalled:
        """The error that the worker is to have failed with."""
        after = "" if self.position.phase == START_UP else f" after step {self.position.step}"
        return Stalled(f"on {self.host} stalled in {self.position.phase}{after}: {why}", stack)


class StallWatch:
    """Asks each worker now and then where it is, and names those for which the others wait.

    Args:
        folder: gets a file with the stacks of each worker.
        timeout_s: after so many seconds without an answer of one, or without progress of any, it is a stall. Start-up
            may have data to download, and gets as long as new machines do on top.
        clock: gives the seconds since any time.
    """

    def __init__(self, folder: RunFolder, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.storage_path, self.name = folder.storage_path, folder.name
        self.timeout_s, self.clock = timeout_s, clock
        self.workers: list[WatchedWorker] = []

    def begin(self, workers: Sequence[tuple[str, Ask]]) -> None:
        """Watches these, by their ranks, which have just started: the host of each, and a way to ask it."""
        now = self.clock()
        self.workers = [WatchedWorker(host, ask, now) for host, ask in workers]

    def look(self) -> dict[int, Stalled]:
        """The ranks that are to be taken for failed, and why; it takes no time unless there are any."""
        now = self.clock()
        for worker in self.workers:
            if worker.answer.done():
                worker.hear()
                if now - worker.asked_at >= self.timeout_s / ASKED:
                    worker.ask_position(now)
        starting = any(worker.position.phase == START_UP for worker in self.workers)
        bound = self.timeout_s + WAIT_FOR_NODES_S * starting
        # Who waits for one that goes on, such as a slower one in an evaluation, stands still and is well.
        heard, moved = (worker.heard_at for worker in self.workers), (worker.moved_at for worker in self.workers)
        standing = min(heard) - max(moved) > bound
        if standing or any(now - worker.asked_at > self.timeout_s for worker in self.workers):
            return self._named(bound if standing else None)
        return {}

    def _named(self, standing_s: float | None) -> dict[int, Stalled]:
        """The ones to blame, once there is what all are doing; none if all answer and do not stand still."""
        answers = [worker.ask(stacks) for worker in self.workers]
        wait(answers, ANSWER_S)
        found: dict[int, Stacks] = {
            rank: answer.result() for rank, answer in enumerate(answers) if answer.done() and not answer.exception()
        }
        silent = [rank for rank in range(len(self.workers)) if rank not in found]
        if not silent and standing_s is None:
            return {}
        for rank in silent:  # its last answer is old, and the others have come as far as they can without it
            known = [*(self.workers[other].position for other in found), self.workers[rank].position]
            self.workers[rank].position = max(known, key=lambda position: position.step)
        in_time(lambda: self._write(found))
        if silent:
            why = f"no answer for {self.timeout_s:g} s"
            return {rank: self.workers[rank].stalled(why, "") for rank in silent}
        busy = [rank for rank in found if not found[rank].waits] or [*found]
        first = min(self.workers[rank].position.step for rank in busy)
        behind = [rank for rank in busy if self.workers[rank].position.step == first]
        why = f"no progress for {standing_s:g} s"
        return {rank: self.workers[rank].stalled(why, found[rank].text) for rank in behind}

    def _write(self, found: dict[int, Stacks]) -> None:
        folder = RunFolder(self.storage_path, self.name)
        for rank, worker in enumerate(self.workers):
            stack = found[rank].text if rank in found else "It gave no answer.\n"
            at = f"worker {rank} on {worker.host}, in {worker.position.phase} after step {worker.position.step}"
            folder.write(f"{STALLS}/rank-{rank}.txt", f"{at}\n\n{stack}")
