"""What a run says of itself: its name, config.yaml and result.json."""

import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from torch.nn.parameter import is_lazy

from ray_mnist.config import RunConfig
from ray_mnist.errors import RequestError
from ray_mnist.lightning_package import package_in_use
from ray_mnist.run.folder import RunFolder
from ray_mnist.run.outcome import Outcome, Row
from ray_mnist.run.records import metrics_csv, read_failures, throughput, to_json


@dataclass
class Result:
    """What came of a run: `values` is result.json, `history` one row of metrics an epoch, `path` the run folder."""

    path: str
    values: dict[str, Any]
    history: list[Row] = field(repr=False)
    test_metrics: list[dict[str, float]] = field(repr=False)  # one dictionary a loader
    plots: dict[str, bytes] = field(repr=False)  # PNG, by their names


def whole_config(config: RunConfig, model: Any, data: dict[str, Any]) -> dict[str, Any]:
    """The resolved configuration, in the form that `--config` takes, of a run that was started from Python."""
    whole: dict[str, Any] = vars(config) | {"model": class_and_arguments(model)}
    if "datamodule" in data:
        whole["data"] = class_and_arguments(data["datamodule"])
    return whole


def write_config(folder: RunFolder, whole: dict[str, Any]) -> None:
    """Writes config.yaml, which `--config` takes for the same once more."""
    folder.write("config.yaml", yaml.safe_dump({**whole, "name": folder.name, "resume": False}, sort_keys=False))


def check_model(folder: RunFolder, model: Any) -> None:
    """Raises RequestError where the run in the folder is one of another class of models, wherever that is now."""
    started_with = yaml.safe_load(folder.read("config.yaml"))["model"]["class_path"]
    if started_with.rpartition(".")[2] != class_path(model).rpartition(".")[2]:
        raise RequestError(f"--resume: the run in {folder} was started with {started_with}, not {class_path(model)}.")


def class_and_arguments(instance: Any) -> dict[str, Any]:
    """As LightningCLI writes them."""
    return {"class_path": class_path(instance), "init_args": plain(instance.hparams)}


def write_result(
    folder: RunFolder, config: RunConfig, model: Any, data: dict[str, Any], outcome: Outcome, started: float
) -> Result:
    """Writes metrics.csv, result.json, the plots and report.html."""
    from ray_mnist.run import page, plots  # slow to import, and workers have no use for them

    last = outcome.history[-1] if outcome.history else {}
    tested = {name: value for metrics in outcome.test_metrics for name, value in metrics.items()}
    values = {
        "name": folder.name,
        "dataset": dataset_name(data, model),
        "model": type(model).__name__,
        "device": outcome.device,
        "num_workers": config.tpu_cores or (config.num_workers and outcome.num_workers),
        "seed": config.seed,
        "epochs": len(outcome.history),
        "steps": outcome.steps,
        "train_samples": outcome.train_samples,
        "val_samples": outcome.val_samples,
        "test_samples": outcome.test_samples,
        **{key: last.get(key) for key in ("train_loss", "val_loss", "val_accuracy")},
        **{key: tested.get(key) for key in ("test_loss", "test_accuracy")},
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
    class_names = getattr(data.get("datamodule"), "class_names", None)
    drawn = plots.draw(folder, outcome, class_names)
    page.write(folder, values, outcome, class_names, drawn, started)
    return Result(str(folder), values, outcome.history, outcome.test_metrics, drawn)


def default_name(model: Any, data: dict[str, Any]) -> str:
    """Data set, model and time."""
    return f"{dataset_name(data, model)}-{type(model).__name__}-{time.strftime('%Y%m%d-%H%M%S')}"


def dataset_name(data: dict[str, Any], model: Any) -> str:
    """The data set's name; or its class's, its DataModule's, or the model's that brings its own."""
    if "datamodule" in data:
        name = getattr(data["datamodule"], "dataset", None)
        return name if isinstance(name, str) else type(data["datamodule"]).__name__
    loaders = next(iter(data.values()), model)
    return type(getattr(loaders, "dataset", loaders)).__name__


def describe_model(model: pl.LightningModule) -> str:
    """Such as `SimpleModel (101,770 parameters)`."""
    count = sum(weight.numel() for weight in model.parameters() if not is_lazy(weight))
    return f"{type(model).__name__} ({count:,} parameters)"


def class_path(instance: Any) -> str:
    """Where to import its class from."""
    return f"{type(instance).__module__}.{type(instance).__qualname__}"


def plain(value: Any) -> Any:
    """Hyperparameters as YAML has them: tuples become lists, and objects their description."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def how_to_resume(name: str, config: RunConfig, from_shell: bool) -> str:
    """What goes on with an interrupted run."""
    moved = config.storage_path != RunConfig().storage_path
    if from_shell:
        where = f" --storage-path {config.storage_path}" if moved else ""
        return f"go on with `python -m ray_mnist.train --resume --name {name}{where}`"
    where = f", storage_path={config.storage_path!r}" if moved else ""
    return f"go on with `Trainer(resume=True, name={name!r}{where}, …)`"


def versions() -> dict[str, str]:
    """What the run was made with."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    lightning = package_in_use().partition(".")[0]
    found |= {name: version(name.replace("_", "-")) for name in ("ray_mnist", lightning, "ray")}
    with suppress(PackageNotFoundError):  # only where TPUs are trained on
        found["torch_xla"] = version("torch-xla")
    return found
