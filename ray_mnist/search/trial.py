"""One trial of a sweep: the run of `worker.fit` on one set of parameters, as Ray Tune starts, follows and stops it."""

import math
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytorch_lightning as pl
import torch
from ray import tune

from ray_mnist.config import RunConfig
from ray_mnist.errors import Stopped, TrainingError, one_line
from ray_mnist.launch.channel import Outbox, Send
from ray_mnist.launch.connection import go_to
from ray_mnist.launch.local import LocalContext
from ray_mnist.launch.metrics import RunMetrics
from ray_mnist.run import trackers
from ray_mnist.run.events import EpochEnded, Event, Progress
from ray_mnist.run.folder import RunFolder
from ray_mnist.run.outcome import Evaluation, Row
from ray_mnist.run.records import read_metrics
from ray_mnist.search import space
from ray_mnist.worker import Job, can_test, run

TRIAL_CPU = 0.01  # a trial cannot ask for nothing
STOP_S = 60  # for a training to end at its next batch
Build = Callable[[dict[str, Any]], tuple[pl.LightningModule, pl.LightningDataModule]]


def bundles(num_workers: int, worker: dict[str, float]) -> list[dict[str, float]]:
    """What a trial reserves: the trial itself, then each of its workers; a lone worker is the trial itself."""
    return [worker] if num_workers <= 1 else [{"CPU": TRIAL_CPU}] + [worker] * num_workers


@dataclass
class Plan:
    """What all trials of a sweep have in common.

    `build` makes model and data module from a trial's parameters; `metric` chooses the best; `storage_path` is where
    each trial has a run folder, named by its id; `send` takes how far the trials are inside their epochs.
    """

    build: Build
    config: RunConfig
    lightning: dict[str, Any]
    metric: str
    mode: str
    storage_path: str
    folder: tuple[str, str, int, int]
    send: Send = lambda events: None

    def job(self, parameters: dict[str, Any], name: str) -> Job:
        """The training of one trial; the test set is for the winner alone."""
        pl.seed_everything(self.config.seed, workers=True, verbose=False)
        model, datamodule = self.build(parameters)
        loggers = {"logger": trackers.copies(self.lightning["logger"])}
        return Job(
            task="fit",
            model=model,
            data={"datamodule": datamodule},
            storage_path=self.storage_path,
            name=name,
            seed=self.config.seed,
            checkpoint_every_n_steps=self.config.checkpoint_every_n_steps,
            checkpoint_every_s=self.config.checkpoint_every_s,
            allow_nan=self.config.allow_nan,
            profile=self.config.profile,
            compile=self.config.compile,
            monitor=(self.metric, self.mode),
            with_test=False,
            lightning=self.lightning | space.of_trainer(parameters) | loggers,
        )


