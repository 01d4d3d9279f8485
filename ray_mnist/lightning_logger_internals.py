"""What is used of Lightning's loggers of MLflow and Weights & Biases beyond their public API.

Each release may move it: tests/test_internals.py names what a new release moved.
"""

import copyreg
import os
import uuid
from collections.abc import Mapping
from typing import Any

from lightning_fabric.utilities.logger import _convert_params, _flatten_dict
from lightning_utilities.core.rank_zero import rank_zero_only
from pytorch_lightning.loggers import MLFlowLogger, WandbLogger


def keep_first_values(logger: MLFlowLogger) -> None:
    """Leaves a parameter as it was first logged: MLflow refuses another value, which a run that goes on may have."""
    log: Any = type(logger).log_hyperparams

    @rank_zero_only
    def log_new(params: Any) -> None:
        known: Mapping[str, str] = logger.experiment.get_run(logger.run_id).data.params
        given = _flatten_dict(_convert_params(params))
        log(logger, {name: value for name, value in given.items() if name not in known})

    logger.log_hyperparams = log_new  # type: ignore[method-assign]


def make_sendable(logger: MLFlowLogger | WandbLogger) -> None:
    """Has a tracker's logger go to other processes, and be copied, as it is, and with what its library is to know.

    WandbLogger's own way begins the run where it is sent from, and then needs a service that is on that machine only.
    """
    copyreg.pickle(type(logger), reduce_tracker)


def reduce_tracker(logger: MLFlowLogger | WandbLogger) -> tuple[Any, ...]:
    """All but this process's part of the run; with the environment variables that say where to and as whom."""
    state = {name: value for name, value in vars(logger).items() if name not in ("_experiment", "log_hyperparams")}
    state |= {"_experiment": None} if isinstance(logger, WandbLogger) else {}
    known = {name: value for name, value in os.environ.items() if name.startswith(("MLFLOW_", "WANDB_"))}
    known.pop("WANDB_SERVICE", None)  # of this process
    return received_tracker, (type(logger), state, known)


def received_tracker(kind: Any, state: dict[str, Any], environment: dict[str, str]) -> Any:
    """The logger; what the process's own environment says holds."""
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    logger = kind.__new__(kind)
    vars(logger).update(state)
    return logger


def run_of(logger: MLFlowLogger | WandbLogger) -> str | None:
    """The id of the run that the logger was given or has begun."""
    return logger._run_id if isinstance(logger, MLFlowLogger) else logger.version


def continue_mlflow(logger: MLFlowLogger, run_id: str | None) -> str:
    """Has the logger write to its own run, or else to the one of this id, or else to a new one; returns its id."""
    logger._run_id = logger._run_id or run_id
    return str(logger.run_id)


def continue_wandb(logger: WandbLogger, run_id: str | None) -> str:
    """Has the logger write to its own run, or else to the one of this id, or else to a new one; returns its id."""
    logger._id = logger._wandb_init["id"] = logger.version or run_id or uuid.uuid4().hex[:8]
    if (run := logger._experiment) is not None:  # which the logger may have been given: it goes on where that is
        logger._wandb_init |= {"project": run.project, "entity": run.entity or None, "mode": run.settings.mode}
    logger._wandb_init["resume"] = logger._wandb_init["resume"] or "allow"  # which --trainer.logger takes away
    return logger._id


def close_wandb(logger: WandbLogger) -> None:
    """Ends what this process does for its run, if it has begun with it: all of it is written then."""
    if logger._experiment is not None:
        logger._experiment.finish()
        logger._experiment = None


def takes_checkpoints(logger: Any) -> bool:
    """Whether a tracker's logger was told to upload checkpoints."""
    return bool(logger._log_model)
