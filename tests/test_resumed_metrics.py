"""The metrics of an epoch that is resumed are those of one that nothing happened to."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from ray_mnist import Trainer
from ray_mnist.errors import TrainingError
from ray_mnist.run.outcome import Row

SAMPLES, BATCH = 41, 4  # the last of 11 batches is one sample: with two ranks, one has nothing of it
LOGGED = ("mean", "sum", "least", "most", "each_step", "each_epoch", "synced", "double")


class Logs(pl.LightningModule):
    """Logs in every way that an epoch collects."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (values,) = batch
        loss = F.mse_loss(self.layer(values), values.square())
        self.log("mean", loss)
        self.log("sum", loss * len(values), reduce_fx="sum")
        self.log("least", values.min(), reduce_fx="min")
        self.log("most", values.max(), reduce_fx="max")
        self.log("each", loss, on_step=True, on_epoch=True)
        self.log("synced", loss, sync_dist=True)
        self.log("double", loss.double())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Stop(pl.Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step == self.at:
            raise ValueError("stopped")


VALUES = torch.linspace(-1, 1, SAMPLES)[:, None]


class Stream(IterableDataset[tuple[Tensor]]):
    """How many samples there are turns out at its end."""

    def __iter__(self) -> Iterator[tuple[Tensor]]:
        return iter(TensorDataset(VALUES))


def run(folder: Path, num_workers: int, data: Any, **options: Any) -> Trainer:
    torch.manual_seed(1)
    options = {"max_epochs": 2, "checkpoint_every_n_steps": 5, "logger": False, "name": "run"} | options
    trainer = Trainer(num_workers=num_workers, storage_path=str(folder), **options)
    trainer.fit(Logs(), data)
    return trainer


def fit(folder: Path, num_workers: int, **options: Any) -> list[Row]:
    loader = DataLoader(TensorDataset(VALUES), batch_size=BATCH, shuffle=True)
    return run(folder, num_workers, loader, **options).result.history


def stopped(folder: Path, num_workers: int, at: int) -> None:
    with pytest.raises((TrainingError, ValueError), match="stopped"):
        fit(folder, num_workers, callbacks=[Stop(at)])


@pytest.mark.parametrize("at", [9, 11, 12, 18], ids=lambda at: f"stopped at {at}")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_they_are_equal_on_as_many_workers(num_workers: int, at: int, gloo: None, tmp_path: Path) -> None:
    whole = fit(tmp_path, num_workers, name="whole")
    stopped(tmp_path, num_workers, at)
    rows = fit(tmp_path, num_workers, resume=True)
    assert [[row.get(name) for name in LOGGED] for row in rows] == [[row.get(name) for name in LOGGED] for row in whole]
    assert None not in [row.get(name) for row in whole for name in LOGGED]


@pytest.mark.parametrize(("before", "after"), [(2, 0), (0, 2), (2, 3)])
def test_they_are_equal_but_for_rounding_on_another_number(before: int, after: int, gloo: None, tmp_path: Path) -> None:
    whole = fit(tmp_path, 0, name="whole")
    stopped(tmp_path, before, 18)
    rows = fit(tmp_path, after, resume=True)
    for name in LOGGED:
        assert [row.get(name) for row in rows] == pytest.approx([row.get(name) for row in whole], rel=1e-6), name


@pytest.mark.parametrize(("options", "samples"), [({"max_steps": 5}, 20), ({"max_steps": 16}, 20), ({}, SAMPLES)])
def test_a_batch_of_a_stream_that_was_only_fetched_does_not_count(
    options: dict[str, int], samples: int, tmp_path: Path
) -> None:
    trainer = run(tmp_path, 0, DataLoader(Stream(), batch_size=BATCH), **options)
    assert trainer.result.values["train_samples"] == samples


@pytest.mark.parametrize("at", [9, 11, 18], ids=lambda at: f"stopped at {at}")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_samples_of_a_streams_epoch_are_counted_whole(
    num_workers: int, at: int, gloo: None, tmp_path: Path
) -> None:
    stream = DataLoader(Stream(), batch_size=BATCH)
    epochs = {"max_epochs": 1 + (at > 11)}  # the one that is resumed is the last
    whole = run(tmp_path, num_workers, stream, name="whole", **epochs)
    assert whole.result.values["train_samples"] == SAMPLES
    with pytest.raises((TrainingError, ValueError), match="stopped"):
        run(tmp_path, num_workers, stream, callbacks=[Stop(at)], **epochs)
    trainer = run(tmp_path, num_workers, stream, resume=True, **epochs)
    assert trainer.result.values["train_samples"] == SAMPLES
