"""MLflow and Weights & Biases, where Lightning's loggers write: what a run adds, and how it stays one run there."""

import copy
import io
import json
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import yaml
from lightning_utilities.core.rank_zero import rank_zero_only
from PIL import Image
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import MLFlowLogger, WandbLogger

from ray_mnist import lightning_logger_internals
from ray_mnist.errors import RequestError, one_line
from ray_mnist.run.folder import RunFolder
from ray_mnist.run.shards import whole_file

REMEMBERED = "trackers.json"  # in the run folder: of each logger its class, and its run's id


def trackers(loggers: Iterable[Any] | bool) -> list[Any]:
    """Those of the loggers that write to a tracker; none of what stands for no logger, or for Lightning's own."""
    found = () if isinstance(loggers, bool) else loggers
    return [logger for logger in found if isinstance(logger, MLFlowLogger | WandbLogger)]


def make_sendable(loggers: Iterable[Any] | bool) -> None:
    """Lets this process send and copy the loggers, with the environment's MLFLOW_… and WANDB_…, such as a key."""
    for logger in trackers(loggers):
        lightning_logger_internals.make_sendable(logger)


def copies(loggers: Any) -> Any:
    """The loggers, or what stands for none or Lightning's own, for a run beside others."""
    make_sendable(loggers)
    return copy.deepcopy(loggers)


def refuse_one_run_for_all(loggers: Iterable[Any] | bool) -> None:
    """Raises RequestError where a logger of several runs, the trials of a sweep, has one of its tracker's already."""
    for logger in trackers(loggers):
        if run := lightning_logger_internals.run_of(logger):
            raise RequestError(
                f"{type(logger).__name__} has the run {run}, and trials do not share one: leave it out, and each trial "
                "has a run of its own."
            )


def accept_changes(loggers: Iterable[Any]) -> None:
    """Has the loggers, in the process that trains, take a configuration that is not the run's first, until `close`."""
    for logger in trackers(loggers):
        if isinstance(logger, MLFlowLogger):
            lightning_logger_internals.keep_first_values(logger)


@contextmanager
def begun(folder: RunFolder, loggers: Iterable[Any], elsewhere: bool) -> Iterator[None]:
    """Begins with the trackers' runs, see `begin`, which end as failed where that, or what the `with` does, fails.

    Workers that die cannot say so. W&B finds out for itself.
    """
    try:
        begin(folder, loggers, elsewhere)
        yield
    except BaseException:
        for logger in trackers(loggers):
            if isinstance(logger, MLFlowLogger):
                with suppress(Exception):  # it may be the tracker that failed
                    logger.finalize("failed")
        raise


def begin(folder: RunFolder, loggers: Iterable[Any], elsewhere: bool) -> None:
    """Has each tracker's logger go on with the run that the run folder remembers, or that it was given, or a new one.

    Whoever gets the logger then writes to that run: this process, and workers that run `elsewhere`, one after another.

    Raises:
        RequestError: the tracker has no such run, or cannot be reached.
    """
    known = json.loads(folder.read(REMEMBERED)) if folder.has(REMEMBERED) else []
    remembered: list[tuple[str, str]] = []
    for logger in trackers(loggers):
        kind = type(logger).__name__
        before = next((each for each in known if each[0] == kind), None)
        if before:
            known.remove(before)
        wanted = before[1] if before else None
        try:
            if isinstance(logger, MLFlowLogger):
                remembered.append((kind, lightning_logger_internals.continue_mlflow(logger, wanted)))
                logger.experiment.update_run(logger.run_id, status="RUNNING")  # one that goes on had ended
            else:
                remembered.append((kind, lightning_logger_internals.continue_wandb(logger, wanted)))
        except Exception as error:  # whatever a tracker's library raises
            raise RequestError(f"{kind}: no run can be begun there: {one_line(error)}") from error
    if elsewhere:
        close(loggers)
    if remembered:
        folder.write(REMEMBERED, json.dumps(remembered))


@rank_zero_only
def log_config(folder: RunFolder, loggers: Iterable[Any]) -> None:
    """Gives the trackers the run folder's configuration, which a trial's has not."""
    for logger in trackers(loggers) if folder.has("config.yaml") else ():
        config = folder.read("config.yaml").decode()
        logger.log_hyperparams({"config": yaml.safe_load(config)})
        if isinstance(logger, MLFlowLogger):  # whole, and as it is now
            logger.experiment.log_text(logger.run_id, config, "config.yaml")


def close(loggers: Iterable[Any]) -> None:
    """Has all that was logged arrive, so that another process can go on with the run, or this one end."""
    for logger in trackers(loggers):
        if isinstance(logger, WandbLogger):
            lightning_logger_internals.close_wandb(logger)
        else:
            vars(logger).pop("log_hyperparams", None)  # of `accept_changes`


def hand_over(loggers: Iterable[Any], plots: dict[str, bytes], best: str | None, elsewhere: bool) -> None:
    """Gives the trackers the plots, PNG by their names, and those with `log_model` the checkpoint at `best`.

    A tracker that does not take them does not spoil the run, which has them: that is a warning. Where the run was
    `elsewhere`, it is this process only for a moment that writes to the trackers.
    """
    for logger in trackers(loggers):
        try:
            for name, png in plots.items():
                picture = Image.open(io.BytesIO(png))
                if isinstance(logger, MLFlowLogger):
                    logger.experiment.log_image(logger.run_id, picture, f"plots/{name}.png")
                else:
                    logger.log_image(f"plots/{name}", [picture])
            if best and lightning_logger_internals.takes_checkpoints(logger):
                log_checkpoint(logger, best)
        except Exception as error:  # whatever a tracker's library raises
            warnings.warn(
                f"{type(logger).__name__} did not take all plots and checkpoints: {one_line(error)}", stacklevel=2
            )
    if elsewhere:
        close(loggers)


def log_checkpoint(logger: Any, location: str) -> None:
    """Does what Lightning does for a ModelCheckpoint with this best checkpoint."""
    with whole_file(location) as path:
        callback = ModelCheckpoint()
        callback.best_model_path = str(path)
        logger.after_save_checkpoint(callback)
        logger.finalize("success")
