"""Tells what pictures show: `python -m ray_mnist.predict RUN_FOLDER PICTURE…`, with `--help` for its options."""

import json
from typing import Any, Literal

from ray_mnist.cli import console
from ray_mnist.cli.parser import make_command
from ray_mnist.cli.saved_run import RUN_FOLDER, build, load, open_run


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
    from ray_mnist.classifier import Classifier
    from ray_mnist.data import pictures

    model, data = build(parser, run)
    load(run, model)
    paths = pictures.find(options.pictures)
    found = [
        {
            "picture": str(path),
            "prediction": max(chances, key=chances.__getitem__),
            "probability": max(chances.values()),
        }
        | {"probabilities": chances}
        for path, chances in zip(paths, Classifier(model, data).look_at(paths), strict=True)
    ]
    if options.format == "json":
        console.say(json.dumps(found, indent=2))
    else:
        for each in found:
            console.say(f"{each['picture']}  {each['prediction']}  {each['probability']:.1%}")
    return found


if __name__ == "__main__":
    console.run(predict)
