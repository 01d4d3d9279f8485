"""What a person sees: a header, a line an epoch, a summary; and errors in one sentence."""

import atexit
import gc
import io
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import dropwhile
from traceback import walk_stack
from typing import NoReturn, Self, TextIO

from rich.console import Console

from ray_mnist.cli.live_line import SEPARATOR, live_line
from ray_mnist.errors import RequestError, Stopped, TrainingError, one_line
from ray_mnist.run.events import (
    CheckpointPassedOver,
    EpochEnded,
    Event,
    Printed,
    Progress,
    StorageFails,
    WorkersChanged,
    WorkersFailed,
    WorkerStarted,
)
from ray_mnist.run.outcome import Row
from ray_mnist.run.records import LAST_COLUMNS, columns

NOISY = ("pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities", "ray")
PLAIN_EVERY_S = 60
# Of a terminal that is gone; the last is rich's, of a pipe that nobody reads.
GONE = (OSError, ValueError, SystemExit)

# What users print arrives as it is, through rich too.
console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)


def say(line: str) -> None:
    """One line of the run's own."""
    console.print(line)


def epoch_line(row: Row, max_epochs: int) -> str:
    """Such as `epoch  3/10  train_loss 0.2104  val_loss 0.2310  val_accuracy 0.9312  41,203 samples/s`."""
    width, of = (len(str(max_epochs)), f"/{max_epochs}") if max_epochs > 0 else (3, "")
    others = ("epoch", "step", *LAST_COLUMNS)
    metrics = "  ".join(f"{name} {row[name]:.4f}" for name in columns([row]) if name in row and name not in others)
    return f"epoch {row['epoch']:{width}.0f}{of}  {metrics}  {row['samples_per_second']:,.0f} samples/s"


def progress_parts(progress: Progress, max_epochs: int) -> list[str]:
    """Such as `epoch 3/10`, `batch 120/375` and `0:00:12 left`, the most important ones first."""
    epoch = f"epoch {progress.epoch}{f'/{max_epochs}' if max_epochs > 0 else ''}"
    phase = "batch" if progress.phase == "training" else progress.phase
    left, rate, loss, saved = progress.seconds_left, progress.samples_per_second, progress.loss, progress.checkpoint
    parts = [
        epoch if progress.phase in ("training", "validation") else None,
        f"{phase} {progress.batch}{f'/{progress.batches}' if progress.batches else ''}",
        None if left is None else f"{timedelta(seconds=round(left))} left",
        None if rate is None else f"{rate:,.0f} samples/s",
        None if loss is None else f"loss {loss:.4f}",
        f"{progress.workers} workers" if progress.workers > 1 else None,
        None if saved is None else f"checkpoint {saved}",
    ]
    return [part for part in parts if part]


