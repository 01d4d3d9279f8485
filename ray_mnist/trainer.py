"""Trainer: the one line that users change. It picks where to launch."""

import math
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

from ray_mnist.cli import console
from ray_mnist.cli.lightning_arguments import check_kind, data_of, ends_otherwise, for_lightning, refuse_finders
from ray_mnist.compiling import taken_apart
from ray_mnist.config import OPTIONS, RunConfig, global_seed
from ray_mnist.errors import RequestError, Stopped
from ray_mnist.launch.select import prepare
from ray_mnist.run import lock, report, trackers
from ray_mnist.run.events import EpochEnded
from ray_mnist.run.folder import RunFolder
from ray_mnist.run.outcome import Evaluation, Outcome, TrainerState
from ray_mnist.run.records import read_metrics
from ray_mnist.run.report import Result
from ray_mnist.run.shards import whole_file
from ray_mnist.run.weights import load_weights
from ray_mnist.worker import Job

KEEP_WORKERS_S = 60


class Trainer:
    """Lightning's Trainer with a choice of where to run: here, on a Ray cluster, or on a TPU host.

    After `fit`, `validate`, `test` or `predict` it shows what Lightning's shows: `callback_metrics`, `logged_metrics`,
    `progress_bar_metrics`, `current_epoch`, `global_step`, `callbacks`, `loggers` and `checkpoint_callback`.

    Args:
        config: the whole configuration to write into the run folder's `config.yaml`, for a caller that has it; by
            default it is put together from the arguments and the hyperparameters that model and data module saved.
        keep_workers: seconds for which Ray's workers, and Ray, stay for the next call after one that went well.
        **arguments: the options of `RunConfig`, by name; every other argument is Lightning's own.

    Raises:
        RequestError: the options cannot mean anything.
    """

    def __init__(
        self, *, config: dict[str, Any] | None = None, keep_workers: float = KEEP_WORKERS_S, **arguments: Any
    ) -> None:
        if isinstance(keep_workers, bool | str) or not 0 <= keep_workers < math.inf:
            raise RequestError(f"keep_workers={keep_workers!r} is not possible: give seconds, or 0 to keep none.")
        self.keep_workers = keep_workers
        arguments.setdefault("seed", global_seed())
        if arguments.get("max_epochs", 0) is None or (arguments.get("max_epochs") == -1 and ends_otherwise(arguments)):
            del arguments["max_epochs"]  # Lightning's ways to say: not given, and no limit
        options = {name: arguments[name] for name in OPTIONS if name in arguments}
        self.config = RunConfig(**options)
        if self.config.tpu_cores:  # first of all: Lightning, too, would go and look for a TPU
            from ray_mnist.launch import tpu

            tpu.check(self.config)
        own = set(OPTIONS) - {"max_epochs"}
        theirs = {name: value for name, value in arguments.items() if name not in own}
        self.lightning = for_lightning(theirs, self.config)
        self.full_config = config
        logger = self.lightning["logger"]
        self.loggers: list[Any] = [] if isinstance(logger, bool) else logger
        self.lightning_module: pl.LightningModule | None = None
        self.callback_metrics: dict[str, Tensor] = {}
        self.logged_metrics: dict[str, Tensor] = {}
        self.progress_bar_metrics: dict[str, float] = {}
        self.current_epoch = self.global_step = 0
        self._data: dict[str, Any] = {}
        self._compiled: tuple[Any, Any] = None, None  # a model, and what torch.compile made of it
        self._fits = 0
        self._folder: RunFolder | None = None
        self._newest: str | None = None  # checkpoint
        self._result: Result | None = None

    # What Lightning's Trainer does

    def fit(
        self,
        model: pl.LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: pl.LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Trains `model`, then tests the best checkpoint if model and data come with a test.

        `model` then has the trained weights; `result` and the run folder have the outcome.

        Args:
            model: the module to train, or what torch.compile made of it.
            train_dataloaders: loaders, or a data module in their place.
            val_dataloaders: loaders.
            datamodule: instead of loaders.
            ckpt_path: start from this checkpoint, or from the `best` or `last` of the fit before; before the first,
                `last` is what a ModelCheckpoint among the callbacks saved last, if it has saved any.
            weights_only: False loads whatever `ckpt_path` holds, which may run code of whoever made it; otherwise
                nothing but tensors and plain types is loaded, and a checkpoint that holds more is refused.

        Raises:
            RequestError: the run cannot start, and nothing was written, or cannot go on, and its checkpoints are kept.
            TrainingError: training failed on the cluster, or the loss is not finite any more.
            SystemExit: SIGTERM came; there is a checkpoint, and the exit status is 143.
        """
        started = time.time()
        data = data_of(datamodule, train_dataloaders=train_dataloaders, val_dataloaders=val_dataloaders)
        model = self._taken_apart(model)
        check_kind(model, data)
        job = self._job("fit", model, data, self._name(model, data), ckpt_path, weights_only)
        folder = job.folder
        with console.quiet(), lock.entered(folder, self.config.resume):
            if self.config.resume:
                report.check_model(folder, model)
            outcome, result = self._train(job, started)
        self._fits += 1
        self.lightning_module, self._data, self._folder, self._result = model, data, folder, result
        self.current_epoch, self.global_step = outcome.trainer_state.current_epoch, outcome.trainer_state.global_step
        self._take_over(outcome.trainer_state, model)
        self._newest = next((name for name in folder.checkpoints() if name == outcome.newest_checkpoint), None)
        if self._newest and (self._elsewhere or outcome.test_seconds):  # in place, unless the test loaded others
            load_weights(model, folder.location(self._newest))
        own = any(isinstance(callback, ModelCheckpoint) for callback in self.callbacks)
        trackers.hand_over(self.loggers, result.plots, None if own else self._checkpoint("best"), self._elsewhere)

    def validate(
        self,
        model: pl.LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: pl.LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> list[dict[str, float]]:
        """The exact validation metrics, one dictionary a loader.

        Without `model` and data, those of the last `fit` are taken, and without `model` and `ckpt_path` the best
        checkpoint; the other arguments are `fit`'s.
        """
        data = data_of(datamodule, dataloaders=dataloaders)
        return self._evaluate("validate", model, data, ckpt_path, weights_only, verbose)

    def test(
        self,
        model: pl.LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: pl.LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> list[dict[str, float]]:
        """The exact test metrics, one dictionary a loader; see `validate`. A fit that ended in its test has them."""
        data = data_of(datamodule, dataloaders=dataloaders)
        asked_for_more = model is not None or ckpt_path not in (None, "best") or (data and data != self._data)
        if asked_for_more or not (self._result and self._result.test_metrics):
            return self._evaluate("test", model, data, ckpt_path, weights_only, verbose)
        return self._result.test_metrics

    def predict(
        self,
        model: pl.LightningModule | None = None,
        dataloaders: Any = None,
        datamodule: pl.LightningDataModule | None = None,
        return_predictions: bool | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> list[Any] | None:
        """What `predict_step` returned for each batch, on the CPU and in the order of the data; a list for each loader.

        See `validate` for the arguments.
        """
        data = data_of(datamodule, dataloaders=dataloaders)
        more = {"return_predictions": return_predictions}
        return self._run("predict", model, data, ckpt_path, weights_only, **more).predictions

    # What it shows afterwards

    @property
    def result(self) -> Result:
        """What came of the last `fit`.

        Raises:
            RequestError: there was none.
        """
        if self._result is None:
            raise RequestError("There is no result yet: call fit first.")
        return self._result

    @property
    def callbacks(self) -> list[pl.Callback]:
        """The user's callbacks.

        Raises:
            RequestError: one that is set cannot run here.
        """
        callbacks: list[pl.Callback] = self.lightning["callbacks"]
        return callbacks

    @callbacks.setter
    def callbacks(self, callbacks: list[pl.Callback]) -> None:
        refuse_finders(callbacks)
        self.lightning["callbacks"] = callbacks

    if not TYPE_CHECKING:

        def __getattr__(self, name):
            """Says where to find what Lightning's Trainer has beside this."""
            raise AttributeError(
                f"ray_mnist's Trainer has no {name!r}: what trains is Lightning's Trainer in each worker, which is "
                "self.trainer in the model, and what callbacks are called with."
            )

    @property
    def model(self) -> pl.LightningModule | None:
        """The module that the last call was about."""
        return self.lightning_module

    @property
    def logger(self) -> Any:
        """The first of the loggers."""
        return self.loggers[0] if self.loggers else None

    @property
    def checkpoint_callback(self) -> ModelCheckpoint:
        """The user's ModelCheckpoint; without one, one that names the run folder's best and newest checkpoint."""
        for callback in self.callbacks:
            if isinstance(callback, ModelCheckpoint):
                return callback
        stand_in = ModelCheckpoint(monitor="val_loss")
        if self._folder is not None:
            stand_in.dirpath = str(self._folder)
            stand_in.last_model_path = self._checkpoint("last") or ""
            stand_in.best_model_path = self._checkpoint("best") or ""
        return stand_in

    @property
    def early_stopping_callback(self) -> EarlyStopping | None:
        """The user's EarlyStopping, if there is one."""
        return next((callback for callback in self.callbacks if isinstance(callback, EarlyStopping)), None)

    def save_checkpoint(self, filepath: str | Path) -> None:
        """Copies the newest checkpoint of the last `fit`, as one file."""
        with whole_file(self._checkpoint("last")) as path:
            if path is None:
                raise RequestError("There is no checkpoint yet: call fit first.")
            Path(filepath).parent.mkdir(parents=True, exist_ok=True)
            Path(filepath).write_bytes(Path(path).read_bytes())

    # How it gets there

    def _name(self, model: Any, data: dict[str, Any]) -> str:
        """The run's name; a second fit is a run of its own, unless it goes on with the first."""
        name = self.config.name or report.default_name(model, data)
        taken = self._fits and not self.config.resume and RunFolder(self.config.storage_path, name).exists()
        return f"{name}-{self._fits + 1}" if taken else name

    def _job(
        self, task: str, model: Any, data: Any, name: str, ckpt_path: Any, weights_only: bool | None, **more: Any
    ) -> Job:
        return Job(
            task=task,
            model=model,
            data=data,
            storage_path=RunFolder(self.config.storage_path, name).storage_path,
            name=name,
            seed=self.config.seed,
            checkpoint_every_n_steps=self.config.checkpoint_every_n_steps,
            checkpoint_every_s=self.config.checkpoint_every_s,
            allow_nan=self.config.allow_nan,
            profile=self.config.profile,
            compile=self._compiled[1] if model is self._compiled[0] else self.config.compile,
            checkpoint=self._checkpoint(ckpt_path, task),
            weights_only=weights_only is not False,
            lightning=self.lightning,
            **more,
        )

    def _display(self, **of_run: Any) -> console.Display:
        """What shows the run; how far it is only where nobody said whether Lightning is to do that."""
        return console.Display(**of_run, progress=self.lightning.get("enable_progress_bar") is None)

    def _taken_apart(self, model: Any) -> Any:
        """The model without what torch.compile made of it, which is kept for this call and the next about it."""
        plain, compiled = taken_apart(model, self.lightning.get("strategy"), bool(self.config.tpu_cores))
        if compiled is not None:
            self._compiled = plain, compiled
        return plain

    @property
    def _elsewhere(self) -> bool:
        """Whether the model that trains is a copy, in another process."""
        return bool(self.config.num_workers) or self.config.tpu_cores > 1

    def _checkpoint(self, ckpt_path: str | Path | None, task: str = "") -> str | None:
        """The path or URI of a checkpoint; None where there is none to start from.

        Raises:
            RequestError: it is not there.
        """
        if ckpt_path == "last" and task == "fit" and self._folder is None:
            return "last"  # of the user's ModelCheckpoint, which Lightning looks for
        if ckpt_path in ("best", "last"):
            if self._folder is None or self._result is None:
                raise RequestError(f"ckpt_path={ckpt_path!r}: there was no fit before, give the path of a checkpoint.")
            name = self._result.values["best_checkpoint"] if ckpt_path == "best" else self._newest
            return self._folder.location(name) if name else None
        if ckpt_path is None:
            return None
        if "://" in str(ckpt_path):
            return str(ckpt_path)
        if not Path(ckpt_path).expanduser().exists():
            raise RequestError(f"ckpt_path={str(ckpt_path)!r}: there is no such file.")
        return str(Path(ckpt_path).expanduser().absolute())

    def _train(self, job: Job, started: float) -> tuple[Outcome, Result]:
        """Does a `fit`, in its run folder, and writes down there what came of it."""
        folder, model, data = job.folder, job.model, job.data
        with (
            prepare(job, self.config, self.keep_workers) as (where, launch),
            trackers.begun(folder, self.loggers, self._elsewhere),
        ):
            saved_config = folder.read("config.yaml") if self.config.resume else None
            report.write_config(folder, self.full_config or report.whole_config(self.config, model, data))
            console.say(f"{report.dataset_name(data, model)} · {report.describe_model(model)} · {where}")
            console.say(f"run folder {folder}")
            try:
                with self._display(max_epochs=self.lightning["max_epochs"], known=read_metrics(folder)) as show:
                    outcome: Outcome = launch(show)
                    for row in outcome.history:
                        show(EpochEnded(row))  # where the news of it was lost
            except RequestError:
                if saved_config:
                    folder.write("config.yaml", saved_config)
                elif not folder.checkpoints():
                    folder.remove()
                raise
            except (KeyboardInterrupt, Stopped) as end:
                advice = report.how_to_resume(folder.name, self.config, bool(self.full_config))
                raise console.ended(end, advice) from None
            return outcome, report.write_result(folder, self.config, model, data, outcome, started)

    def _evaluate(
        self, task: str, model: Any, data: dict[str, Any], ckpt_path: Any, weights_only: bool | None, verbose: bool
    ) -> list[dict[str, float]]:
        metrics = self._run(task, model, data, ckpt_path, weights_only).metrics
        for loader in metrics if verbose else ():
            console.say(f"{task}  " + "  ".join(f"{name} {value:.4f}" for name, value in loader.items()))
        return metrics

    def _run(
        self, task: str, model: Any, data: dict[str, Any], ckpt_path: Any, weights_only: Any, **more: Any
    ) -> Evaluation:
        """Does a task that is not `fit`, in a folder that is gone afterwards."""
        ckpt_path = "best" if model is None and ckpt_path is None else ckpt_path
        model, data = self.lightning_module if model is None else model, data or self._data
        if model is None:
            raise RequestError(f"{task} needs a model: give it one, or call fit first.")
        data = data if "datamodule" in data or "dataloaders" in data else {}
        model = self._taken_apart(model)
        check_kind(model, data)
        job = self._job(task, model, data, f".{task}-{uuid.uuid4().hex}", ckpt_path, weights_only, **more)
        try:
            with (
                console.quiet(),
                prepare(job, self.config, self.keep_workers) as (_, launch),
                self._display() as show,
            ):
                evaluation: Evaluation = launch(show)
        finally:
            if job.folder.exists():
                job.folder.remove()
        self.lightning_module = model
        self._take_over(evaluation.trainer_state, model)
        if job.checkpoint and self._elsewhere:
            load_weights(model, job.checkpoint, job.weights_only)  # as Lightning does
        return evaluation

    def _take_over(self, state: TrainerState, model: pl.LightningModule) -> None:
        """Shows what the Trainers inside the workers showed; model and callbacks become what they became there."""
        self.callback_metrics, self.logged_metrics = state.callback_metrics, state.logged_metrics
        self.progress_bar_metrics = state.progress_bar_metrics
        for item, attributes in zip([*self.callbacks, *self.loggers], state.callbacks_and_loggers, strict=False):
            vars(item).update(attributes)
        vars(model).update(state.model)
