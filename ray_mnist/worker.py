"""What runs inside every worker, wherever it was launched: fit, then test; or validate, test or predict alone."""

import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities import move_data_to_device
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.profilers import PassThroughProfiler
from pytorch_lightning.utilities.model_helpers import is_overridden

from ray_mnist.callbacks import Randomness, Recorder
from ray_mnist.compiling import compiled
from ray_mnist.distributed.agreement import RankZero
from ray_mnist.distributed.collectives import gather
from ray_mnist.distributed.draws import SameDraws, compare_draws
from ray_mnist.distributed.loaders import resumable_loaders
from ray_mnist.distributed.metrics import EpochSoFar, MetricSync
from ray_mnist.distributed.ray_data import refuse_unbatched
from ray_mnist.distributed.serialization import fingerprints, public_state, sendable
from ray_mnist.distributed.shard_rules import interleave
from ray_mnist.distributed.strategy import LoadsOncePerNode, SavesOwnPart, WeighsLosses, extend, shard_loaders
from ray_mnist.distributed.weighting import LossWeighting
from ray_mnist.divergence import FiniteLoss
from ray_mnist.errors import RequestError
from ray_mnist.lightning_internals import leave_sigterm_alone, spare_each_step
from ray_mnist.mistakes import Mistakes
from ray_mnist.profiling import Profile
from ray_mnist.progress_reporter import ProgressReporter
from ray_mnist.run.events import CheckpointPassedOver, Event
from ray_mnist.run.folder import RunFolder
from ray_mnist.run.outcome import Evaluation, Outcome, TrainerState
from ray_mnist.run.progress import follow
from ray_mnist.run.trackers import accept_changes, close, log_config
from ray_mnist.run.uploads import Uploads


@dataclass
class Job:
    """What to do with which model, on what, and where the run folder is.

    `task` is fit, validate, test or predict; `data` has the arguments that give Lightning's method of that name its
    data; `checkpoint` is the path or URI of the one to start from, and `weights_only=False` loads whatever it
    holds; `monitor` is the metric that chooses the best checkpoint, and its mode, if not the ModelCheckpoint's of the
    user; `allow_nan` has a fit go on with any loss; `profile` has some of its steps traced; `compile` is whether
    the model is to be compiled, or what torch.compile made of it; `with_test` has a fit end in the test;
    `return_predictions` is what Lightning's `predict` makes of it.
    """

    task: str
    model: pl.LightningModule
    data: dict[str, Any]
    storage_path: str
    name: str
    seed: int
    checkpoint_every_n_steps: int | None = None
    checkpoint_every_s: int | None = None
    checkpoint: str | None = None
    weights_only: bool = True
    monitor: tuple[str, str] | None = None
    allow_nan: bool = False
    profile: bool = False
    compile: Any = False
    with_test: bool = True
    return_predictions: bool | None = None
    lightning: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> RunFolder:
        """The run folder, as seen from the process that asks."""
        return RunFolder(self.storage_path, self.name)

    @property
    def callbacks_and_loggers(self) -> list[Any]:
        """The user's callbacks and loggers."""
        logger = self.lightning["logger"]
        return [*self.lightning["callbacks"], *([] if isinstance(logger, bool) else logger)]


class WorkerContext(Protocol):
    """What a worker has to know of where it was launched."""

    def trainer_arguments(self) -> dict[str, Any]:
        """What Lightning's Trainer has to know of where it was launched: accelerator, devices, strategy, plugins."""

    stop: threading.Event  # set, where rank 0 is, once the run is to checkpoint and end

    def tell(self, event: Event) -> None:
        """Takes news of the run for whoever follows it; it never waits, and never fails."""


def run(job: Job, context: WorkerContext) -> Outcome | Evaluation:
    """Does the job's task."""
    pl.seed_everything(job.seed, workers=True, verbose=False)
    task: Any = {"fit": fit, "validate": evaluate, "test": evaluate, "predict": predict}[job.task]
    with compiled(job.model, job.compile):
        try:
            outcome: Outcome | Evaluation = task(job, context)
        except TypeError as error:
            refuse_unbatched(error)
            raise
    return outcome


def run_and_collect(job: Job, context: WorkerContext) -> Outcome | Evaluation:
    """Does the job in this process, which is not the user's; the outcome has what became of model and helpers.

    Raises:
        RequestError: it cannot be done, as it turned out.
    """
    before = fingerprints(public_state(job.model))
    try:
        outcome = run(job, context)
    except ValueError as error:
        if "Expected more than 1 value per channel" in str(error):
            raise shard_too_small(torch.distributed.get_world_size()) from error
        raise
    finally:
        close(job.callbacks_and_loggers)
    outcome.trainer_state.callbacks_and_loggers = [sendable(vars(item)) for item in job.callbacks_and_loggers]
    state = public_state(job.model)
    now = fingerprints(state)
    outcome.trainer_state.model = {name: value for name, value in state.items() if now[name] != before.get(name)}
    return outcome