class Interrupted(tune.Callback):
    """Ends Tune's loop, and with it the trials, which a resumed sweep goes on with.

    It is told by the class: Ray Tune makes the callbacks of a resumed sweep itself.
    """

    told = threading.Event()

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Looks whether it was told."""
        if self.told.is_set():
            raise Stopped


class StopWhenTold(pl.Callback):
    """Ends a training at its next batch."""

    def __init__(self) -> None:
        self.told = threading.Event()

    def on_train_batch_start(self, *_: Any) -> None:
        """Looks whether it was told."""
        if self.told.is_set():
            raise Stopped

    def on_validation_batch_start(self, *_: Any) -> None:
        """Looks whether it was told."""
        self.on_train_batch_start()


class Trial(tune.Trainable):
    """Trains in a thread and tells Tune of each epoch as the training tells of it.

    A lone worker is this process, which goes on to the next trial when this one ends. Several are those of a
    TorchTrainer inside the trial's placement group.
    """

    def setup(self, config: dict[str, Any], plan: Plan) -> None:  # type: ignore[override]
        """Starts the training, or goes on from the newest checkpoint of the trial's run folder."""
        self.plan, self.outbox = plan, Outbox(plan.send)
        torch.set_num_threads(plan.config.cpus_per_worker or 1)
        go_to(plan.folder)
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Ends this training and starts the next in the same process."""
        if self.plan.config.max_workers > 1 or not self._end():
            return False
        self._begin(new_config)
        return True

    def _begin(self, parameters: dict[str, Any]) -> None:
        known = read_metrics(RunFolder(self.plan.storage_path, self.trial_id))
        self.row = next((row for row in reversed(known) if self.plan.metric in row), None)  # the newest
        self.news: queue.SimpleQueue[Event | None] = queue.SimpleQueue()  # None: the training has ended
        self.error: BaseException | None = None
        self.stop_when_told = StopWhenTold()
        self.thread = threading.Thread(target=self._train, args=(parameters,), daemon=True)
        self.thread.start()

    def _train(self, parameters: dict[str, Any]) -> None:
        try:
            job = self.plan.job(parameters, self.trial_id)
            with trackers.begun(job.folder, job.callbacks_and_loggers, elsewhere=self.plan.config.max_workers > 1):
                self._run(job)
        except Stopped:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.news.put(None)

    def _run(self, job: Job) -> None:
        config = self.plan.config
        if config.max_workers > 1:
            from ray_mnist.launch import ray
            from ray_mnist.ray_train_internals import TrialTorchTrainer

            ray.launch(job, config, self._tell, TrialTorchTrainer)
        else:
            metrics = RunMetrics(job.name)

            def tell(event: Event) -> None:
                metrics.take(event)
                self._tell(event)

            callbacks = [*job.lightning["callbacks"], self.stop_when_told]
            job = replace(job, lightning=job.lightning | {"callbacks": callbacks})
            try:
                run(job, LocalContext(job, config.use_gpu, tell))
            finally:
                trackers.close(job.callbacks_and_loggers)  # the next trial's is in this process, too

    def _tell(self, event: Event) -> None:
        if isinstance(event, Progress):
            self.outbox.tell(replace(event, trial=self.trial_id))
        else:
            self.news.put(event)

    def step(self) -> Row:
        """Waits for the next epoch that was validated; the training itself goes on meanwhile.

        Raises:
            TrainingError: the training failed, or its metric is not a number any more.
        """
        while (event := self.news.get()) is not None:
            if isinstance(event, EpochEnded) and self.plan.metric in event.row:
                self.row = event.row
                if not math.isfinite(self.row[self.plan.metric]):
                    raise TrainingError(f"diverged: {self.plan.metric} is {self.row[self.plan.metric]}")
                return dict(self.row)
        if isinstance(self.error, TrainingError):
            raise self.error
        if self.error:
            raise TrainingError(f"{type(self.error).__name__}: {one_line(self.error)}")
        if self.row is None:
            raise TrainingError(f"the training never logged {self.plan.metric}")
        return self.row | {"done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Nothing: the run folder has all that the trial needs to go on."""
        return {}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Nothing: see `save_checkpoint`."""

    def cleanup(self) -> None:
        """Ends the training; where it has workers, they end with this process."""
        self._end()
        self.outbox.close()

    def _end(self) -> bool:
        """Whether the training has ended."""
        self.stop_when_told.told.set()
        if self.plan.config.max_workers <= 1:
            self.thread.join(STOP_S)
        return not self.thread.is_alive()


def test_winner(plan: Plan, parameters: dict[str, Any], checkpoint: str) -> list[dict[str, float]]:
    """The test metrics of a trial's checkpoint, one dictionary a loader, on one worker; none if there is no test."""
    go_to(plan.folder)
    torch.set_num_threads(plan.config.cpus_per_worker or 1)
    plan = replace(plan, lightning=plan.lightning | {"logger": False})
    job = replace(plan.job(parameters, ""), task="test", checkpoint=checkpoint, with_test=True)
    if not can_test(job):
        return []
    tested = run(job, LocalContext(job, plan.config.use_gpu, lambda event: None))
    assert isinstance(tested, Evaluation)
    return tested.metrics
