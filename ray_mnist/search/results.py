"""What came of a sweep: a row a trial, and its result."""

import csv
import io
import math
from dataclasses import dataclass, field
from typing import Any

from ray_mnist.errors import TrainingError, one_line
from ray_mnist.run.outcome import Row

STOPPED_EARLY = "stopped early"


@dataclass
class TrialRow:
    """One trial: its parameters by their dotted names, its epochs, and what became of it."""

    name: str
    parameters: dict[str, Any]
    history: list[Row]
    status: str  # done, stopped early, or failed: and why
    seconds: float

    @property
    def failed(self) -> bool:
        """Whether it ended by an error."""
        return self.status.startswith("failed")

    def best(self, metric: str, mode: str) -> Row | None:
        """The best of its epochs; None if none was validated."""
        rows = [row for row in self.history if math.isfinite(row.get(metric, math.nan))]
        return (min if mode == "min" else max)(rows, key=lambda row: row[metric], default=None)


@dataclass
class SweepResult:
    """What came of a sweep: `values` is result.json, `path` the sweep folder, `trials` a row each."""

    path: str
    values: dict[str, Any]
    trials: list[TrialRow] = field(repr=False)


def winner_of(rows: list[TrialRow], metric: str, mode: str) -> tuple[TrialRow, Row]:
    """The best trial that did not fail, and its best epoch.

    Raises:
        TrainingError: there is none.
    """
    ranked = [(row, best) for row in rows if not row.failed and (best := row.best(metric, mode))]
    if not ranked:
        raise TrainingError(f"no trial succeeded: {rows[0].status if rows else 'none was started'}")
    return (min if mode == "min" else max)(ranked, key=lambda pair: pair[1][metric])


def reason(error: BaseException) -> str:
    """Why a trial failed, in a line."""
    cause = getattr(error, "cause", None) or error
    text = one_line(cause)
    if "died" in text and "actor" in text.lower():
        return "killed, out of memory, or its machine is gone"
    return text.rpartition("TrainingError: ")[2][:300]


def as_table(rows: list[TrialRow], metric: str, mode: str) -> list[dict[str, Any]]:
    """One row a trial; None where it has no such value."""
    names = list(dict.fromkeys(name for row in rows for name in row.parameters))
    shown = list(dict.fromkeys(["val_loss", "val_accuracy", metric]))
    table = []
    for row in rows:
        best = row.best(metric, mode) or {}
        found = {name: row.parameters.get(name) for name in names} | {"epochs": len(row.history)}
        found |= {name: best.get(name) for name in shown}
        table.append({"trial": row.name, **found, "status": row.status, "seconds": row.seconds})
    return table


def trials_csv(table: list[dict[str, Any]]) -> str:
    """The table as a file's text."""
    text = io.StringIO()
    writer = csv.DictWriter(text, table[0] if table else (), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()
