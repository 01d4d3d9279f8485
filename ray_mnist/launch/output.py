"""What the user's code prints, warns of and logs in a worker: rank 0's is told, and each worker's is in a log."""

import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from typing import Any

from ray_mnist.cli import console
from ray_mnist.launch.channel import Outbox, Send
from ray_mnist.run.events import Printed, Tell, WorkerStarted

# The root logger's level, and of each of its handlers for the terminal the stream, the level and the formatter.
RootLogger = tuple[int, list[tuple[str, int, logging.Formatter | None]]]


@contextmanager
def worker_output(send: Send, rank: int, log: str, root: RootLogger) -> Iterator[Tell]:
    """Has the output of the `with` arrive where it belongs; gives what else is to be told a way there.

    Args:
        send: what tells the process that started the run.
        rank: of this worker.
        log: where all that this process prints is, in words.
        root: the other process's `root_logger`.
    """
    outbox = Outbox(send)
    outbox.tell(WorkerStarted(rank, log))
    try:
        with told_output(outbox.tell) if rank == 0 else nullcontext(), console.quiet():
            set_root_logger(root)
            yield outbox.tell
    finally:
        outbox.close()


@contextmanager
def told_output(tell: Tell) -> Iterator[None]:
    """Tells of all that Python code writes to stdout and stderr, too."""
    with redirect_stdout(Tee("stdout", tell)), redirect_stderr(Tee("stderr", tell)):
        yield


class Tee:
    """This process's stdout or stderr, which also tells what is written to it."""

    def __init__(self, name: str, tell: Tell) -> None:
        self.stream, self.name, self.tell, self.pid = getattr(sys, name), name, tell, os.getpid()

    def write(self, text: str) -> int:
        """Writes and tells; in a process forked from this one, such as a data loader's, it only writes."""
        written: int = self.stream.write(text)
        if os.getpid() == self.pid:
            self.tell(Printed(text, self.name))
        return written

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes them."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def root_logger() -> RootLogger:
    """How this process logs to its terminal."""
    root = logging.getLogger()
    found = []
    for handler in root.handlers:
        for name in ("stdout", "stderr"):
            if isinstance(handler, logging.StreamHandler) and handler.stream is getattr(sys, name):
                plain = type(handler.formatter) is logging.Formatter  # another may not be one that can be sent
                found.append((name, handler.level, handler.formatter if plain else None))
    return root.level, found


def set_root_logger(root: RootLogger) -> None:
    """Has this process log to its terminal as another does, in place of what Ray has set up."""
    level, handlers = root
    logging.basicConfig(force=True, level=level, handlers=[])
    for name, handler_level, formatter in handlers:
        handler = logging.StreamHandler(getattr(sys, name))
        handler.setLevel(handler_level)
        handler.setFormatter(formatter)
        logging.getLogger().addHandler(handler)
