"""How much each rank's loss counts in a training step."""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback
from torch import nn

from ray_mnist.distributed.collectives import total
from ray_mnist.distributed.loaders import ResumableLoader, resumable_loaders
from ray_mnist.errors import RequestError, TrainingError

LOSS_WEIGHT = "loss_weight"  # in what training_step returns


class LossWeighting(Callback):
    """Weighs this rank's loss by its part of the global batch, where the parts are not equal.

    The mean of the ranks' gradients, each of a mean over a shard, is then the gradient of the mean over the batch. A
    part is the shard's samples, or what `training_step` returns as `loss_weight`: what its loss is a mean over.
    """

    weight = 1.0  # of the shard's samples; the mean of all ranks' is 1
    scale = 1.0  # of the gradient
    given: bool | None = None  # whether training_step returns a weight, once that is known
    loaders: list[ResumableLoader]
    loaders_of: Any = None  # the trainer's `train_dataloader` that has these loaders

    def __init__(self) -> None:
        self.without_gradient: list[Any] = []  # hooks of the parameters

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Looks up the batch's weight."""
        if self.loaders_of is not trainer.train_dataloader:
            self.loaders_of = trainer.train_dataloader
            self.loaders = resumable_loaders(self.loaders_of)
        found = [loader.weights.pop(batch_idx, None) for loader in self.loaders]
        weights = [weight for weight in found if weight is not None]
        self.weight = self.scale = sum(weights) / len(weights) if weights else 1.0

    def weigh(self, trainer: pl.Trainer, output: Any) -> Any:
        """Goes by the weight in what `training_step` returned, if there is one, which takes an all-reduce.

        Returns:
            `output`, with a loss of 0 where it weighs nothing: it may be 0 / 0.

        Raises:
            RequestError: the weight cannot be one.
            TrainingError: it is so only after the training has begun.
        """
        if output is None:  # which Lightning skips
            return output
        found = output.get(LOSS_WEIGHT) if isinstance(output, Mapping) else None
        if self.given is None:
            ranks = total(trainer, found is not None)
            if 0 < ranks < trainer.world_size:
                raise unusable(trainer, "training_step returned it on some workers only: return it on all of them.")
            self.given = ranks > 0
            if not self.given and trainer.world_size > 1:
                warn_of_needed_weight(trainer.lightning_module)
        if self.given != (found is not None):
            raise unusable(trainer, "training_step returns it in some steps only: return it in each step.")
        if found is None:
            return output
        if not trainer.lightning_module.automatic_optimization:
            why = "with automatic_optimization=False the gradients are made before training_step returns it."
            raise unusable(trainer, why)
        mine = checked(trainer, found) if self.weight else 0.0  # a shard without samples has one that does not count
        if not (of_all := total(trainer, mine)):
            raise unusable(trainer, "it is 0 on all workers: leave out batches in which nothing counts.")
        self.scale = mine * trainer.world_size / of_all
        return output if mine else {**output, "loss": torch.nan_to_num(output["loss"], 0.0, 0.0, 0.0)}

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        """Has the gradient weighed as it sets out from the loss."""
        if self.scale != 1.0:
            loss.register_hook(lambda gradient: gradient * self.scale)
        if self.scale == 0:
            # On the way from a loss of 0 / 0 it would turn into NaN.
            trained = [weight for weight in pl_module.parameters() if weight.requires_grad]
            self.without_gradient = [weight.register_hook(torch.zeros_like) for weight in trained]

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lets the next gradient through."""
        while self.without_gradient:
            self.without_gradient.pop().remove()


def checked(trainer: pl.Trainer, weight: Any) -> float:
    """The number that a `loss_weight` is."""
    try:
        number = float(weight)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        shown = " ".join(repr(weight).split())[:80]
        raise unusable(trainer, f"it is {shown}: return a number, or a tensor of one, that is 0 or more.")
    return number


def warn_of_needed_weight(model: pl.LightningModule) -> None:
    """Names the parts of the model whose mean is known to be over something else than samples.

    Calls of torch's functions are not seen: to watch them would have a compiled model compiled twice.
    """
    for name, part in model.named_modules():
        if isinstance(part, nn.CrossEntropyLoss | nn.NLLLoss) and part.reduction == "mean":
            default = type(part)().ignore_index
            if part.weight is not None or part.ignore_index != default:
                warnings.warn(
                    f"{name} is a mean over {'class weights' if part.ignore_index == default else 'some labels'}, of "
                    "which each worker has another part: have training_step return their sum as loss_weight, or the "
                    "training depends on the number of workers.",
                    stacklevel=1,
                )


def unusable(trainer: pl.Trainer, why: str) -> Exception:
    """The sentence; it is a RequestError as long as nothing was trained."""
    step, kind = trainer.global_step, TrainingError if trainer.global_step else RequestError
    return kind(f"loss_weight cannot be used in step {step + 1}: {why}")
