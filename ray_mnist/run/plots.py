"""The pictures of a run: curves, confusion matrix, worst mistakes, the first layer's weights."""

import io
from collections import Counter
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torchmetrics.utilities.plot import plot_confusion_matrix

from ray_mnist.run.folder import RunFolder
from ray_mnist.run.outcome import Outcome, Row

READABLE_CLASSES = 20  # a confusion matrix of more is drawn without numbers and names
CELL_INCHES = 0.7  # of one with them
MOST_WEIGHTS = 64  # of the first layer are shown
MOST_CLASSES = 1000  # one of more than these is not drawn: a cell would be less than a pixel


def draw(folder: RunFolder, outcome: Outcome, class_names: tuple[str, ...] | None) -> dict[str, bytes]:
    """Writes `plots/*.png`, those for which the run has something to show; returns what is in each, by its name."""
    drawn: dict[str, bytes] = {}
    for metric in ("loss", "accuracy"):
        if any(f"{part}_{metric}" in row for row in outcome.history for part in ("train", "val")):
            drawn[metric] = save(folder, metric, curves(outcome.history, metric))
    if outcome.confusion:
        names = names_of(class_names, outcome.classes)
        if outcome.classes <= MOST_CLASSES:
            drawn["confusion"] = save(folder, "confusion", confusion(outcome.confusion, names))
        pictures = [
            found for found in outcome.mistakes if found["image"].ndim == 3 and len(found["image"]) in (1, 3, 4)
        ]
        if pictures or not outcome.mistakes:
            drawn["mistakes"] = save(folder, "mistakes", mistakes(pictures, names))
    if outcome.first_layer is not None and outcome.first_layer.shape[1] in (1, 3):
        drawn["weights"] = save(folder, "weights", weights(outcome.first_layer))
    return drawn


def names_of(class_names: tuple[str, ...] | None, count: int) -> tuple[str, ...]:
    """A name for each of `count` classes: a model may tell more classes apart than the data set names."""
    return class_names if class_names and len(class_names) == count else tuple(map(str, range(count)))


def save(folder: RunFolder, name: str, figure: Figure) -> bytes:
    """Writes `plots/<name>.png`; returns what is in it."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120, bbox_inches="tight")
    folder.write(f"plots/{name}.png", png.getvalue())
    return png.getvalue()


def curves(history: list[Row], metric: str) -> Figure:
    """`train_<metric>` and `val_<metric>`, whichever there are, over the epochs."""
    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    for part in ("train", "val"):
        name = f"{part}_{metric}"
        if points := [(row["epoch"], row[name]) for row in history if name in row]:
            axes.plot(
                *zip(*points, strict=True),
                marker="o",
                markersize=3,
                label={"train": "training"}.get(part, "validation"),
            )
    axes.set(xlabel="epoch", ylabel=metric)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def confusion(pairs: Counter[tuple[int, int]], names: tuple[str, ...]) -> Figure:
    """How often each label (row) was taken for which (column)."""
    counts = np.zeros((len(names), len(names)), dtype=int)
    for pair, times in pairs.items():
        counts[pair] = times
    readable = len(names) <= READABLE_CLASSES
    side = max(4.0, CELL_INCHES * len(names)) if readable else 7.0
    figure = Figure(figsize=(side, side))
    axes = figure.subplots()
    plot_confusion_matrix(torch.from_numpy(counts), axes, add_text=readable, labels=list(names), cmap="Blues")
    if not readable:
        axes.set(xticks=[], yticks=[])
        figure.colorbar(axes.images[0])
    return figure


def mistakes(found: list[dict[str, Any]], names: tuple[str, ...], columns: int = 5) -> Figure:
    """The images that the model was surest of and wrong about."""
    rows = max(1, -(-len(found) // columns))
    figure = Figure(figsize=(1.6 * columns, 1.9 * rows))
    cells = list(figure.subplots(rows, columns, squeeze=False).flat)  # `flat` alone could be gone through only once
    for cell in cells:
        cell.axis("off")
    for cell, mistake in zip(cells, found, strict=False):
        image = mistake["image"].transpose(1, 2, 0)
        cell.imshow(image.squeeze(), cmap="gray")
        cell.set_title(
            f"{names[mistake['label']]} as {names[mistake['predicted']]}, {mistake['chance']:.0%}", fontsize=8
        )
    if not found:
        figure.suptitle("no mistakes")
    return figure


def weights(layer: np.ndarray, columns: int = 16) -> Figure:
    """The weights (N, 1 or 3, height, width) of a layer's first units, each as a picture: what it looks for."""
    shown = layer[:MOST_WEIGHTS].transpose(0, 2, 3, 1)
    scaled = shown / np.maximum(np.abs(shown).max(axis=(1, 2, 3), keepdims=True), np.finfo(shown.dtype).tiny)
    grey = scaled.shape[3] == 1
    rows = -(-len(scaled) // columns)
    # One picture of all: axes for each would take ten times as long.
    framed = np.pad(
        scaled,
        ((0, rows * columns - len(scaled)), (1, 1), (1, 1), (0, 0)),
        constant_values=np.nan if grey else 1,
    )
    _, height, width, channels = framed.shape
    tiles = framed.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    mosaic = tiles.reshape(rows * height, columns * width, channels)
    figure = Figure(figsize=(9, 0.6 * rows))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.imshow(mosaic[:, :, 0] if grey else 0.5 + mosaic / 2, cmap="RdBu_r", vmin=-1, vmax=1)
    return figure
