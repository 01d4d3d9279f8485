"""A trained model that is asked what people's own pictures show."""

from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch

from ray_mnist.data import pictures
from ray_mnist.errors import RequestError, one_line

AT_A_TIME = 256  # pictures
MNIST_BOX = 20 / 28  # how much of an image MNIST's digits take up


class Classifier:
    """Asks a model, of which it takes what it needs to know from the model, its data, or else MNIST.

    Args:
        model: trained; maps float images (N, C, H, W) in [0, 1] to logits or probabilities (N, classes).
        data: the data module that it was trained on, if there is one.
    """

    def __init__(self, model: Any, data: Any) -> None:
        self.model = model
        self.shape = input_shape(model, data)
        self.box = getattr(data, "box", round(MNIST_BOX * max(self.shape[1:])))
        self.names: tuple[str, ...] | None = getattr(data, "class_names", None)

    def look_at(self, found: Sequence[Path | IO[bytes]]) -> list[dict[str, float]]:
        """The probability of each class, by its name, for each of the pictures.

        Raises:
            RequestError: one is no picture, or nothing is to be seen on it; or the model is no classifier of images.
        """
        images = [pictures.read(picture, self.shape, self.box) for picture in found]
        starts = range(0, len(images), AT_A_TIME)
        rows = [row for start in starts for row in ask(self.model, images[start : start + AT_A_TIME])]
        return [dict(zip(self.names or map(str, range(len(row))), row, strict=False)) for row in rows]


def input_shape(model: Any, data: Any) -> tuple[int, int, int]:
    """The (C, H, W) of the images that the model takes: what it, or its data, says, or else MNIST's."""
    channels, height, width = model.hparams.get("input_shape") or getattr(data, "input_shape", (1, 28, 28))
    return channels, height, width


def ask(model: Any, images: list[Any]) -> list[list[float]]:
    """The probability of each class, a list for each image.

    Raises:
        RequestError: the model does not take these images, or tells no classes apart.
    """
    batch = torch.stack(images)
    try:
        with torch.inference_mode():
            output = model(batch)
    except (RuntimeError, TypeError, ValueError) as error:
        raise RequestError(
            f"{type(model).__name__} does not take images of shape {tuple(batch.shape[1:])}: {one_line(error)}"
        ) from error
    if not (isinstance(output, torch.Tensor) and output.ndim == 2 and output.shape[1] > 1):
        raise RequestError(
            f"{type(model).__name__} is no classifier: of an image it does not give a number for each class."
        )
    is_chance = bool((output >= 0).all() and torch.allclose(output.sum(1), torch.ones(len(output)), atol=1e-3))
    chances: list[list[float]] = (output if is_chance else output.softmax(1)).tolist()
    return chances
