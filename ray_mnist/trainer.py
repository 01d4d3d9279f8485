"""Trainer: the one line that users change. It picks where to launch."""

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from lightning_fabric.utilities.exceptions import MisconfigurationException

from ray_mnist import terminal
from ray_mnist.config import OPTIONS, RunConfig, global_seed
from ray_mnist.errors import RequestError
from ray_mnist.results import Outcome, Row, RunFolder, metrics_csv, one_line, read_failures, throughput, to_json
from ray_mnist.worker import Job, quiet

WAIT_FOR_NODES_S = 600


@dataclass
class Result:
    """What came of a run: `values` is result.json, `history` one row of metrics an epoch, `path` the run folder."""

    path: str
    values: dict[str, Any]
    history: list[Row] = field(repr=False)
    test_metrics: dict[str, float] = field(repr=False)


class Trainer:
    """Lightning's Trainer with a choice of where to run: here, on a Ray cluster, or on a TPU host.

    Args:
        config: the whole configuration to write into the run folder's `config.yaml`, for a caller that has it; by
            default it is put together from the arguments and the hyperparameters that model and data module saved.
        **arguments: the options of `RunConfig`, by name; every other argument is Lightning's own.

    Raises:
        RequestError: the options cannot mean anything.
    """

    def __init__(self, *, config: dict[str, Any] | None = None, **arguments: Any) -> None:
        arguments.setdefault("seed", global_seed())
        options = {name: arguments.pop(name) for name in OPTIONS if name in arguments}
        self.config = RunConfig(**options)
        callbacks = arguments.pop("callbacks", None) or []
        self.lightning = {
            "max_epochs": self.config.max_epochs,
            "precision": self.config.precision,
            "callbacks": callbacks if isinstance(callbacks, list) else [callbacks],
            **arguments,
        }
        self.full_config = config
        self._result: Result | None = None
        self._check_lightning_takes(self.lightning)

    @staticmethod
    def _check_lightning_takes(arguments: dict[str, Any]) -> None:
        """Finds out here, rather than in a worker far away, what Lightning would not take."""
        with terminal.quiet():
            try:
                # Lightning adds to the list of callbacks that it is given.
                own: dict[str, Any] = {"accelerator": "cpu", "callbacks": [*arguments["callbacks"]]}
                pl.Trainer(**(quiet() | arguments | own))
            except (TypeError, ValueError, MisconfigurationException) as error:
                raise RequestError(f"Lightning's Trainer refuses its arguments: {one_line(error)}") from error

    def fit(self, model: pl.LightningModule, datamodule: pl.LightningDataModule) -> None:
        """Trains `model`, then tests the best checkpoint; `self.result` and the run folder have the outcome.

        Raises:
            RequestError: the run cannot start; nothing was written.
            TrainingError: training failed on the cluster.
        """
        started = time.time()
        name = self.config.name or default_name(model, datamodule)
        folder = RunFolder(self.config.storage_path, name)
        self._check_name(folder, class_path(model))
        saved_config = folder.read("config.yaml") if self.config.resume else None
        job = Job(
            model=model,
            datamodule=datamodule,
            storage_path=folder.storage_path,
            name=name,
            seed=self.config.seed,
            checkpoint_every_n_steps=self.config.checkpoint_every_n_steps,
            lightning=self.lightning,
        )
        with terminal.quiet(), self._launcher(job) as (where, launch):
            if hasattr(datamodule, "check"):
                datamodule.check(max(1, self.config.num_workers))
            folder.write("config.yaml", yaml.safe_dump(self._whole_config(model, datamodule, name), sort_keys=False))
            terminal.say(f"{dataset_name(datamodule)} · {describe_model(model)} · {where}")
            terminal.say(f"run folder {folder}")
            try:
                with terminal.follow(folder, self.config.max_epochs):
                    outcome = launch()
            except RequestError:
                if saved_config:
                    folder.write("config.yaml", saved_config)
                else:
                    folder.remove()
                raise
            except KeyboardInterrupt:
                raise KeyboardInterrupt(how_to_resume(name, self.config)) from None
            self._result = self._write_result(folder, model, datamodule, outcome, started)

    @property
    def result(self) -> Result:
        """What came of the last `fit`.

        Raises:
            RequestError: there was none.
        """
        if self._result is None:
            raise RequestError("There is no result yet: call fit first.")
        return self._result

    def test(self) -> list[dict[str, float]]:
        """The exact test metrics of the best checkpoint of the last `fit`, as Lightning's `test` returns them."""
        return [self.result.test_metrics]

    def _check_name(self, folder: RunFolder, model_class: str) -> None:
        if self.config.resume and not folder.has("config.yaml"):
            raise RequestError(f"--resume: there is no run in {folder} to go on with.")
        if self.config.resume:
            started_with = yaml.safe_load(folder.read("config.yaml"))["model"]["class_path"]
            if started_with.rpartition(".")[2] != model_class.rpartition(".")[2]:
                raise RequestError(f"--resume: the run in {folder} was started with {started_with}, not {model_class}.")
        if not self.config.resume and folder.exists():
            raise RequestError(f"The run folder {folder} exists: give --resume to go on with it, or another --name.")

    @contextmanager
    def _launcher(self, job: Job) -> Iterator[tuple[str, Any]]:
        """Checks that the run can start where it is to run; gives the words for the place, and the call that runs."""
        config = self.config
        if config.tpu_cores:
            raise RequestError("--tpu-cores: this version cannot train on a TPU yet, leave it out.")
        # Best, newest and the one being written.
        needed_bytes = 3 * 3 * sum(weight.nbytes for weight in job.model.parameters()) + 1_000_000
        from ray_mnist import preflight

        preflight.check_storage(job.folder, needed_bytes)
        if config.num_workers == 0:
            from ray_mnist.launch import local

            local.check(config.use_gpu)
            yield f"this process, on {'GPU' if config.use_gpu else 'CPU'}", lambda: local.launch(job, config.use_gpu)
            return
        from ray_mnist.launch import ray

        with ray.connection(config):
            cluster = preflight.check_resources(config.num_workers, ray.bundle(config), WAIT_FOR_NODES_S, terminal.say)
            preflight.check_shared_storage(job.folder, cluster)
            workers = f"{config.num_workers} worker{'s' if config.num_workers > 1 else ''}"
            yield f"{workers} on {'GPU' if config.use_gpu else 'CPU'}, Ray {cluster}", lambda: ray.launch(job, config)

    def _whole_config(self, model: Any, datamodule: Any, name: str) -> dict[str, Any]:
        """The resolved configuration, in the form that `--config` takes."""
        whole = self.full_config or {
            **vars(self.config),
            "model": {"class_path": class_path(model), "init_args": plain(model.hparams)},
            "data": {"class_path": class_path(datamodule), "init_args": plain(datamodule.hparams)},
        }
        return {**whole, "name": name, "resume": False}

    def _write_result(self, folder: RunFolder, model: Any, datamodule: Any, outcome: Outcome, started: float) -> Result:
        from ray_mnist import plots

        last = outcome.history[-1] if outcome.history else {}
        values = {
            "name": folder.name,
            "dataset": dataset_name(datamodule),
            "model": type(model).__name__,
            "device": outcome.device,
            "num_workers": self.config.num_workers,
            "seed": self.config.seed,
            "epochs": len(outcome.history),
            "steps": outcome.steps,
            "train_samples": outcome.train_samples,
            "val_samples": outcome.val_samples,
            "test_samples": outcome.test_samples,
            **{key: last.get(key) for key in ("train_loss", "val_loss", "val_accuracy")},
            **{key: outcome.test_metrics.get(key) for key in ("test_loss", "test_accuracy")},
            "samples_per_second": throughput(outcome.history),
            "seconds": {
                "startup": outcome.started - started,
                "fit": outcome.fit_seconds,
                "test": outcome.test_seconds,
                "total": time.time() - started,
            },
            "restarts": len(read_failures(folder)),
            "best_checkpoint": outcome.best_checkpoint,
            "versions": versions(),
        }
        folder.write("metrics.csv", metrics_csv(outcome.history))
        folder.write("result.json", to_json(values))
        plots.draw(folder, outcome, getattr(datamodule, "class_names", None))
        return Result(path=str(folder), values=values, history=outcome.history, test_metrics=outcome.test_metrics)


