"""report.html: a run on one page that needs nothing but itself, for a browser or a printer."""

import base64
import json
import time
from collections import Counter
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ray_mnist.run.folder import RunFolder
from ray_mnist.run.outcome import Outcome
from ray_mnist.run.plots import names_of
from ray_mnist.run.records import FAILURES, columns, one_failure

SHOWN = {
    "test_accuracy": "{:.4f}",
    "test_loss": "{:.4f}",
    "val_accuracy": "{:.4f}",
    "val_loss": "{:.4f}",
    "train_loss": "{:.4f}",
    "epochs": "{:,}",
    "train_samples": "{:,}",
    "val_samples": "{:,}",
    "test_samples": "{:,}",
    "samples_per_second": "{:,.0f}",
    "restarts": "{:,}",
}


def write(
    folder: RunFolder,
    values: dict[str, Any],
    outcome: Outcome,
    class_names: tuple[str, ...] | None,
    plots: dict[str, bytes],
    started: float,
) -> None:
    """Writes it from `values`, which is result.json, the outcome, the plots, and the config.yaml that is there.

    Args:
        folder: the run folder.
        values: result.json.
        outcome: of the run.
        class_names: what each label means, if the data says so.
        plots: the PNG files, by their names.
        started: when, in seconds since the epoch.
    """
    pictures = encoded(plots)
    seconds = values["seconds"]
    phases = {phase: seconds[phase] for phase in ("startup", "fit", "test") if seconds[phase]}
    own = {name: value for metrics in outcome.test_metrics for name, value in metrics.items()}
    write_page(
        folder,
        "run/report.html.jinja",
        values,
        started,
        results=results(values | {name: value for name, value in own.items() if name not in values}),
        phases=phases,
        total=max(seconds["total"], sum(phases.values())),
        failures=failures(folder, started, seconds["total"]),
        mistakes=pictures.pop("mistakes", None),
        weights=pictures.pop("weights", None),
        graphs=pictures,
        classes=classes(outcome.confusion, names_of(class_names, outcome.classes)),
        history=outcome.history,
        columns=[name for name in columns(outcome.history) if any(name in row for row in outcome.history)],
        config=folder.read("config.yaml").decode() if folder.has("config.yaml") else "",
    )


def write_page(folder: RunFolder, template: str, values: dict[str, Any], started: float, **more: Any) -> None:
    """Writes report.html from a template of this package; what is missing is an error, and all text is escaped.

    Args:
        folder: of the run or the sweep.
        template: its path in the package.
        values: result.json.
        started: when, in seconds since the epoch.
        **more: what the template shows beside.
    """
    loader = PackageLoader("ray_mnist", ".")
    page = Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template(template)
    begun = time.strftime("%Y-%m-%d %H:%M", time.localtime(started))
    common = {"name": folder.name, "versions": values["versions"], "values": values, "begun": begun}
    folder.write("report.html", page.render(common | more))


def encoded(plots: dict[str, bytes]) -> dict[str, str]:
    """PNG files as a page has them in itself."""
    return {name: base64.b64encode(png).decode() for name, png in plots.items()}


def results(values: dict[str, Any]) -> dict[str, str]:
    """The numbers of a run that there are, and what its test found beside them, as people read them."""
    own = [name for name, value in values.items() if name.startswith("test") and isinstance(value, float)]
    names = [name for name in dict.fromkeys([*SHOWN, *own]) if values.get(name) is not None]
    return {name.replace("_", " "): SHOWN.get(name, "{:.4f}").format(values[name]) for name in names}


def failures(folder: RunFolder, started: float, total: float) -> list[dict[str, Any]]:
    """Each failure in words, and where on the time line it was, in percent; None if that was before this start."""
    if not folder.has(FAILURES):
        return []
    found = [json.loads(line) for line in folder.read(FAILURES).decode().splitlines()]
    places = [100 * (failure.get("time", 0) - started) / total for failure in found]
    return [
        {"words": one_failure(failure), "at": place if 0 <= place <= 100 else None}
        for failure, place in zip(found, places, strict=True)
    ]


def classes(pairs: Counter[tuple[int, int]], names: tuple[str, ...]) -> list[dict[str, Any]]:
    """What became of the test samples of each class, from how often each label was taken for which class."""
    labelled, named = Counter[int](), Counter[int]()
    for (label, predicted), times in pairs.items():
        labelled[label] += times
        named[predicted] += times
    table = []
    for number in range(len(names) if pairs else 0):
        right = pairs[number, number]
        wrong = [(times, names[other]) for (label, other), times in pairs.items() if label == number != other]
        table.append(
            {
                "name": names[number],
                "samples": labelled[number],
                "recall": share(right, labelled[number]),
                "precision": share(right, named[number]),
                "f1": share(2 * right, labelled[number] + named[number]),
                "taken_for": "{1} ({0})".format(*max(wrong)) if wrong else "",
            }
        )
    return table


def share(part: int, whole: int) -> str:
    """Such as `0.9731`, of a whole that there is."""
    return f"{part / whole:.4f}" if whole else ""
