"""Has the ranks of a training checkpoint at one step and wait there, each in its process, for others to go on.

It imports neither torch nor Lightning, which takes seconds.
"""

import threading
from dataclasses import dataclass, field


@dataclass
class Pause:
    """What is known of it to the training in this process; `stop` has rank 0 say that all are to checkpoint and end."""

    stop: threading.Event
    asked: bool = False
    reached: threading.Event = field(default_factory=threading.Event)


HERE: list[Pause] = []  # of the training that began last


def follow(stop: threading.Event) -> None:
    """Has the functions below be about the training that begins, which ends once rank 0's `stop` is set."""
    HERE[:] = [Pause(stop)]


def announce() -> bool:
    """Has this rank wait where it would end; whether there is a training that knows of it."""
    for pause in HERE:
        pause.asked = True
    return bool(HERE)


def begin() -> bool:
    """Has the ranks, which all know of it, checkpoint and wait; whether this one does so already."""
    HERE[0].stop.set()
    return HERE[0].reached.is_set()


def wait_if_asked() -> None:
    """Waits for this process's end if the training was stopped for others to go on, and not for good."""
    if HERE[0].asked:
        HERE[0].reached.set()
        threading.Event().wait()
