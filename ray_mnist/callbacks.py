"""What goes along with a worker's training.

Recorder measures and checkpoints; FiniteLoss ends what diverges; Randomness seeds each step; Mistakes looks at
the test.
"""

import math
import time
import uuid
import warnings
from collections import Counter, deque
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint
from torch import Tensor

from ray_mnist.arrival import Arrival
from ray_mnist.distributed.agreement import RankZero
from ray_mnist.distributed.collectives import common_to_all, gather, total
from ray_mnist.distributed.loaders import samples_seen
from ray_mnist.distributed.sharding import seed_cpu
from ray_mnist.errors import Stopped, TrainingError
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
            "val_samples": self.val_samples,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what came out of a checkpoint."""
        self.history, self.best, self.best_score = list(state["history"]), state["best"], state["best_score"]
        self.val_samples = state["val_samples"]

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
        self.train_samples = int(total(trainer, samples_seen(trainer.train_dataloader) - self._trained_before))
        row: Row = {"epoch": trainer.current_epoch + 1, "step": trainer.global_step}
        row |= {
            name: value.item()
            for name, value in trainer.callback_metrics.items()
            # Lightning keeps the metrics of an earlier epoch's validation.
            if value.numel() == 1 and (self._validated or not name.startswith("val"))
        }
        row |= {"samples_per_second": self.train_samples / (seconds - self._validation_seconds), "seconds": seconds}
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


class FiniteLoss(Callback):
    """Ends the training where the loss, or at a checkpoint a weight, is not finite any more.

    Each rank looks at its own, for a look at another's would be a collective in each step. When one raises, the others
    are ended as after any error. A checkpoint cannot be complete then: all ranks have to look before they save one.
    """

    LOOK_EVERY = 50  # batches, at losses that have arrived meanwhile from a device that is not the CPU

    def __init__(self) -> None:
        self.unseen: list[tuple[int, Any, Tensor]] = []  # step, learning rate and loss
        self.coming: deque[tuple[list[tuple[int, Any]], Arrival]] = deque()  # steps and rates, and their losses
        self.step, self.rate = 0, None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keeps the learning rate, which is the next step's when the batch ends."""
        self.step = trainer.global_step + 1
        self.rate = trainer.optimizers[0].param_groups[0]["lr"] if trainer.optimizers else None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Takes the loss."""
        if (loss := loss_of(outputs)) is not None:
            if loss.device.type == "cpu":
                check_finite(trainer, self.step, self.rate, loss.item())
                return
            self.unseen.append((self.step, self.rate, loss.detach()))
            if len(self.unseen) == self.LOOK_EVERY:
                self._send()
                self._look(trainer, wait=False)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Looks before anybody saves: what comes of a loss that was finite may be weights that are not."""
        if self.unseen:
            self._send()
        self._look(trainer, wait=True)
        if not all(weight.detach().isfinite().all() for weight in pl_module.parameters() if weight.requires_grad):
            raise diverged(f"a weight is not finite after step {trainer.global_step}", trainer, self.rate)

    def _send(self) -> None:
        unseen, self.unseen = self.unseen, []
        losses = Arrival(torch.cat([loss.reshape(1) for *_, loss in unseen]))
        self.coming.append(([(step, rate) for step, rate, _ in unseen], losses))

    def _look(self, trainer: Trainer, wait: bool) -> None:
        while self.coming and (wait or self.coming[0][1].is_here()):
            steps, losses = self.coming.popleft()
            for (step, rate), value in zip(steps, losses.values().tolist(), strict=True):
                check_finite(trainer, step, rate, value)


def check_finite(trainer: Trainer, step: int, rate: Any, loss: float) -> None:
    """Raises TrainingError unless the loss of a step is finite."""
    if not math.isfinite(loss):
        raise diverged(f"the loss is {loss} in step {step}", trainer, rate)


