"""The pictures of a sweep: how good each trial was by its parameters, and how each got there."""

from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from ray_mnist.run.folder import RunFolder
from ray_mnist.run.plots import save

if TYPE_CHECKING:
    from ray_mnist.search.results import TrialRow


def draw(folder: RunFolder, rows: "list[TrialRow]", metric: str, mode: str) -> None:
    """Writes `plots/*.png`."""
    shown = "val_accuracy" if any("val_accuracy" in row for trial in rows for row in trial.history) else metric
    save(folder, "curves", curves(rows, shown))
    ranked = [(trial.parameters, trial.best(metric, mode)) for trial in rows if not trial.failed]
    points = [(parameters, best[shown]) for parameters, best in ranked if best and shown in best]
    if any(parameters for parameters, _ in points):
        save(folder, "parameters", by_parameter(points, shown))


def curves(rows: "list[TrialRow]", metric: str) -> Figure:
    """The metric of every trial over its epochs."""
    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    for trial in rows:
        points = [(row["epoch"], row[metric]) for row in trial.history if metric in row]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, alpha=0.7)
    axes.set(xlabel="epoch", ylabel=metric)
    axes.grid(alpha=0.3)
    return figure


def by_parameter(points: list[tuple[dict[str, Any], float]], metric: str) -> Figure:
    """The metric of every trial over each parameter's value, a panel a parameter."""
    names = list(dict.fromkeys(name for parameters, _ in points for name in parameters))
    figure = Figure(figsize=(1 + 4 * len(names), 4), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    scores = [score for _, score in points]
    for name, axes in zip(names, panels, strict=True):
        values = [parameters[name] for parameters, _ in points]
        if all(type(value) in (int, float) for value in values):
            axes.scatter(values, scores)
            if 0 < 20 * min(values) < max(values):
                axes.set_xscale("log")
        else:
            axes.scatter(*zip(*sorted(zip(map(str, values), scores, strict=True)), strict=True))
        axes.set(xlabel=name)
        axes.grid(alpha=0.3)
    panels[0].set(ylabel=metric)
    return figure
