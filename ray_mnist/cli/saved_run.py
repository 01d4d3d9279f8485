"""A run that was trained before, found by its folder: what it says of itself, its model, its data and its weights."""

import json
import os
import pickle
import sys
from functools import cached_property
from typing import TYPE_CHECKING, Any

import yaml

from ray_mnist.cli.early import answer_what_is_not_of_classes
from ray_mnist.cli.parser import BASES, Parser, add_classes, expand, make, name_classes
from ray_mnist.errors import RequestError, one_line
from ray_mnist.run.folder import CHECKPOINT, RunFolder

if TYPE_CHECKING:
    from jsonargparse import Namespace
    from pytorch_lightning import LightningDataModule, LightningModule


RUN_FOLDER = "folder or URI of a run, or of a sweep, whose winner is taken"


def folder_at(location: str) -> RunFolder:
    """The run folder at a path or URI."""
    if "://" in location:
        storage_path, _, name = location.rstrip("/").rpartition("/")
    else:
        storage_path, name = os.path.split(os.path.abspath(os.path.expanduser(location)))
    return RunFolder(storage_path, name)


class SavedRun:
    """What a run folder says of its run, or a sweep folder of its winner: `config`, and `result`, empty before its end.

    Args:
        folder: where it is.

    Raises:
        RequestError: there is no run.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        try:
            config = next((file for file in ("best_config.yaml", "config.yaml") if folder.has(file)), None)
            if config is None:
                raise RequestError(f"{folder} is no run folder: there is no config.yaml in it.")
            self.config: dict[str, Any] = dict(yaml.safe_load(folder.read(config)))
            self.result: dict[str, Any] = json.loads(folder.read("result.json")) if folder.has("result.json") else {}
        except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
            raise RequestError(f"The run folder {folder} cannot be read: {one_line(error)}") from error

    @cached_property
    def checkpoint(self) -> str:
        """The name of the best checkpoint, before the run's end of the newest.

        Raises:
            RequestError: there is none, or it is not as it was written.
        """
        name = self.result.get("best_checkpoint") or next(iter(self.folder.checkpoints()), None)
        if name is None or not self.folder.has(f"{name}/{CHECKPOINT}"):
            raise RequestError(f"There is no checkpoint in {self.folder}: its run has not come so far, or was a trial.")
        if damage := self.folder.damage(name):
            raise RequestError(f"The checkpoint {self.folder.location(name)} {damage}.")
        return str(name)


def open_run(parser: Parser) -> "tuple[Namespace, SavedRun]":
    """What the command line says, but for `--model` and `--data`, and the run that it names as `run_folder`.

    Raises:
        RequestError: an argument cannot be, or there is no such run.
    """
    options = answer_what_is_not_of_classes(parser, expand(sys.argv[1:]))
    return options, SavedRun(folder_at(options.run_folder))


def build(parser: Parser, run: SavedRun) -> "tuple[LightningModule, LightningDataModule | None]":
    """The model, untrained, and the data that the run had, if its `config.yaml` names any.

    `--model`, `--data` and their arguments on the command line come before what the run had.

    Args:
        parser: knows all else of the command line.
        run: what to build.

    Raises:
        RequestError: a class cannot be imported, or does not take its arguments.
    """
    import pytorch_lightning as pl

    arguments = expand(sys.argv[1:])
    given = {argument.partition("=")[0] for argument in arguments}
    parts = [part for part in BASES if part in run.config and f"--{part}" not in given]
    if "model" not in parts and "--model" not in given:
        raise RequestError(f"The config.yaml of {run.folder} names no model: give --model CLASS.")
    for part in parts:
        if (name := run.config[part]["class_path"]).startswith("__main__."):
            here = name.replace("__main__", "SCRIPT")
            raise RequestError(f"{name} was in the script of the run {run.folder}: give --{part} {here}.")
    saved = [f"--{part}={json.dumps(run.config[part])}" for part in parts]
    add_classes(parser)
    config = parser.parse_args(name_classes([*saved, *arguments]))
    pl.seed_everything(run.config.get("seed", 0), workers=True, verbose=False)
    has_data = "data" in parts or "--data" in given
    return make(parser, config, "model"), make(parser, config, "data") if has_data else None


def load(run: SavedRun, model: "LightningModule") -> None:
    """Gives `model` the weights of the run's checkpoint, and makes it ready to be asked.

    Raises:
        RequestError: they do not fit, or the checkpoint is damaged or could run code.
    """
    import torch

    from ray_mnist.run.shards import whole_file
    from ray_mnist.run.trust import refused

    location = run.folder.location(run.checkpoint)
    try:
        with whole_file(location) as path:
            assert path
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            model.on_load_checkpoint(checkpoint)
            if not checkpoint["state_dict"].keys() <= model.state_dict().keys():
                model.configure_model()
            model.load_state_dict(checkpoint["state_dict"], strict=model.strict_loading)
    except pickle.UnpicklingError as error:
        raise refused(location) from error
    except RuntimeError as error:
        raise RequestError(f"The weights in {location} cannot be loaded into the model: {one_line(error)}") from error
    model.eval()