def loss_of(outputs: Any) -> Tensor | None:
    """The loss, of one element, in what `training_step` returned; nothing else is the same thing in all models."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None


def diverged(what: str, trainer: Trainer, rate: Any) -> TrainingError:
    """The sentence, with the learning rate of the step."""
    at = "" if rate is None else f", with learning rate {float(rate):g}"
    return TrainingError(
        f"diverged: {what} on rank {trainer.global_rank}{at}: checkpoints from before are kept, use a lower rate, or "
        "--allow-nan to go on all the same."
    )


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


class Mistakes(Callback):
    """Counts the test samples and, where `test_step` returns `logits`, finds confusion and the worst mistakes.

    After the test rank 0 has those of all ranks: `confusion`, how often each pair of label and prediction occurred
    among `classes` classes, and `worst`, the mistakes that the model was surest of. `first_layer` has the weights
    of the model's first layer, float (N, C, height, width), if they can be shown as pictures.
    """

    def __init__(self, keep: int = 25) -> None:
        self.keep = keep
        self.samples = self.classes = 0
        self.confusion = Counter[tuple[int, int]]()
        self.worst: list[dict[str, Any]] = []
        self.first_layer: np.ndarray | None = None

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Adds the batch."""
        if not (isinstance(outputs, dict) and is_labelled(batch) and is_multiclass(outputs.get("logits"))):
            return
        (images, labels), logits = batch, outputs["logits"]
        self.classes = logits.shape[1]
        if self.first_layer is None:
            self.first_layer = first_layer(pl_module, images.shape[1:])
        chance, predicted = logits.softmax(dim=1).max(dim=1)
        # Pairs, and not a matrix of all classes, which may be many. A label may be none of them, to be ignored.
        pairs = zip(labels.tolist(), predicted.tolist(), strict=True)
        self.confusion.update(pair for pair in pairs if 0 <= pair[0] < self.classes)
        # As many as are kept, right ones last: a number of its own for each batch would be compiled anew on a TPU.
        sureness, worst = chance.masked_fill(predicted == labels, -1).topk(min(self.keep, len(labels)))
        found = (images[worst].float(), labels[worst], predicted[worst], sureness)
        self.worst += [
            {"image": image.numpy(), "label": int(label), "predicted": int(guess), "chance": float(chance)}
            for image, label, guess, chance in zip(*(each.cpu() for each in found), strict=True)
            if chance >= 0 and 0 <= label < self.classes
        ]
        self._sort()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Brings the ranks' findings together on rank 0."""
        self.samples = int(total(trainer, samples_seen(trainer.test_dataloaders)))
        found = gather(trainer, (self.confusion, self.worst))
        self.confusion = sum((confusion for confusion, _ in found), Counter())
        self.worst = [mistake for _, worst in found for mistake in worst]
        self._sort()

    def _sort(self) -> None:
        self.worst = sorted(self.worst, key=lambda mistake: -mistake["chance"])[: self.keep]


def first_layer(model: LightningModule, shape: torch.Size) -> np.ndarray | None:
    """The weights (N, C, height, width) of a model's first layer, if it is linear or convolves, and fits the images.

    Args:
        model: the model.
        shape: of an image: C, height, width.
    """
    if len(shape) != 3:
        return None
    weight = next((weight for weight in model.parameters() if weight.ndim > 1), None)
    if type(weight) is not torch.nn.Parameter:  # one that is shared out over the ranks is of another class
        return None
    if weight.ndim == 2 and weight.shape[1] == shape.numel():
        return weight.detach().float().cpu().reshape(-1, *shape).numpy()
    return weight.detach().float().cpu().numpy() if weight.ndim == 4 and weight.shape[1] == shape[0] else None


def is_labelled(batch: Any) -> bool:
    """Whether a batch is a pair of inputs and class labels."""
    if not (isinstance(batch, list | tuple) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)):
        return False
    return batch[1].ndim == 1 and not batch[1].is_floating_point()


def is_multiclass(logits: Any) -> bool:
    """Whether these are the logits of samples that belong to one of several classes each."""
    return isinstance(logits, Tensor) and logits.ndim == 2 and logits.shape[1] > 1
