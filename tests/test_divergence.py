"""A loss that is not finite ends the run, on all ranks, before anything is saved; gradients that are not do not."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ray_mnist import Trainer
from ray_mnist.divergence import FiniteLoss
from ray_mnist.errors import TrainingError
from ray_mnist.launch.failures import describe_all, is_bug
from ray_mnist.run.folder import RunFolder, checkpoint_name

BAD_STEP = 7
RATE = 0.25


class Diverges(pl.LightningModule):
    """Its loss is `value` in one step, on the last rank alone, with gradients that are finite."""

    def __init__(self, value: float = float("nan"), manual: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.value, self.automatic_optimization = value, not manual

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.mse_loss(self.weight * batch[0], batch[0])
        if self.global_step == BAD_STEP - 1 and self.global_rank == self.trainer.world_size - 1:
            loss = loss + self.value
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=RATE)


class Overflows(Diverges):
    """The loss is finite, and a weight is not."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.global_step == BAD_STEP - 1:
            self.weight.register_hook(lambda gradient: gradient * float("inf"))
        return self.weight.sum().clamp(-1, 1)


def fit(folder: Path, model: pl.LightningModule, **options: Any) -> Trainer:
    defaults = {"max_epochs": 2, "checkpoint_every_n_steps": 2, "logger": False}
    trainer = Trainer(**defaults | options, storage_path=str(folder), name="run")
    trainer.fit(model, DataLoader(TensorDataset(torch.ones(40, 1)), batch_size=4))
    return trainer


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_a_run_ends_where_its_loss_is_not_finite(
    manual: bool, num_workers: int, value: float, gloo: None, tmp_path: Path
) -> None:
    rank = max(num_workers - 1, 0)
    sentence = f"diverged: the loss is {value} in step {BAD_STEP} on rank {rank}, with learning rate {RATE}: "
    with pytest.raises(TrainingError, match=sentence) as end:
        fit(tmp_path, Diverges(value, manual), num_workers=num_workers)
    assert "\n" not in str(end.value)
    assert RunFolder(str(tmp_path), "run").checkpoints() == [checkpoint_name(BAD_STEP - 1)]


def test_a_run_that_may_goes_on(tmp_path: Path) -> None:
    trainer = fit(tmp_path, Diverges(), allow_nan=True)
    assert trainer.result.values["steps"] == 20


@pytest.mark.parametrize("every", [1, BAD_STEP])
def test_weights_that_are_not_finite_are_not_saved(every: int, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=f"diverged: a weight is not finite after step {BAD_STEP} on rank 0"):
        fit(tmp_path, Overflows(), checkpoint_every_n_steps=every)
    assert RunFolder(str(tmp_path), "run").checkpoints() == ([checkpoint_name(BAD_STEP - 1)] if every == 1 else [])


def test_a_device_is_not_waited_for_in_each_step_but_before_a_checkpoint(tmp_path: Path) -> None:
    """Of a GPU the losses are kept for later: here those of a callback that takes the CPU for one."""

    class Elsewhere(Tensor):
        device = torch.device("cuda")  # type: ignore[assignment]

    class Late(FiniteLoss):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            loss = outputs["loss"].as_subclass(Elsewhere)
            super().on_train_batch_end(trainer, pl_module, {"loss": loss}, batch, batch_idx)
            seen.append(trainer.global_step)

    seen: list[int] = []
    with pytest.raises(TrainingError, match=f"the loss is nan in step {BAD_STEP} "):
        fit(tmp_path, Diverges(), callbacks=[Late()], allow_nan=True)
    assert seen == list(range(1, BAD_STEP + 2))
    assert RunFolder(str(tmp_path), "run").checkpoints() == [checkpoint_name(BAD_STEP - 1)]


def test_it_is_not_tried_again() -> None:
    error = TrainingError("diverged: the loss is nan")
    error.add_note("Traceback")
    assert is_bug(error)
    lost = RuntimeError("Connection closed by peer [gloo]")
    lost.add_note("Traceback")
    assert str(describe_all({0: lost, 1: error})) == "diverged: the loss is nan"
