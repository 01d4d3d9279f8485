"""What a person sees of a sweep: a live table of its trials, or a line a trial where there is no terminal.

Ray Tune's own reporters print the whole table anew every few seconds, into log files too, with seven lines above it.
"""

import math
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ray import tune
from rich.live import Live
from rich.table import Table as RichTable

from ray_mnist.cli import console
from ray_mnist.cli.live_line import SEPARATOR
from ray_mnist.progress_reporter import EVERY_S
from ray_mnist.run.events import Event, Progress

SHOWN_AT_ONCE = 25


class Shown:
    """When the table was drawn, or a line said, last."""

    at = -math.inf


# Of this process: Ray Tune keeps its callbacks for a resumed sweep, which has a terminal of its own.
live = Live(console=console.console, auto_refresh=False)
progress: dict[str | None, Progress] = {}  # of each trial, the newest
clock = time.monotonic


def follow(event: Event) -> None:
    """Takes how far a trial is inside an epoch."""
    if isinstance(event, Progress):
        progress[event.trial] = event


def on_terminal() -> AbstractContextManager[Any]:
    """The table stays on the terminal after the `with`, as it was last, and the cursor below it."""
    return live if console.console.is_terminal else nullcontext()


class Table(tune.Callback):
    """Follows the trials as Ray Tune reports them."""

    def __init__(self, metric: str, max_epochs: int) -> None:
        self.metric, self.max_epochs = metric, max_epochs

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Draws the table again, twice a second at most, or says each minute how far the running trials are."""
        if console.console.is_terminal:
            if clock() - Shown.at >= EVERY_S:
                self.on_experiment_end(trials)
        elif Shown.at == -math.inf:
            Shown.at = clock()
        elif clock() - Shown.at >= console.PLAIN_EVERY_S:
            for trial in trials:
                if far := self._far(trial):
                    self._say(f"{trial.trial_id}  {far}")

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Draws the table, however new the last one is."""
        if console.console.is_terminal:
            Shown.at = clock()
            table = RichTable("trial", "parameters", "status", "epoch", self.metric, "under way")
            order = {"RUNNING": 0, "PENDING": 1}
            for trial in sorted(trials, key=lambda trial: order.get(trial.status, 2))[:SHOWN_AT_ONCE]:
                standing = (*self._standing(trial), self._far(trial))
                table.add_row(trial.trial_id, words(trial.config), trial.status.lower(), *standing)
            live.update(table, refresh=True)

    def _say(self, line: str) -> None:
        Shown.at = clock()
        console.say(line)

    def _far(self, trial: Any) -> str:
        """Such as `epoch 3/10  batch 120/375`, of a trial that is running."""
        known = progress.get(trial.trial_id) if trial.status == "RUNNING" else None
        return SEPARATOR.join(console.progress_parts(known, self.max_epochs)[:2]) if known else ""

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Says so."""
        if not console.console.is_terminal:
            epoch, value = self._standing(trial)
            self._say(f"{trial.trial_id}  {words(trial.config)}  epoch {epoch}  {self.metric} {value}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Says so."""
        if not console.console.is_terminal:
            self._say(f"{trial.trial_id}  {words(trial.config)}  failed")

    def _standing(self, trial: Any) -> tuple[str, str]:
        """Such as `3/10` and `0.2310`."""
        result = trial.last_result or {}
        epoch = f"{result['epoch']:.0f}/{self.max_epochs}" if "epoch" in result else ""
        return epoch, f"{result[self.metric]:.4f}" if self.metric in result else ""


def words(parameters: dict[str, Any]) -> str:
    """Such as `lr 0.0013  batch_size 64`."""
    return "  ".join(
        f"{name.rpartition('.')[2]} {f'{value:.4g}' if isinstance(value, float) else value}"
        for name, value in parameters.items()
    )
