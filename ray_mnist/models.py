"""The models: SimpleModel, two linear layers, and ConvModel, small convolutions."""

import math
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from ray_mnist.errors import RequestError

Schedule = Literal["constant", "cosine", "one-cycle"]


class Accuracy(MulticlassAccuracy):
    """The share of right answers, exact: torchmetrics divides its whole-number counts in float32."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes=num_classes, average="micro")

    def compute(self) -> Tensor:
        """Correct over counted as a float64 scalar, on the CPU since not every device has float64."""
        right, wrong = (torch.as_tensor(counts).sum().cpu().double() for counts in (self.tp, self.fn))
        return right / (right + wrong)


class Classifier(LightningModule):
    """Trains an image classifier with Adam and cross entropy.

    Batches are `(images, labels)`: float32 (N, C, H, W) in [0, 1] and int64 (N,). Subclasses have `make_net`.

    Args:
        lr: Adam's learning rate, or its peak under a schedule.
        schedule: how the rate changes over the run, step by step: not at all, falling along a half cosine to 0, or
            Smith's one-cycle policy (https://arxiv.org/abs/1708.07120).
        input_shape: (C, H, W) of the images.
        num_classes: how many labels there are.

    Raises:
        RequestError: an argument is out of range, the images are not of `input_shape`, or the run resumes under a
            schedule that was laid out for another number of steps.
    """

    def __init__(
        self,
        lr: float = 1e-3,
        schedule: Schedule = "constant",
        input_shape: tuple[int, int, int] = (1, 28, 28),
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        if not (math.isfinite(lr) and lr > 0):
            raise RequestError(f"--lr {lr} is not possible: give a positive number, such as 0.001.")
        if schedule not in get_args(Schedule):
            raise RequestError(f"--model.schedule {schedule} is not known: use one of {', '.join(get_args(Schedule))}.")
        if num_classes < 2 or len(input_shape) != 3 or min(input_shape) < 1:
            raise RequestError(f"A classifier of {num_classes} classes over images of {input_shape} is not possible.")
        self.save_hyperparameters({"lr": lr, "schedule": schedule, "num_classes": num_classes})
        self.save_hyperparameters({"input_shape": tuple(input_shape)})
        # Without a look for NaN in each batch, which would wait for the device.
        self.val_loss, self.test_loss = MeanMetric(nan_strategy="disable"), MeanMetric(nan_strategy="disable")
        self.val_accuracy, self.test_accuracy = Accuracy(num_classes), Accuracy(num_classes)
        self.net = self.make_net(*input_shape, num_classes)

    def make_net(self, channels: int, height: int, width: int, num_classes: int) -> nn.Module:
        """What maps images (N, channels, height, width) to logits (N, num_classes)."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, C, H, W)."""
        if images.shape[1:] != self.hparams["input_shape"]:
            raise RequestError(
                f"{type(self).__name__} was made for images of shape {self.hparams['input_shape']} and got "
                f"{tuple(images.shape[1:])}: pass it input_shape=datamodule.input_shape."
            )
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The batch's mean cross entropy, a scalar."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Adds the batch to `val_loss` and `val_accuracy`, both totals over all samples of all workers."""
        self._evaluate(batch, self.val_loss, self.val_accuracy)
        self.log("val_loss", self.val_loss, batch_size=len(batch[1]))
        self.log("val_accuracy", self.val_accuracy, batch_size=len(batch[1]))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Adds the batch to `test_loss` and `test_accuracy`; returns its `logits` (N, num_classes)."""
        logits = self._evaluate(batch, self.test_loss, self.test_accuracy)
        self.log("test_loss", self.test_loss, batch_size=len(batch[1]))
        self.log("test_accuracy", self.test_accuracy, batch_size=len(batch[1]))
        return {"logits": logits}

    def predict_step(self, batch: tuple[Tensor, Tensor] | Tensor, batch_idx: int) -> Tensor:
        """Class probabilities (N, num_classes)."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        return self(images).softmax(dim=1)

    def _evaluate(self, batch: tuple[Tensor, Tensor], loss: MeanMetric, accuracy: Accuracy) -> Tensor:
        images, labels = batch
        logits: Tensor = self(images)
        loss.update(F.cross_entropy(logits, labels, reduction="none"))
        accuracy.update(logits, labels)
        return logits

    def on_train_start(self) -> None:
        """Lets a resumed run train at the rate that it is given now.

        Raises:
            RequestError: a schedule was laid out for another number of steps, or another rate, than it would have now.
        """
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        if self.hparams["schedule"] == "constant":
            for group in optimizer.param_groups:  # which came back from the checkpoint
                group["lr"] = self.hparams["lr"]
            return
        scheduler: Any = self.lr_schedulers()
        planned = scheduler.T_max if self.hparams["schedule"] == "cosine" else scheduler.total_steps
        if planned != self.trainer.estimated_stepping_batches:
            raise RequestError(
                f"The run's {self.hparams['schedule']} schedule was laid out for {planned} steps, and not for "
                f"{self.trainer.estimated_stepping_batches}: resume with the same --max-epochs and --batch-size."
            )

    def configure_optimizers(self) -> Any:
        """Adam, of one kernel where the weights are on a GPU, with the schedule stepped after every batch."""
        lr, schedule = self.hparams["lr"], self.hparams["schedule"]
        # Lightning refuses to clip the gradients of one that can unscale them itself.
        fused = self.device.type == "cuda" and not self.trainer.gradient_clip_val
        optimizer = torch.optim.Adam(self.parameters(), lr=lr, fused=fused or None)
        if schedule == "constant":
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = (
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
            if schedule == "cosine"
            else torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class SimpleModel(Classifier):
    """The tutorial's two linear layers: pixels to 128, ReLU, 128 to classes."""

    def make_net(self, channels: int, height: int, width: int, num_classes: int) -> nn.Module:
        """The two layers."""
        pixels = channels * height * width
        return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 128), nn.ReLU(), nn.Linear(128, num_classes))


class ConvModel(Classifier):
    """Three convolutions and two linear layers.

    It normalises by groups of channels within each sample, never over the batch: statistics over a batch would be
    those of a worker's share, and the training would depend on the number of workers.
    """

    def __init__(
        self,
        lr: float = 2e-3,
        schedule: Schedule = "one-cycle",
        input_shape: tuple[int, int, int] = (1, 28, 28),
        num_classes: int = 10,
    ) -> None:
        super().__init__(lr, schedule, input_shape, num_classes)

    def setup(self, stage: str) -> None:
        """On a GPU, whose convolutions are made for that, has the channels last in memory."""
        if self.trainer.strategy.root_device.type == "cuda":
            self.net.to(memory_format=torch.channels_last)

    def make_net(self, channels: int, height: int, width: int, num_classes: int) -> nn.Module:
        """The layers; each convolution halves height and width."""
        if min(height, width) < 8:
            raise RequestError(f"ConvModel halves images three times: {height}x{width} pixels are too few, use 8x8.")
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise((channels, 16, 32, 64)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Flatten(), nn.Linear(64 * (height // 8) * (width // 8), 128), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(128, num_classes))
