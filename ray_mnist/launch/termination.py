"""What SIGTERM does to the process that started a run: the run checkpoints, and ends."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ray_mnist.errors import Stopped

GRACE_S = 30  # to checkpoint in; whoever sends SIGTERM often sends SIGKILL after no more than that
SAME_S = 1  # in which another SIGTERM is the same one: coreutils' `timeout` sends two at once


@contextmanager
def on_sigterm(stop: Callable[[], None]) -> Iterator[None]:
    """For the time of the `with`, SIGTERM calls `stop`, upon which the run is to checkpoint and raise Stopped.

    A run that has not ended after `GRACE_S` seconds, or at a SIGTERM more than `SAME_S` after the first, is ended as by
    Ctrl-C. Signals reach the main thread alone: in another one, nothing is changed.

    Raises:
        Stopped: SIGTERM came, and the run ended before its work was done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    main = threading.get_ident()
    again = threading.Timer(GRACE_S, lambda: signal.pthread_kill(main, signal.SIGTERM))
    again.daemon = True
    asked_at: float | None = None

    def answer(*_: Any) -> None:
        nonlocal asked_at
        if asked_at is None:
            asked_at = time.monotonic()
            again.start()
            stop()
        elif time.monotonic() - asked_at > SAME_S:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, answer)
    try:
        yield
    except KeyboardInterrupt:
        if asked_at is None:
            raise
        raise Stopped from None
    finally:
        again.cancel()
        signal.signal(signal.SIGTERM, before)
