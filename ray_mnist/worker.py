"""What runs inside every worker, wherever it was launched: fit, then test."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.model_helpers import is_overridden

from ray_mnist.callbacks import Mistakes, Randomness, Recorder
from ray_mnist.data import MNISTDataModule
from ray_mnist.results import Outcome, Row, RunFolder, metrics_csv


@dataclass
class Job:
    """What to train, on what, and where the run folder is."""

    model: pl.LightningModule
    datamodule: pl.LightningDataModule
    storage_path: str
    name: str
    seed: int
    checkpoint_every_n_steps: int | None
    lightning: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> RunFolder:
        """The run folder, as seen from the process that asks."""
        return RunFolder(self.storage_path, self.name)


class Place(Protocol):
    """What a worker has to know of where it was launched."""

    def lightning(self) -> dict[str, Any]:
        """The arguments of Lightning's Trainer that belong to the place: accelerator, devices, strategy, plugins."""

    def report(self, metrics: Row, name: str, checkpoint: Path | None) -> None:
        """Takes in a checkpoint (on rank 0; None elsewhere). All ranks call it, together."""

    def agree(self, value: str | None) -> str | None:
        """Rank 0's value, on every rank."""


def run(job: Job, place: Place) -> Outcome:
    """Trains, resuming from the run folder's newest checkpoint if it has one, then tests the best checkpoint."""
    started = time.time()
    pl.seed_everything(job.seed, workers=True, verbose=False)
    folder = job.folder

    def report(metrics: Row, name: str, checkpoint: Path | None) -> None:
        place.report(metrics, name, checkpoint)
        if checkpoint is not None:
            folder.write("metrics.csv", metrics_csv(recorder.history))
            folder.keep_only(name, recorder.best)

    recorder, mistakes = Recorder(report, job.checkpoint_every_n_steps), Mistakes()
    callbacks = [Randomness(job.seed), *job.lightning["callbacks"], recorder, mistakes]
    # MNISTDataModule brings samplers of its own, which pad and repeat nothing; others are given Lightning's.
    sampler = {"use_distributed_sampler": not isinstance(job.datamodule, MNISTDataModule)}
    trainer = pl.Trainer(**(quiet() | sampler | job.lightning | place.lightning() | {"callbacks": callbacks}))

    newest = place.agree(next(iter(folder.checkpoints()), None))
    clock = time.monotonic()
    with folder.local_checkpoint(newest) as path:
        # weights_only would refuse hyperparameters that are objects; the file is the run's own.
        trainer.fit(job.model, datamodule=job.datamodule, ckpt_path=path, weights_only=False)
    training_data: Any = trainer.train_dataloader
    outcome = Outcome(
        device=device_name(trainer),
        history=recorder.history,
        steps=trainer.global_step,
        train_samples=len(training_data.dataset),
        val_samples=recorder.val_samples,
        best_checkpoint=recorder.best,
        started=started,
        fit_seconds=time.monotonic() - clock,
    )

    if not (is_overridden("test_step", job.model) and is_overridden("test_dataloader", job.datamodule)):
        return outcome
    clock = time.monotonic()
    with folder.local_checkpoint(outcome.best_checkpoint) as path:
        tested = trainer.test(job.model, datamodule=job.datamodule, ckpt_path=path, verbose=False, weights_only=False)
    outcome.test_seconds = time.monotonic() - clock
    outcome.test_metrics, outcome.test_samples = dict(tested[0]), mistakes.samples
    outcome.confusion, outcome.mistakes = mistakes.confusion_counts(), mistakes.worst
    return outcome


def quiet() -> dict[str, Any]:
    """Lightning's arguments for a run whose terminal and checkpoints are ours."""
    return {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }


def device_name(trainer: pl.Trainer) -> str:
    """Such as `cpu` or `NVIDIA H100 80GB HBM3`."""
    device = trainer.strategy.root_device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
