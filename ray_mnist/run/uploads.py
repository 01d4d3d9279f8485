"""Brings checkpoints into the run folder beside the training, so that no storage holds it up that is slow or away."""

import threading
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_mnist.errors import Stopped, TrainingError, one_line
from ray_mnist.run.events import EpochEnded, StorageFails, Tell
from ray_mnist.run.folder import Part, RunFolder
from ray_mnist.run.outcome import Row
from ray_mnist.run.progress import went_on
from ray_mnist.run.records import metrics_csv

PATIENCE_S = 600  # with a storage that takes nothing, before it counts as gone
RETRY_S = 5
LOOK_S = 0.5
CLOSE_S = 30  # for what is under way when a training breaks off


@dataclass
class Saved:
    """A checkpoint in a local folder, which `held` removes; `best` and `history` are those of its step.

    It may be this rank's `part` of a checkpoint, of which each rank has `Uploads`.
    """

    name: str
    source: Path
    held: ExitStack
    best: str | None
    history: list[Row]
    part: Part | None = None


class Uploads:
    """Takes checkpoints, and puts one at a time into the run folder, in a thread of its own.

    The training never waits for it, but where it ends. Of the checkpoints that wait for their turn it drops what the
    run folder would not keep either: all but the newest and the best. At most three are on the local disk.

    Args:
        folder: gets them, with the metrics up to each.
        tell: takes the news that an epoch's checkpoint is there, or that the storage fails.
        clock: in seconds.
    """

    def __init__(self, folder: RunFolder, tell: Tell, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder, self.tell, self.clock = folder, tell, clock
        self.newest: str | None = None  # that is whole, in the run folder
        self.told = 0  # how many epochs
        self._waiting: list[Saved] = []
        self._lock = threading.Lock()
        self._idle, self._closed = threading.Event(), threading.Event()
        self._idle.set()
        self._error: Exception | None = None
        self._why: str | None = None  # the storage fails, if it does
        self._parts = self._furthest = 0  # of what is being written: in this try, and in any
        self._moved_at = 0.0  # when it last got further than before

    def __enter__(self) -> "Uploads":
        return self

    def __exit__(self, *_: object) -> None:
        """Waits for what is under way, however the training ended, but not for ever; nothing is written after that."""
        if not self._closed.is_set():
            self._idle.wait(CLOSE_S)
        with self._lock:
            self._closed.set()
            self._drop_waiting({each.name for each in self._waiting})
        self._idle.wait(LOOK_S)  # the thread ends at once, unless the storage does not answer

    def add(self, saved: Saved, on_all: Callable[[set[str]], set[str]] = lambda waiting: waiting) -> None:
        """Takes a checkpoint, which is the newest.

        Args:
            saved: the checkpoint, or this rank's part of it.
            on_all: which of the names that wait here do so on all ranks that have a part. None is dropped that another
                rank is uploading.
        """
        with self._lock:
            waiting = on_all({each.name for each in self._waiting})
            self._drop_waiting(waiting - {saved.best or ""})
            self._waiting.append(saved)
            if self._idle.is_set():
                self._idle.clear()
                self._moved_at = self.clock()
                threading.Thread(target=self._upload_waiting, daemon=True).start()

    def check(self) -> None:
        """Returns at once.

        Raises:
            TrainingError: the storage takes nothing, and has not for `PATIENCE_S` seconds.
        """
        if self._error:
            raise self._error
        if not self._idle.is_set() and self.clock() - self._moved_at > PATIENCE_S:
            self._closed.set()
            there = f"{self.folder.location(self.newest)} is the newest one that is whole" if self.newest else "none is"
            raise TrainingError(
                f"no checkpoint could be written to {self.folder} for {PATIENCE_S} s ({self._why or 'no answer'}): "
                f"{there}, go on with --resume once the storage is there again."
            )

    def flush(self) -> None:
        """Waits until all are in the run folder; raises what `check` does."""
        while not self._idle.wait(LOOK_S):
            self.check()
        self.check()

    def _drop_waiting(self, names: Collection[str]) -> None:
        for saved in self._waiting:
            if saved.name in names:
                saved.held.close()
        self._waiting = [saved for saved in self._waiting if saved.name not in names]

    def _upload_waiting(self) -> None:
        while True:
            with self._lock:
                if not self._waiting or self._closed.is_set():
                    self._idle.set()
                    return
                saved = self._waiting.pop(0)
            try:
                self._upload(saved)
            except Exception as error:
                self._error = error
                self._idle.set()
                return

    def _upload(self, saved: Saved) -> None:
        with saved.held:
            self._insist(lambda: self.folder.add_checkpoint(saved.source, saved.name, self._went_on, saved.part))
            if (part := saved.part) and part.rank:
                return  # the rest is rank 0's
            while part and not self._insist(lambda: self.folder.join_parts(saved.name, part)):
                went_on()  # the ranks that are not there yet look after themselves
                self._closed.wait(LOOK_S)
            self.newest = saved.name
            self._insist(lambda: self.folder.write("metrics.csv", metrics_csv(saved.history)))
            newer_than = saved.name if part else None
            self._insist(lambda: self.folder.keep_only(saved.name, saved.best, newer_than=newer_than))
        for row in saved.history[self.told :]:
            self.tell(EpochEnded(row))
        self.told = len(saved.history)

    def _insist(self, write: Callable[[], Any]) -> Any:
        """Writes, again and again where the storage fails, for as long as somebody wants it."""
        self._furthest = 0
        while not self._closed.is_set():
            self._parts = 0
            try:
                written = write()
            except OSError as error:
                if self._why is None:
                    self.tell(StorageFails(str(self.folder), one_line(error), PATIENCE_S))
                self._why = one_line(error)
                went_on()  # to the next try, which is no stall
                self._closed.wait(RETRY_S)
            else:
                self._why, self._moved_at = None, self.clock()
                return written
        raise Stopped

    def _went_on(self) -> None:
        went_on()
        self._parts += 1
        if self._parts > self._furthest:
            self._furthest, self._moved_at = self._parts, self.clock()