class Display:
    """Shows what a run tells of itself: each epoch once, how far it is, what rank 0 prints, and each failure.

    On a terminal and in a notebook a line says how far it is, which is gone after the `with`; elsewhere one a minute
    does, as long as there is no other. A terminal that is gone harms no run.

    Args:
        max_epochs: of the run.
        known: the rows of the epochs that a run before this one has shown.
        progress: whether to show how far it is.
        clock: in seconds.
    """

    def __init__(
        self,
        max_epochs: int = -1,
        known: Sequence[Row] = (),
        progress: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_epochs, self.shown = max_epochs, max((row["epoch"] for row in known), default=0)
        self.logs: dict[int, str] = {}  # of each rank
        self.line = live_line(console) if progress else None
        self.progress, self.clock = progress, clock
        self.said_at: float | None = None  # when a line last said how far it is, or there was something to say first

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.line:
            with suppress(*GONE):
                self.line.close()

    def __call__(self, event: Event) -> None:
        """Shows it."""
        with suppress(*GONE):
            match event:
                case EpochEnded(row) if row["epoch"] > self.shown:
                    self.shown = row["epoch"]
                    self.said_at = self.clock()
                    say(epoch_line(row, self.max_epochs))
                case Progress() if self.progress:
                    self._show_progress(progress_parts(event, self.max_epochs))
                case Printed(text, stream):
                    # Above the line on a terminal there can be whole lines only.
                    print(text, end="", file=getattr(sys, stream), flush=self.line is None)
                case WorkerStarted(rank, log):
                    self.logs[rank] = log
                case CheckpointPassedOver(location, why):
                    say(f"passed over the checkpoint {location}: it {why}")
                case WorkersChanged(message):
                    self._no_progress()
                    say(f"workers: {message}")
                case StorageFails(location, why, for_s):
                    say(f"no checkpoint can be written to {location}, trying again for up to {for_s:.0f} s: {why}")
                case WorkersFailed(ranks, message):
                    self._no_progress()
                    say(f"failure: {message}")
                    for rank in filter(self.logs.get, ranks):
                        say(f"what worker {rank} printed is in {self.logs[rank]}")

    def _show_progress(self, parts: list[str]) -> None:
        if self.line:
            self.line.show(parts)
        elif self.said_at is None:
            self.said_at = self.clock()
        elif self.clock() - self.said_at >= PLAIN_EVERY_S:
            self.said_at = self.clock()
            say(SEPARATOR.join(parts))

    def _no_progress(self) -> None:
        if self.line:
            self.line.show([])


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps Lightning's and Ray's own messages and warnings off the terminal, for the time of the `with`."""
    # Ray calls some of its loggers by their files.
    by_file = (name for name in logging.root.manager.loggerDict if f"{os.sep}site-packages{os.sep}ray{os.sep}" in name)
    loggers = [logging.getLogger(name) for name in (*NOISY, *by_file)]
    levels = [logger.level for logger in loggers]
    show = warnings.showwarning

    def show_others(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not is_noise(filename):
            show(message, category, filename, lineno, file, line)

    warnings.showwarning = show_others
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        if warnings.showwarning is show_others:  # nobody has put something else there meanwhile
            warnings.showwarning = show
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def is_noise(filename: str) -> bool:
    """Whether the warning that is being shown is Lightning's or Ray's own, or torch's about their code.

    The file that it names tells little: Lightning often names that of whoever called it, which may be the user's.
    """
    stack = [(frame.f_globals.get("__name__", ""), frame.f_code.co_filename) for frame, _ in walk_stack(None)]
    warned = dropwhile(lambda frame: frame[0] != "warnings", stack)
    # Users, too, may call the functions that Lightning warns with.
    callers = dropwhile(lambda frame: frame[0] in ("warnings", "lightning_utilities.core.rank_zero"), warned)
    packages = [(module.partition(".")[0], file) for module, file in callers]
    who = packages[0][0] if packages else ""
    about_noisy = any(package in NOISY for package, file in packages if file == filename)
    return who in NOISY or (who in ("torch", "typing_extensions") and about_noisy)


def ended(end: KeyboardInterrupt | Stopped, advice: str) -> BaseException:
    """What is raised once Ctrl-C or SIGTERM has ended the work, with how to go on: for SIGTERM its own exit status."""
    if isinstance(end, KeyboardInterrupt):
        return KeyboardInterrupt(advice)
    print(f"terminated: {advice}", file=sys.stderr, flush=True)
    return SystemExit(128 + signal.SIGTERM)


def run(command: Callable[[], object]) -> NoReturn:
    """Does a command line's work, and ends the process with its exit status once all is done that was left to the end.

    Python would then take apart what was imported, for which torch and Lightning take more than a second.
    """
    status = 1

    def leave() -> None:
        logging.shutdown()
        for file in gc.get_objects():  # of which Python would close those that nobody has closed
            if type(file) in (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom):
                with suppress(OSError, ValueError):  # a closed one, or nobody reads
                    file.flush()
        os._exit(status)

    atexit.register(leave)  # before all others, and therefore called after them
    try:
        status = exit_status(command)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    sys.exit(status)


def exit_status(command: Callable[[], object]) -> int:
    """Runs a command line's work: 0 done, 2 the request was wrong, 1 training failed, 130 interrupted."""
    try:
        command()
    except RequestError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except TrainingError as error:
        if error.details:
            print(error.details, file=sys.stderr)
        print(f"error: training failed: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"interrupted{': ' if str(error) else ''}{error}", file=sys.stderr)
        return 130
    except Exception as error:
        traceback.print_exc()
        print(f"error: training failed: {type(error).__name__}: {one_line(error)}", file=sys.stderr)
        return 1
    return 0
