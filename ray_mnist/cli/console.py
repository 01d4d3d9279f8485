"""What a person sees: a header, a line an epoch, a summary; and errors in one sentence."""

import logging
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

from ray_mnist.errors import RequestError, TrainingError, one_line
from ray_mnist.run.folder import RunFolder
from ray_mnist.run.outcome import Row
from ray_mnist.run.records import read_failures, read_metrics

POLL_S = 0.3
NOISY_LOGGERS = ("pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities", "ray", "py.warnings")

console = Console(highlight=False, soft_wrap=True)


def say(line: str) -> None:
    """One line of the run's own."""
    console.print(line, markup=False)


def epoch_line(row: Row, max_epochs: int) -> str:
    """Such as `epoch  3/10  train_loss 0.2104  val_loss 0.2310  val_accuracy 0.9312  41,203 samples/s`."""
    width, of = (len(str(max_epochs)), f"/{max_epochs}") if max_epochs > 0 else (3, "")
    own = ("epoch", "step", "samples_per_second", "seconds")
    metrics = "  ".join(f"{name} {value:.4f}" for name, value in row.items() if name not in own)
    return f"epoch {row['epoch']:{width}.0f}{of}  {metrics}  {row['samples_per_second']:,.0f} samples/s"


@contextmanager
def follow(folder: RunFolder, max_epochs: int) -> Iterator[None]:
    """Prints each epoch and each failure as the workers, wherever they are, write them into the run folder."""
    shown_epochs, shown_failures = len(read_metrics(folder)), len(read_failures(folder))
    finished = threading.Event()

    def show_news() -> None:
        nonlocal shown_epochs, shown_failures
        for failure in read_failures(folder)[shown_failures:]:
            say(f"failure: {failure}")
            shown_failures += 1
        for row in read_metrics(folder)[shown_epochs:]:
            say(epoch_line(row, max_epochs))
            shown_epochs += 1

    def watch() -> None:
        while not finished.wait(POLL_S):
            show_news()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        watcher.join()
        show_news()


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps Lightning's and Ray's own messages and Python's warnings off the terminal, for the time of the `with`."""
    loggers = [logging.getLogger(name) for name in NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def exit_status(command: Callable[[], None]) -> int:
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
