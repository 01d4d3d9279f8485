"""Ends a training whose loss is not finite any more."""

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from ray_mnist.arrival import Arrival
from ray_mnist.errors import TrainingError


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
