"""Tells what pictures show: `python -m ray_mnist.predict RUN_FOLDER PICTURE…`, with `--help` for its options."""

import json
import sys
from typing import Any, Literal

from ray_mnist.cli import console
from ray_mnist.cli.parser import make_command
from ray_mnist.cli.saved_run import RUN_FOLDER, build, input_shape, load, open_run
from ray_mnist.errors import RequestError, one_line

AT_A_TIME = 256  # pictures
MNIST_BOX = 20 / 28  # how much of an image MNIST's digits take up


def predict() -> list[dict[str, Any]]:
    """Parses the command line, and prints and returns what each picture shows, with how sure the model is.

    Raises:
        RequestError: there is no such run or picture, or the model is no classifier of images.
    """
    parser = make_command("predict", "Say what pictures show: photographed or drawn, of any size, dark or bright.")
    parser.add_argument("run_folder", help=RUN_FOLDER)
    parser.add_argument("pictures", nargs="+", help="pictures, or folders of them")
    parser.add_argument(
        "--format", type=Literal["text", "json"], default="text", help="text: a line a picture; or json"
    )
    options, run = open_run(parser)
    from ray_mnist.data import pictures

    model, data = build(parser, run)
    load(run, model)
    shape = input_shape(model, data)
    box = getattr(data, "box", round(MNIST_BOX * max(shape[1:])))
    paths = pictures.find(options.pictures)
    images = [pictures.read(path, shape, box) for path in paths]
    chances = [
        row for start in range(0, len(images), AT_A_TIME) for row in ask(model, images[start : start + AT_A_TIME])
    ]
    names = getattr(data, "class_names", None) or [str(number) for number in range(len(chances[0]))]
    found = [
        {"picture": str(path), "prediction": names[row.index(max(row))], "probability": max(row)}
        | {"probabilities": dict(zip(names, row, strict=False))}
        for path, row in zip(paths, chances, strict=True)
    ]
    if options.format == "json":
        console.say(json.dumps(found, indent=2))
    else:
        for each in found:
            console.say(f"{each['picture']}  {each['prediction']}  {each['probability']:.1%}")
    return found


def ask(model: Any, images: list[Any]) -> list[list[float]]:
    """The probability of each class, a list for each image.

    Raises:
        RequestError: the model does not take these images, or tells no classes apart.
    """
    import torch

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


if __name__ == "__main__":
    sys.exit(console.exit_status(predict))