def default_name(model: Any, datamodule: Any) -> str:
    """Data set, model and time."""
    return f"{dataset_name(datamodule)}-{type(model).__name__}-{time.strftime('%Y%m%d-%H%M%S')}"


def dataset_name(datamodule: Any) -> str:
    """The data set's name, or its DataModule's where it has none."""
    return str(getattr(datamodule, "dataset", type(datamodule).__name__))


def describe_model(model: pl.LightningModule) -> str:
    """Such as `SimpleModel (101,770 parameters)`."""
    return f"{type(model).__name__} ({sum(weight.numel() for weight in model.parameters()):,} parameters)"


def class_path(instance: Any) -> str:
    """Where to import its class from."""
    return f"{type(instance).__module__}.{type(instance).__qualname__}"


def plain(hparams: Any) -> dict[str, Any]:
    """Hyperparameters as YAML has them: tuples become lists, and objects their description."""
    simple = {key: list(value) if isinstance(value, tuple) else value for key, value in dict(hparams).items()}
    return {
        key: value if isinstance(value, str | int | float | bool | list | dict | None) else repr(value)
        for key, value in simple.items()
    }


def how_to_resume(name: str, config: RunConfig) -> str:
    """The command that goes on with an interrupted run."""
    where = "" if config.storage_path == RunConfig().storage_path else f" --storage-path {config.storage_path}"
    return f"go on with `python -m ray_mnist.train --resume --name {name}{where}`"


def versions() -> dict[str, str]:
    """What the run was made with."""
    packages = {"ray_mnist": "ray-mnist", "pytorch_lightning": "pytorch-lightning", "ray": "ray"}
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(package) for name, package in packages.items()},
    }
