"""No step of a training waits for its device.

There is no GPU here: torch's `meta` device takes its place, of which no value can be had at all. What would wait for a
GPU, `.item()`, `.cpu()`, `bool(tensor)`, raises there. `tests/test_gpu.py` has CUDA itself say so.
"""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from ray_mnist import ConvModel, MNISTDataModule, SimpleModel, Trainer
from ray_mnist.arrival import Arrival
from ray_mnist.distributed.weighting import LossWeighting
from ray_mnist.divergence import FiniteLoss
from ray_mnist.errors import TrainingError
from ray_mnist.progress_reporter import ProgressReporter

STEPS = 17  # of an epoch
LOOK_EVERY = 5


class EndOfTest(Exception):
    """What a batch's end finds is enough: the end of an epoch would read its metrics."""


class Elsewhere(pl.Callback):
    """Has the model and each batch on the `meta` device, and ends in the validation."""

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        configure = pl_module.configure_optimizers

        def configure_optimizers() -> Any:
            pl_module.to("meta")  # Lightning has brought it to its own device
            return configure()

        pl_module.configure_optimizers = configure_optimizers
        pl_module.transfer_batch_to_device = lambda batch, *_: [part.to("meta") for part in batch]
        self.steps = self.validated = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps += 1

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.validated += 1
        if self.validated == 2:
            pl_module.to_empty(device="cpu")  # where Lightning takes it, and what its optimizer has
            trainer.optimizers[0].state.clear()
            raise EndOfTest


class Coming(Arrival):
    """Of a tensor whose values never arrive."""

    def __init__(self, tensor: torch.Tensor) -> None:
        assert tensor.is_meta
        sent.append(tensor)

    def is_here(self) -> bool:
        return False


sent: list[torch.Tensor] = []


@pytest.mark.parametrize("model_class", [SimpleModel, ConvModel])
def test_no_step_reads_what_the_device_computes(
    model_class: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent.clear()
    monkeypatch.setattr(FiniteLoss, "LOOK_EVERY", LOOK_EVERY)
    monkeypatch.setattr("ray_mnist.data.mnist.EVALUATION_BATCH", 64)
    monkeypatch.setattr("ray_mnist.divergence.Arrival", Coming)
    monkeypatch.setattr("ray_mnist.progress_reporter.Arrival", Coming)
    elsewhere = Elsewhere()
    trainer = Trainer(max_epochs=1, callbacks=[elsewhere], storage_path=str(tmp_path), name="run")
    with pytest.raises(EndOfTest):
        trainer.fit(model_class(), MNISTDataModule("digits"))
    assert elsewhere.steps == STEPS
    # The progress is to tell of a loss, and each fifth step sends those since the last, of which one may not be finite.
    assert [tensor.numel() for tensor in sent] == [1] + [LOOK_EVERY] * (STEPS // LOOK_EVERY)


class OnItsWay(Coming):
    """Arrives when the test says so; whoever does not wait for that gets nothing."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.here, self.waited = tensor, False, False
        on_their_way.append(self)

    def is_here(self) -> bool:
        return self.here

    def values(self) -> torch.Tensor:
        self.waited |= not self.here
        return self.tensor


on_their_way: list[OnItsWay] = []


class OnGpu(torch.Tensor):
    """Says that it is on a GPU."""

    device = torch.device("cuda")  # type: ignore[assignment]


def test_a_loss_is_looked_at_once_it_has_arrived_and_before_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    on_their_way.clear()
    monkeypatch.setattr("ray_mnist.divergence.Arrival", OnItsWay)
    finite, trainer, module = FiniteLoss(), SimpleNamespace(global_step=0, global_rank=0, optimizers=[]), nn.Module()

    def step(loss: float) -> None:
        finite.on_train_batch_start(trainer, module, None, 0)
        trainer.global_step += 1
        finite.on_train_batch_end(trainer, module, torch.tensor(loss).as_subclass(OnGpu), None, 0)

    for number in range(3 * FiniteLoss.LOOK_EVERY - 1):
        step(math.nan if number == 60 else 1.0)  # of the second fifty
    assert [each.waited for each in on_their_way] == [False, False]
    on_their_way[0].here = True
    step(1.0)  # looks at the first fifty, and not at the second
    assert not any(each.waited for each in on_their_way)
    with pytest.raises(TrainingError, match="the loss is nan in step 61 on rank 0"):
        finite.on_save_checkpoint(trainer, module, {})
    assert [each.waited for each in on_their_way] == [False, True, False]


def test_the_progress_is_told_with_the_first_batch_after_its_loss_has_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    on_their_way.clear()
    monkeypatch.setattr("ray_mnist.progress_reporter.Arrival", OnItsWay)
    told: list[Any] = []
    reporter = ProgressReporter(told.append, LossWeighting(), clock=lambda: 1.0)
    trainer: Any = SimpleNamespace(world_size=1, current_epoch=0, training=True, num_training_batches=9)
    vars(trainer).update(state=SimpleNamespace(stage="train"), train_dataloader=[], global_step=0)
    for batch in range(4):
        for loss in on_their_way:
            loss.here = batch == 2
        reporter.on_train_batch_end(trainer, SimpleNamespace(), torch.tensor(0.5 + batch), None, batch)
    assert [(event.batch, event.loss) for event in told] == [(3, 0.5)]
    assert len(on_their_way) == 1
    assert not on_their_way[0].waited
