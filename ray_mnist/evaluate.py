"""Tests a trained model: `python -m ray_mnist.evaluate RUN_FOLDER`, with `--help` for its options."""

from typing import Any

from ray_mnist.cli import console
from ray_mnist.cli.parser import add_options, make_command
from ray_mnist.cli.saved_run import RUN_FOLDER, build, load, open_run
from ray_mnist.errors import RequestError

PLACES = ("num_workers", "use_gpu", "cpus_per_worker", "tpu_cores", "address")


def evaluate() -> list[dict[str, float]]:
    """Parses the command line, tests the best checkpoint, prints the metrics, a line a loader, and returns them.

    Raises:
        RequestError: there is no such run, or it cannot be tested on this data.
    """
    parser = make_command("evaluate", "Test the best checkpoint of a run, on its own data or other.", short=True)
    parser.add_argument("run_folder", help=RUN_FOLDER)
    add_options(parser, PLACES)
    options, run = open_run(parser)
    from ray_mnist.run.report import dataset_name
    from ray_mnist.trainer import Trainer

    model, data = build(parser, run)
    if data is None:
        raise RequestError(f"The config.yaml of {run.folder} does not say what it was trained on: give --data CLASS.")
    check_fit(model, data)
    load(run, model)  # whether it fits is found out here, and not by the workers
    trainer = Trainer(
        **{name: options[name] for name in PLACES},
        storage_path=run.folder.storage_path,
        precision=run.config["precision"],
        seed=run.config["seed"],
        logger=False,
    )
    metrics = trainer.test(model, datamodule=data, ckpt_path=run.folder.location(run.checkpoint), verbose=False)
    for loader in metrics:
        found = "  ".join(f"{name} {value:.4f}" for name, value in loader.items())
        console.say(f"{found} on {dataset_name({'datamodule': data}, model)}; {run.folder}/{run.checkpoint}")
    return metrics


def check_fit(model: Any, data: Any) -> None:
    """Raises RequestError unless model and data come with a test, and the model takes the data."""
    from pytorch_lightning.utilities.model_helpers import is_overridden

    for method, owner in (("test_step", model), ("test_dataloader", data)):
        if not is_overridden(method, owner):
            raise RequestError(f"{type(owner).__name__} cannot be tested: it has no {method}.")
    takes, has = model.hparams.get("input_shape"), getattr(data, "input_shape", None)
    if takes and has and tuple(takes) != tuple(has):
        raise RequestError(f"The model takes images of shape {tuple(takes)}, and those of the data are {tuple(has)}.")
    known, classes = model.hparams.get("num_classes"), getattr(data, "num_classes", 0)
    if known and known < classes:
        raise RequestError(f"The model tells {known} classes apart, and the data has {classes}.")


if __name__ == "__main__":
    console.run(evaluate)