def shard_too_small(world_size: int) -> RequestError:
    """What to do where a batch normalisation had one sample only."""
    return RequestError(
        f"Batch normalisation cannot train on one sample, which is what a batch left for one of {world_size} workers: "
        "use drop_last=True if it was the last batch, which is smaller, or a batch_size of at least "
        f"{2 * world_size}."
    )


def fit(job: Job, context: WorkerContext) -> Outcome:
    """Trains, resuming from the run folder's newest sound checkpoint if it has one, then tests the best checkpoint.

    Raises:
        TrainingError: the loss or a weight is not finite any more.
        Stopped: `context.stop` was set, and there is a checkpoint of that.
    """
    started = time.time()
    folder = job.folder
    monitor, mode = job.monitor or monitor_of(job.lightning["callbacks"])
    rank_zero = RankZero(context.stop, job.checkpoint_every_s)
    uploads = Uploads(folder, context.tell)
    recorder = Recorder(uploads, rank_zero, job.checkpoint_every_n_steps, monitor, mode)
    optional = [*([] if job.allow_nan else [FiniteLoss()]), *([Profile(folder)] if job.profile else [])]
    trainer: Any = make_trainer(job, context, EpochSoFar(), *optional, recorder, uploads=uploads)
    leave_sigterm_alone(trainer)
    if trainer.is_global_zero:
        uploads.newest = folder.newest_sound_checkpoint(
            lambda location, why: context.tell(CheckpointPassedOver(location, why))
        )
    uploads.newest = newest = trainer.strategy.broadcast(uploads.newest)
    path = folder.location(newest) if newest else job.checkpoint
    log_config(folder, trainer.loggers)
    clock = time.monotonic()
    with uploads:
        # Others may be able to write to the run folder.
        trainer.fit(job.model, **job.data, ckpt_path=path, weights_only=True if newest else job.weights_only)
    outcome = Outcome(
        trainer_state=trainer_state(trainer),
        device=device_name(trainer),
        history=recorder.history,
        steps=trainer.global_step,
        train_samples=size(trainer.train_dataloader) or recorder.train_samples,
        val_samples=recorder.val_samples,
        best_checkpoint=recorder.best,
        newest_checkpoint=uploads.newest,
        started=started,
        fit_seconds=time.monotonic() - clock,
        num_workers=trainer.world_size,
    )
    if outcome.best_checkpoint and can_test(job):
        clock = time.monotonic()
        mistakes = Mistakes()
        trainer.callbacks.append(mistakes)
        datamodule, best = job.data.get("datamodule"), folder.location(outcome.best_checkpoint)
        tested = trainer.test(job.model, datamodule=datamodule, ckpt_path=best, verbose=False, weights_only=True)
        outcome.test_seconds = time.monotonic() - clock
        outcome.test_metrics = [dict(metrics) for metrics in tested]
        outcome.test_samples = mistakes.samples
        outcome.classes, outcome.confusion, outcome.mistakes = mistakes.classes, mistakes.confusion, mistakes.worst
        outcome.first_layer = mistakes.first_layer
    return outcome


def evaluate(job: Job, context: WorkerContext) -> Evaluation:
    """Validates or tests; the metrics are totals over all workers."""
    trainer = make_trainer(job, context)
    metrics = getattr(trainer, job.task)(
        job.model, **job.data, ckpt_path=job.checkpoint, verbose=False, weights_only=job.weights_only
    )
    return Evaluation(trainer_state=trainer_state(trainer), metrics=[dict(each) for each in metrics])


