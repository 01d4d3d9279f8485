"""The texts in a run folder: metrics.csv, failures.jsonl and result.json."""

import csv
import io
import json
from typing import Any

from ray_mnist.run.folder import RunFolder
from ray_mnist.run.outcome import Row

FAILURES = "failures.jsonl"
CHANGES = "workers.jsonl"
FIRST_COLUMNS = ("epoch", "step", "train_loss", "val_loss", "val_accuracy")
LAST_COLUMNS = ("samples_per_second", "seconds")


def metrics_csv(history: list[Row]) -> str:
    """One row an epoch."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns(history), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue()


def columns(history: list[Row]) -> list[str]:
    """The names in the rows, in the order that people read them in: metrics of the user's own come between ours."""
    names = dict.fromkeys(name for row in history for name in row)
    own = [name for name in names if name not in FIRST_COLUMNS + LAST_COLUMNS]
    return [*FIRST_COLUMNS, *own, *LAST_COLUMNS]


def read_metrics(folder: RunFolder) -> list[Row]:
    """The rows of `metrics.csv` so far, none if there is no such file yet."""
    try:
        text = folder.read("metrics.csv").decode()
    except FileNotFoundError:
        return []
    return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(io.StringIO(text))]


def read_failures(folder: RunFolder) -> list[str]:
    """What went wrong with the workers, and what came of it: a line for each time that some failed."""
    try:
        text = folder.read(FAILURES).decode()
    except FileNotFoundError:
        return []
    return [one_failure(json.loads(line)) for line in text.splitlines()]


def one_failure(failure: dict[str, Any]) -> str:
    """A line of the file, in words."""
    return "; ".join([*failure["workers"], failure["then"]])


def add_line(folder: RunFolder, name: str, values: dict[str, Any]) -> None:
    """Adds a line of JSON to a file of such lines."""
    before = folder.read(name).decode() if folder.has(name) else ""
    folder.write(name, f"{before}{json.dumps(values)}\n")


def add_change(folder: RunFolder, before: int, after: int, why: str) -> None:
    """Adds that other workers went on, as many as they were or not, to the list of these changes."""
    add_line(folder, CHANGES, {"before": before, "after": after, "why": why})


def throughput(history: list[Row]) -> float | None:
    """Training samples a second over all epochs: each epoch counts by the samples that it saw."""
    rates = [row["samples_per_second"] for row in history if row.get("samples_per_second")]
    return len(rates) / sum(1 / rate for rate in rates) if rates else None


def to_json(result: dict[str, Any]) -> str:
    """Indented JSON; a number that is not finite becomes null, since JSON has no word for it."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        return None if isinstance(value, float) and value - value != 0 else value

    return json.dumps(finite(result), indent=2) + "\n"
