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
    names = list(dict.fromkeys(name for parameters, _ in points for name in parameters))
    if names and points:
        save(folder, "parameters", parameters_and(points, names, shown))
    if len(names) > 2:
        save(folder, "parallel", parallel(points, names, shown))


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


def parameters_and(points: list[tuple[dict[str, Any], float]], names: list[str], metric: str) -> Figure:
    """The metric over the first parameter, a colour for each value of the second where it has few."""
    first, second = (names * 2)[:2]
    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    groups = sorted({str(parameters[second]) for parameters, _ in points}, key=lambda text: (len(text), text))
    groups = groups if second != first and len(groups) <= 8 else [""]
    for group in groups:
        chosen = [(parameters[first], y) for parameters, y in points if not group or str(parameters[second]) == group]
        axes.scatter(*zip(*sorted(chosen, key=str), strict=True), label=group and f"{second} {group}")
    numbers = [parameters[first] for parameters, _ in points if isinstance(parameters[first], float)]
    if len(numbers) == len(points) and min(numbers) > 0 and max(numbers) > 20 * min(numbers):
        axes.set_xscale("log")
    axes.set(xlabel=first, ylabel=metric)
    axes.grid(alpha=0.3)
    if groups != [""]:
        axes.legend()
    return figure


def parallel(points: list[tuple[dict[str, Any], float]], names: list[str], metric: str) -> Figure:
    """One line a trial across all parameters, each on an axis of its own, coloured by the metric."""
    figure = Figure(figsize=(1.6 * len(names) + 2, 4))
    axes = figure.subplots()
    places: dict[str, dict[Any, float]] = {}
    for name in names:
        values = sorted({parameters[name] for parameters, _ in points}, key=lambda value: (str(type(value)), value))
        places[name] = {value: rank / max(1, len(values) - 1) for rank, value in enumerate(values)}
    scores = [score for _, score in points]
    low, span = min(scores), (max(scores) - min(scores)) or 1.0
    from matplotlib import colormaps

    for parameters, score in sorted(points, key=lambda point: point[1]):
        heights = [places[name][parameters[name]] for name in names]
        axes.plot(range(len(names)), heights, color=colormaps["viridis"]((score - low) / span), alpha=0.8)
    axes.set_xticks(range(len(names)), names)
    axes.set(ylabel="rank of the value", title=f"brighter: higher {metric}")
    return figure
