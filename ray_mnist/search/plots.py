"""The pictures of a sweep: how good each trial was by its parameters, and how each got there."""

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from ray_mnist.run.folder import RunFolder
from ray_mnist.run.plots import save

if TYPE_CHECKING:
    from ray_mnist.search.results import TrialRow


def draw(folder: RunFolder, rows: "list[TrialRow]", metric: str, mode: str) -> dict[str, bytes]:
    """Writes `plots/*.png`; returns what is in each, by its name."""
    shown = "val_accuracy" if any("val_accuracy" in row for trial in rows for row in trial.history) else metric
    drawn = {"curves": save(folder, "curves", curves(rows, shown))}
    ranked = [(trial.parameters, trial.best(metric, mode)) for trial in rows if not trial.failed]
    points = [(parameters, best[shown]) for parameters, best in ranked if best and shown in best]
    if any(parameters for parameters, _ in points):
        drawn["parameters"] = save(folder, "parameters", by_parameter(points, shown))
        drawn["parallel"] = save(
            folder, "parallel", parallel(points, shown, "max" if shown == "val_accuracy" else mode)
        )
    return drawn


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
        if are_numbers(values):
            axes.scatter(values, scores)
            if are_far_apart(values):
                axes.set_xscale("log")
        else:
            axes.scatter(*zip(*sorted(zip(map(str, values), scores, strict=True)), strict=True))
        axes.set(xlabel=name)
        axes.grid(alpha=0.3)
    panels[0].set(ylabel=metric)
    return figure


def parallel(points: list[tuple[dict[str, Any], float]], metric: str, mode: str) -> Figure:
    """A line a trial, through its value on an axis for each parameter and for the metric; the better, the darker."""
    points = sorted(
        points, key=lambda point: point[1], reverse=mode == "min"
    )  # the best is drawn last, over the others
    names = [*dict.fromkeys(name for parameters, _ in points for name in parameters), metric]
    scores = [score for _, score in points]
    columns = [[parameters[name] for parameters, _ in points] for name in names[:-1]] + [scores]
    figure = Figure(figsize=(1 + 2 * len(names), 3.5), layout="constrained")
    axes = figure.subplots()
    placed = [on_axis(values) for values in columns]
    shades = colormaps["viridis" if mode == "min" else "viridis_r"]
    for line in zip(*(places for places, _ in placed), strict=True):
        axes.plot(line, color=shades(line[-1]), alpha=0.8)
    axes.lines[-1].set(linewidth=4, alpha=1)
    paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
    for at, (_, ticks) in enumerate(placed):
        axes.axvline(at, color="0.5", linewidth=0.8)
        for place, text in ticks.items():
            axes.annotate(text, (at, place), (6, 0), textcoords="offset points", va="center", bbox=paper)
    axes.set(xticks=range(len(names)), xticklabels=names, yticks=[], xlim=(-0.1, len(names) - 0.6))
    for side in ("top", "bottom", "left", "right"):
        axes.spines[side].set_visible(False)
    return figure


def on_axis(values: list[Any]) -> tuple[list[float], dict[float, str]]:
    """Where on an axis from 0 to 1 each of the values is, and what is written beside it where."""
    if are_numbers(values):
        scaled = np.log(values) if are_far_apart(values) else np.array(values, dtype=float)
        places = (scaled - scaled.min()) / (np.ptp(scaled) or 1)
        return places.tolist(), {0.0: f"{min(values):.4g}", float(places.max()): f"{max(values):.4g}"}
    words = sorted(set(map(str, values)))
    at = {word: place / max(1, len(words) - 1) for place, word in enumerate(words)}
    return [at[str(value)] for value in values], {place: word for word, place in at.items()}


def are_numbers(values: list[Any]) -> bool:
    """Whether they lie on a scale."""
    return all(type(value) in (int, float) for value in values)


def are_far_apart(numbers: list[float]) -> bool:
    """Whether they are shown by their logarithms."""
    return 0 < 20 * min(numbers) < max(numbers)
