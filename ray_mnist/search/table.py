"""What a person sees of a sweep: a live table of its trials, or a line a trial where there is no terminal.

Ray Tune's own reporters print the whole table anew every few seconds, into log files too, with seven lines above it.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ray import tune
from rich.live import Live
from rich.table import Table as RichTable

from ray_mnist.cli import console

SHOWN_AT_ONCE = 25

# Of this process: Ray Tune keeps its callbacks for a resumed sweep, which has a terminal of its own.
live = Live(console=console.console, auto_refresh=False)


def on_terminal() -> AbstractContextManager[Any]:
    """The table stays on the terminal after the `with`, as it was last, and the cursor below it."""
    return live if console.console.is_terminal else nullcontext()


class Table(tune.Callback):
    """Follows the trials as Ray Tune reports them."""

    def __init__(self, metric: str, max_epochs: int) -> None:
        self.metric, self.max_epochs = metric, max_epochs

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Draws the table again."""
        if console.console.is_terminal:
            table = RichTable("trial", "parameters", "status", "epoch", self.metric)
            order = {"RUNNING": 0, "PENDING": 1}
            for trial in sorted(trials, key=lambda trial: order.get(trial.status, 2))[:SHOWN_AT_ONCE]:
                table.add_row(trial.trial_id, words(trial.config), trial.status.lower(), *self._standing(trial))
            live.update(table, refresh=True)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Says so."""
        if not console.console.is_terminal:
            epoch, value = self._standing(trial)
            console.say(f"{trial.trial_id}  {words(trial.config)}  epoch {epoch}  {self.metric} {value}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Says so."""
        if not console.console.is_terminal:
            console.say(f"{trial.trial_id}  {words(trial.config)}  failed")

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
