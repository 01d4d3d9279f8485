"""Takes a model away: `python -m ray_mnist.export RUN_FOLDER OUT --format FORMAT`, with `--help` for its options."""

import copy
import os
import pickle
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from ray_mnist.cli import console
from ray_mnist.cli.parser import make_command
from ray_mnist.cli.saved_run import RUN_FOLDER, SavedRun, build, load, open_run
from ray_mnist.errors import RequestError, TrainingError, one_line

SAMPLES = 64  # of the batch that stands in for a test set
TOLERANCE = 1e-4  # of logits: another runtime adds up in another order


def export() -> None:
    """Parses the command line, writes the file, and checks what is in it against the model.

    Raises:
        RequestError: there is no such run, or the model cannot be written in this format.
        TrainingError: what was written is not the model; nothing is left of it.
    """
    parser = make_command("export", "Write the best model of a run as a file that is used without this package.")
    parser.add_argument("run_folder", help=RUN_FOLDER)
    parser.add_argument("out", help="the file to write")
    kinds = Literal["onnx", "torch-export", "safetensors", "checkpoint"]
    what = "safetensors has the weights alone; checkpoint is the run's own, in one file where it is in shards"
    parser.add_argument("--format", type=kinds, required=True, help=what)
    options, run = open_run(parser)
    out = Path(options.out).expanduser()
    if not out.parent.is_dir():
        raise RequestError(f"{out} cannot be written: there is no folder {out.parent}.")
    aside = out.with_name(f".{uuid.uuid4().hex}{out.suffix}")
    if options.format == "checkpoint":
        copy_checkpoint(run, aside, out)
        return
    write = {"onnx": write_onnx, "torch-export": write_program, "safetensors": write_weights}[options.format]
    model, data = build(parser, run)
    load(run, model)
    batches, what = batches_of(model, data)
    first = next(batches)
    try:
        with console.quiet(), warnings.catch_warnings(action="ignore"):
            written = write(model, first[[0, 0]], aside)
        count, difference = compare(model, written, chain([first], batches))
        os.replace(aside, out)
    except OSError as error:
        raise RequestError(f"{out} cannot be written: {one_line(error)}") from error
    finally:
        aside.unlink(missing_ok=True)
    console.say(f"{out} gives what {run.folder}/{run.checkpoint} gives, to {difference:.1g}, on {count:,} {what}")


def copy_checkpoint(run: SavedRun, aside: Path, out: Path) -> None:
    """Writes the run's checkpoint as Lightning has it: one file.

    Raises:
        RequestError: it cannot be written, or could run code.
    """
    from ray_mnist.run.shards import whole_file
    from ray_mnist.run.trust import refused

    location = run.folder.location(run.checkpoint)
    try:
        with whole_file(location) as path:
            assert path
            shutil.copyfile(path, aside)
        os.replace(aside, out)
    except pickle.UnpicklingError as error:
        raise refused(location) from error
    except OSError as error:
        raise RequestError(f"{out} cannot be written: {one_line(error)}") from error
    finally:
        aside.unlink(missing_ok=True)
    console.say(f"{out} is {run.folder}/{run.checkpoint}")


def batches_of(model: Any, data: Any) -> tuple[Iterator[Any], str]:
    """Images (N, C, H, W), a batch at a time, and what they are: the test set if it is to be had here."""
    import torch

    from ray_mnist.classifier import input_shape

    images = test_images(data) if data is not None else iter(())
    try:
        return chain([next(images)], images), "test images"
    except (StopIteration, RequestError):
        return iter([torch.rand(SAMPLES, *input_shape(model, data))]), "random images, for want of a test set"


def test_images(data: Any) -> Iterator[Any]:
    """The inputs of the test batches, as the model is given them."""
    from pytorch_lightning.utilities.model_helpers import is_overridden

    if not is_overridden("test_dataloader", data):
        return
    data.prepare_data()
    data.setup("test")
    loaders = data.test_dataloader()
    for batch in chain.from_iterable(loaders if isinstance(loaders, list | tuple) else [loaders]):
        moved = data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0)
        yield moved[0] if isinstance(moved, list | tuple) else moved


def compare(model: Any, written: Callable[[Any], Any], batches: Iterator[Any]) -> tuple[int, float]:
    """How many samples there are, and by how much the results differ at most.

    Raises:
        TrainingError: by too much.
    """
    import torch

    count, difference = 0, 0.0
    with torch.no_grad():
        for images in batches:
            count += len(images)
            difference = max(difference, float((model(images) - written(images)).abs().max()))
    if not difference <= TOLERANCE:
        raise TrainingError(f"what was written gives other results than the model, by up to {difference:g}.")
    return count, difference


def write_program(model: Any, example: Any, path: Path) -> Callable[[Any], Any]:
    """A program of torch's, for `torch.export.load(path).module()`; returns what was written, to be called."""
    import torch

    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with path.open("wb") as file:  # of a path it wants a suffix of its own
        torch.export.save(program, file)
    with path.open("rb") as file:
        loaded: Callable[[Any], Any] = torch.export.load(file).module()
    return loaded


def write_onnx(model: Any, example: Any, path: Path) -> Callable[[Any], Any]:
    """An ONNX graph from `images` to `output`; returns what was written, to be called."""
    import torch

    needed("onnxscript", "onnx")
    onnxruntime = needed("onnxruntime", "onnx")
    torch.onnx.export(
        model,
        (example,),
        path,
        dynamo=True,
        verbose=False,
        external_data=False,
        input_names=["images"],
        output_names=["output"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["output"], {"images": images.numpy()})[0])


def write_weights(model: Any, example: Any, path: Path) -> Callable[[Any], Any]:
    """The weights by their names; returns a model that has no others."""
    import torch

    safetensors = needed("safetensors.torch", "safetensors")
    safetensors.save_model(model, str(path))
    twin = copy.deepcopy(model)
    for weight in twin.state_dict().values():
        weight.copy_(torch.zeros_like(weight))
    safetensors.load_model(twin, str(path))
    return twin


def needed(module: str, kind: str) -> Any:
    """A module of a package that `--format kind` needs.

    Raises:
        RequestError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise RequestError(
            f"--format {kind} needs the package {module.partition('.')[0]}: pip install 'ray-mnist[export]'."
        ) from error


if __name__ == "__main__":
    console.run(export)
