"""What rank 0 alone can know in the middle of an epoch, and all ranks have to do at the same step."""

import threading
import time
from collections.abc import Callable

import pytorch_lightning as pl

LOOK_S = 1.0


class RankZero:
    """Has all ranks checkpoint at one step when rank 0's clock says so, and stop at one step when rank 0 was told to.

    Ranks that did not save together would wait for each other for ever, and to ask rank 0 in each step would cost as
    much as the step of a small model. So it is asked in some steps only: its answer, one broadcast over the CPU, says
    also after how many more steps to ask again. They are as many as went by in `LOOK_S` of late, at most doubled each
    time, so that a checkpoint is late by about a second, or by the one step that takes longer than that.

    Args:
        stop: set on rank 0 once the run is to checkpoint and end.
        every_s: seconds after the last checkpoint, when the next is due; None if time alone makes none due.
        clock: in seconds.
    """

    def __init__(
        self, stop: threading.Event, every_s: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.stop, self.every_s, self.clock = stop, every_s, clock

    def begin(self, trainer: pl.Trainer) -> None:
        """Starts the clock, and has the first step ask."""
        self.asked_step, self.asked_at, self.steps = trainer.global_step, self.clock(), 1
        self.saved()

    def saved(self) -> None:
        """There is a new checkpoint."""
        self.saved_at = self.clock()

    def says(self, trainer: pl.Trainer) -> tuple[bool, bool]:
        """Whether to save, and whether to stop then, the same on all ranks; all call it together."""
        passed = trainer.global_step - self.asked_step
        if passed < self.steps:
            return False, False
        now = self.clock()
        due = self.every_s is not None and now - self.saved_at >= self.every_s
        seconds = now - self.asked_at
        steps = min(2 * passed, int(passed * LOOK_S / seconds)) if seconds else 2 * passed
        self.asked_step, self.asked_at = trainer.global_step, now
        answer = due, self.stop.is_set(), max(1, steps)
        due, stop, self.steps = trainer.strategy.broadcast(answer)
        return due or stop, stop