def predict(job: Job, context: WorkerContext) -> Evaluation:
    """Predicts; rank 0 has all predictions on the CPU, in the order of the data, the other ranks have none."""
    trainer = make_trainer(job, context)
    allowed = job.model.allow_zero_length_dataloader_with_multiple_devices
    # A worker may have no batch where there are fewer batches than workers.
    job.model.allow_zero_length_dataloader_with_multiple_devices = True
    mine = trainer.predict(
        job.model,
        **job.data,
        return_predictions=job.return_predictions,
        ckpt_path=job.checkpoint,
        weights_only=job.weights_only,
    )
    job.model.allow_zero_length_dataloader_with_multiple_devices = allowed
    compare_draws(trainer, trainer.predict_dataloaders)
    evaluation = Evaluation(trainer_state=trainer_state(trainer))
    several = trainer.predict_loop.num_dataloaders > 1
    if mine and (repeated := [loader.repeated for loader in resumable_loaders(trainer.predict_dataloaders)]):
        each = zip(mine if several else [mine], repeated, strict=True)
        kept = [batches[: len(batches) - more] for batches, more in each]
        mine = kept if several else kept[0]
    mine = move_data_to_device(mine, "cpu")  # whoever they are for may have no such device
    found = gather(trainer, mine) if trainer.predict_loop.return_predictions else []
    if found and found[0] is not None:
        ranks = [rank or ([[]] * len(found[0]) if several else []) for rank in found]
        evaluation.predictions = (
            [interleave(each) for each in zip(*ranks, strict=True)] if several else interleave(ranks)
        )
    return evaluation


def make_trainer(
    job: Job, context: WorkerContext, *callbacks: pl.Callback, uploads: Uploads | None = None
) -> pl.Trainer:
    """Lightning's Trainer for this worker, with the user's arguments and what a run on several needs beyond them.

    It tells how far it is, with the newest checkpoint of `uploads`.
    """
    arguments = quiet() | job.lightning
    presharded = not arguments.pop("use_distributed_sampler", True)
    if arguments["logger"] is True:
        own_logger = TensorBoardLogger(job.folder.path, name="", version="tensorboard", default_hp_metric=False)
        arguments["logger"] = own_logger if job.task == "fit" and job.folder.is_local else False
    if job.folder.is_local:
        arguments.setdefault("default_root_dir", job.folder.path)
    arguments["profiler"] = arguments.get("profiler") or Unprofiled()
    arguments["callbacks"] = [Randomness(job.seed), *arguments["callbacks"], *callbacks]
    with_context = arguments | context.trainer_arguments() | {"use_distributed_sampler": False}
    trainer: Any = pl.Trainer(**with_context)
    follow(trainer)
    accept_changes(trainer.loggers)
    shard_loaders(trainer, job.seed, presharded)
    extend(trainer.strategy, LoadsOncePerNode)
    extend(trainer.strategy, SavesOwnPart)
    weighting = LossWeighting()
    extend(trainer.strategy, WeighsLosses, weighting=weighting)
    spare_each_step(trainer)
    if trainer.is_global_zero:
        # Before the user's, which may take long.
        trainer.callbacks.insert(0, ProgressReporter(context.tell, weighting, uploads))
    if trainer.world_size > 1:
        metric_sync = MetricSync(weighting)
        # Before those that may read what was logged.
        trainer.callbacks[:0] = [SameDraws(), weighting, metric_sync]
        metric_sync.attach(trainer)
    return trainer


class Unprofiled(PassThroughProfiler):
    """Takes no note of Lightning's hooks, of which a step has dozens, at a fraction of the time of its own way to."""

    nothing = nullcontext()

    def profile(self, action_name: str) -> Any:
        """A context that does nothing."""
        return self.nothing


def quiet() -> dict[str, Any]:
    """Lightning's arguments for a run whose terminal and checkpoints are ours."""
    return {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}


def monitor_of(callbacks: list[pl.Callback]) -> tuple[str, str]:
    """What the best checkpoint is chosen by: what the user's ModelCheckpoint monitors, or else `val_loss`."""
    for callback in callbacks:
        if isinstance(callback, pl.callbacks.ModelCheckpoint) and callback.monitor:
            return callback.monitor, callback.mode
    return "val_loss", "min"


def can_test(job: Job) -> bool:
    """Whether a test is wanted, and model and data come with one."""
    source = job.data.get("datamodule") or job.model
    return job.with_test and is_overridden("test_step", job.model) and is_overridden("test_dataloader", source)


def size(loaders: Any) -> int | None:
    """How many samples the loaders' data sets have; None where they are streams."""
    try:
        return sum(len(loader.dataset) for loader in resumable_loaders(loaders))
    except (TypeError, AttributeError):
        return None


def trainer_state(trainer: pl.Trainer) -> TrainerState:
    """What the trainer shows, on the CPU."""
    return TrainerState(
        callback_metrics=move_data_to_device(dict(trainer.callback_metrics), "cpu"),
        logged_metrics=move_data_to_device(dict(trainer.logged_metrics), "cpu"),
        progress_bar_metrics=dict(trainer.progress_bar_metrics),
        current_epoch=trainer.current_epoch,
        global_step=trainer.global_step,
    )


def device_name(trainer: pl.Trainer) -> str:
    """Such as `cpu` or `NVIDIA H100 80GB HBM3`."""
    device = trainer.strategy.root_device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
