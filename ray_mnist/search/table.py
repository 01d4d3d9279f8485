"""What a person sees of a sweep: a live table of its trials, or a line a trial where there is no terminal."""

from typing import Any

from ray import tune
from rich.live import Live
from rich.table import Table as RichTable

from ray_mnist.cli import console

SHOWN_AT_ONCE = 25


class Table(tune.Callback):
    """Follows the trials as Ray Tune reports them."""

    def __init__(self, metric: str, max_epochs: int) -> None:
        self.metric, self.max_epochs = metric, max_epochs
        self.live: Live | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Ray Tune keeps its callbacks for a resumed sweep, which has a terminal of its own.
        return vars(self) | {"live": None}

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Draws the table again."""
        if not console.console.is_terminal:
            return
        if self.live is None:
            self.live = Live(console=console.console, auto_refresh=False, transient=True)
            self.live.start()
        self.live.update(self._table(trials), refresh=True)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Leaves the last table on the terminal."""
        if self.live is not None:
            self.live.stop()
            self.live = None
            console.console.print(self._table(trials))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Says so."""
        if not console.console.is_terminal:
            console.say(f"{trial.trial_id}  {words(trial.config)}  {self._standing(trial)}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Says so."""
        if not console.console.is_terminal:
            console.say(f"{trial.trial_id}  {words(trial.config)}  failed")

    def _table(self, trials: list[Any]) -> RichTable:
        table = RichTable("trial", "parameters", "status", self.metric)
        order = {"RUNNING": 0, "PENDING": 1}
        for trial in sorted(trials, key=lambda trial: order.get(trial.status, 2))[:SHOWN_AT_ONCE]:
            value = (trial.last_result or {}).get(self.metric)
            status = f"{trial.status.lower()} {self._standing(trial, with_metric=False)}"
            table.add_row(trial.trial_id, words(trial.config), status, "" if value is None else f"{value:.4f}")
        return table

    def _standing(self, trial: Any, with_metric: bool = True) -> str:
        result = trial.last_result or {}
        if "epoch" not in result:
            return ""
        metric = f"  {self.metric} {result.get(self.metric, float('nan')):.4f}" if with_metric else ""
        return f"epoch {result['epoch']:.0f}/{self.max_epochs}{metric}"


def words(parameters: dict[str, Any]) -> str:
    """Such as `lr 0.0013  batch_size 64`."""
    parts = (
        f"{name.rpartition('.')[2]} {f'{value:.4g}' if isinstance(value, float) else value}"
        for name, value in parameters.items()
    )
    return "  ".join(parts)
