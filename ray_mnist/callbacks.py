"""What goes along with a worker's training.

Recorder measures and checkpoints; Randomness seeds each step.
"""

import math
import time
import uuid
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint

from ray_mnist.distributed.agreement import RankZero
from ray_mnist.distributed.collectives import common_to_all, total
from ray_mnist.distributed.loaders import epoch_samples, samples_seen
from ray_mnist.distributed.sharding import seed_cpu
from ray_mnist.errors import Stopped
from ray_mnist.lightning_internals import saves_shards
from ray_mnist.run.folder import CHECKPOINT, Part, checkpoint_name
from ray_mnist.run.outcome import Row
from ray_mnist.run.trust import check_saved, keep_plain_hyperparameters
from ray_mnist.run.uploads import Saved, Uploads


class Recorder(Checkpoint):
    """Keeps one row of metrics an epoch and hands each checkpoint of rank 0, with the rows so far, to `uploads`.

    Being one of Lightning's `Checkpoint` callbacks it runs after everything else of an epoch, so that it sees all
    metrics. Its history and its best checkpoint are part of each checkpoint, so that a resumed run goes on from them.
    """

    def __init__(
        self,
        uploads: Uploads,
        rank_zero: RankZero,
        every_n_steps: int | None = None,
        monitor: str = "val_loss",
        mode: str = "min",
    ) -> None:
        self.uploads, self.rank_zero, self.every_n_steps = uploads, rank_zero, every_n_steps
        self.monitor, self.sign = monitor, 1 if mode == "min" else -1
        self.history: list[Row] = []
        self.best: str | None = None
        self.best_score = float("inf")  # the less the better, whatever the mode
        self.train_samples = self.val_samples = 0  # of the last epoch
        self._last_step = 0
        self._saved: list[int] = []
        self.saving = self._warned = False  # the former for who asks what this worker is doing, too

    def state_dict(self) -> dict[str, Any]:
        """What goes into the checkpoint."""
        return {
            "history": self.history,
            "best": self.best,
            "best_score": self.best_score,
            "train_samples": self.train_samples,
            "val_samples": self.val_samples,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what came out of a checkpoint."""
        self.history, self.best, self.best_score = list(state["history"]), state["best"], state["best_score"]
        self.train_samples, self.val_samples = state["train_samples"], state["val_samples"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Leaves hyperparameters that are objects out of the run's own checkpoints, not out of the user's."""
        left_out = keep_plain_hyperparameters(checkpoint) if self.saving else []
        if left_out and trainer.is_global_zero and not self._warned:
            self._warned = True
            warnings.warn(
                f"The run's checkpoints leave out hyperparameters that are neither tensors nor plain types: give "
                f"load_from_checkpoint {', '.join(left_out)} yourself.",
                stacklevel=1,
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock, also where a run resumes inside an epoch and no epoch starts."""
        self._last_step = trainer.global_step
        self.uploads.told = len(self.history)
        self.rank_zero.begin(trainer)
        self._start_clock(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._start_clock(trainer)

    def _start_clock(self, trainer: Trainer) -> None:
        self._epoch_started = time.monotonic()
        self._validation_seconds = 0.0
        self._trained_before = samples_seen(trainer.train_dataloader)
        self._validated = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Checkpoints inside the epoch when it is time; the epoch's end does so for its last step."""
        self.uploads.check()
        step = trainer.global_step
        if step == self._last_step or trainer.is_last_batch:
            return
        save, stop = self.rank_zero.says(trainer)
        if save or (self.every_n_steps and step % self.every_n_steps == 0):
            self._save(trainer)
        if stop:
            self._stop(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation is not training time."""
        self._evaluation_started = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation is not training time."""
        if trainer.sanity_checking:
            return
        self.val_samples = int(total(trainer, samples_seen(trainer.val_dataloaders)))
        self._validated = True
        self._validation_seconds += time.monotonic() - self._evaluation_started

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds the epoch's row and checkpoints."""
        seconds = time.monotonic() - self._epoch_started
        trained = total(trainer, samples_seen(trainer.train_dataloader) - self._trained_before)
        batches = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        self.train_samples = int(total(trainer, epoch_samples(trainer.train_dataloader, batches)))
        row: Row = {"epoch": trainer.current_epoch + 1, "step": trainer.global_step}
        row |= {
            name: value.item()
            for name, value in trainer.callback_metrics.items()
            # Lightning keeps the metrics of an earlier epoch's validation.
            if value.numel() == 1 and (self._validated or not name.startswith("val"))
        }
        row |= {"samples_per_second": trained / (seconds - self._validation_seconds), "seconds": seconds}
        self.history.append(row)
        score = self.sign * row.get(self.monitor, self.sign * float("inf"))
        score = score if math.isfinite(score) else float("inf")
        # As long as nothing was validated, the newest is the best.
        if score < self.best_score or self.best_score == float("inf"):
            self.best_score, self.best = score, checkpoint_name(trainer.global_step)
        self._save(trainer)
        if self.rank_zero.says(trainer)[1]:
            self._stop(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves once more where something changed the weights after the last epoch, as averaging them does."""
        if self._saved and self._saved != versions(pl_module):
            self._save(trainer)
        self._flush(trainer)

    def _stop(self, trainer: Trainer) -> None:
        self._flush(trainer)
        raise Stopped

    def _flush(self, trainer: Trainer) -> None:
        self.saving = True
        self.uploads.flush()
        # All wait for rank 0: one that ended earlier would have it ended, and one that tests reads what it wrote.
        trainer.strategy.barrier()
        self.saving = False

    def _save(self, trainer: Trainer) -> None:
        self._last_step = trainer.global_step
        self._saved = versions(trainer.lightning_module)
        name = checkpoint_name(trainer.global_step)
        with ExitStack() as held:
            folder = held.enter_context(self.uploads.folder.new_checkpoint(name))
            self.saving = True
            part = self._part(trainer, folder)
            trainer.save_checkpoint(folder / CHECKPOINT)  # all ranks together, and none goes on before it is whole
            if part or trainer.is_global_zero:
                check_saved(folder / CHECKPOINT)
                saved = Saved(name, folder, held.pop_all(), self.best, list(self.history), part)
                self.uploads.add(saved, *([common_to_all] if part else []))
            self.saving = False
        self.rank_zero.saved()

    def _part(self, trainer: Trainer, folder: Path) -> Part | None:
        """This rank's part of a checkpoint that is to be saved, where each rank has one to bring into the run folder.

        It is in this rank's own `folder` then. Elsewhere all ranks write to rank 0's, which is in the run folder.
        """
        strategy: Any = trainer.strategy
        if self.uploads.folder.is_local or not saves_shards(strategy):
            return None
        strategy.own_path = folder / CHECKPOINT
        return Part(strategy.broadcast(uuid.uuid4().hex), trainer.global_rank, trainer.world_size)


def versions(module: LightningModule) -> list[int]:
    """How often each weight was written to."""
    return [weight._version for weight in module.parameters()]


class Randomness(Callback):
    """Makes what a training step draws (dropout, augmentation) a function of seed, rank, epoch and batch alone.

    A run that resumes inside an epoch then draws what the undisturbed run would have drawn.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seeds torch, on the device too, NumPy and Python."""
        where = (self.seed, trainer.global_rank, trainer.current_epoch, batch_idx)
        seed = int(np.random.SeedSequence(where).generate_state(1)[0])
        seed_cpu(seed)
        # torch.manual_seed formats a stack trace, at the cost of a training step, for each kind of device not in use.
        torch.mps.manual_seed(seed)
        for devices in (torch.cuda, torch.xpu):
            if devices.is_initialized():
                devices.manual_seed_all(seed)
