"""The training that is struck: it counts each sample that it sees, and waits at one moment for the blow."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import ray
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ray_mnist import Trainer
from ray_mnist.run.folder import RunFolder

EPOCHS, BATCH, EVERY, DROPOUT = 2, 64, 4, 0.2
TRAIN, VAL, TEST = 1200, 297, 300
STEPS_PER_EPOCH = -(-TRAIN // BATCH)
STEPS = EPOCHS * STEPS_PER_EPOCH
RESULT = ("steps", "train_loss", "val_loss", "test_samples", "restarts")
MOMENTS = ("start-up", "step", "validation", "upload", "uploaded", "test")
REACHED, STRUCK, BEGUN, OUTCOME = "reached.json", "struck", "begun.jsonl", "outcome.pt"


class Digits(pl.LightningDataModule):
    """Images (N, 64), labels (N,) and ids (N,), from 0 in each of the three sets."""

    def loader(self, first: int, size: int, **options: Any) -> DataLoader[Any]:
        images, labels = (torch.as_tensor(each[first : first + size]) for each in load_digits(return_X_y=True))
        return DataLoader(TensorDataset(images.float() / 16, labels, torch.arange(size)), batch_size=BATCH, **options)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader(0, TRAIN, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.loader(TRAIN, VAL)

    def test_dataloader(self) -> DataLoader[Any]:
        return self.loader(TRAIN + VAL, TEST)


def counted(ids: Tensor, size: int) -> Tensor:
    """How often each of `size` samples is among those that all ranks have."""
    counts = torch.zeros(size).index_add(0, ids, torch.ones(len(ids)))
    dist.all_reduce(counts)
    return counts


class Net(pl.LightningModule):
    """Has in its checkpoints how often each sample was trained on in each epoch: `seen`, float32 (EPOCHS, TRAIN).

    Args:
        dropout: chance of it; what is dropped depends on the number of workers.
    """

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 10))
        self.register_buffer("seen", torch.zeros(EPOCHS, TRAIN))
        self.tested = torch.zeros(TEST)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels, ids = batch
        self.seen[self.current_epoch] += counted(ids, TRAIN)
        loss = F.cross_entropy(self.net(images), labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels, _ = batch
        self.log("val_loss", F.cross_entropy(self.net(images), labels))

    def on_test_start(self) -> None:
        self.ids: list[Tensor] = []

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.ids.append(batch[2])

    def on_test_end(self) -> None:
        self.tested = counted(torch.cat(self.ids), TEST)
        del self.ids

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Moments(pl.Callback):
    """Notes when a process begins its first batch, and holds one rank at one moment, the first time that it gets there.

    Args:
        folder: gets the notes, and what whoever strikes has to know.
        moment: one of MOMENTS, or an empty string for none. `step` says which step, or after which step the next.
        rank: whose, where all ranks get there; uploads are rank 0's.
    """

    def __init__(self, folder: Path, moment: str, step: int, rank: int) -> None:
        self.folder, self.moment, self.step, self.rank = folder, moment, step, rank
        self.begun = False

    def at(self, moment: str, trainer: pl.Trainer) -> None:
        """Holds here, if it is the time, until the blow has fallen."""
        reached = self.folder / REACHED
        if moment != self.moment or trainer.global_step < self.step or reached.exists():
            return
        aside = reached.with_suffix(".new")
        aside.write_text(json.dumps({"pid": os.getpid(), "node": ray.get_runtime_context().get_node_id()}))
        aside.rename(reached)
        while not (self.folder / STRUCK).exists():
            time.sleep(0.02)

    def at_if_mine(self, moment: str, trainer: pl.Trainer) -> None:
        """Likewise, if this rank is the one."""
        if trainer.global_rank == self.rank:
            self.at(moment, trainer)

    def begin(self, trainer: pl.Trainer) -> None:
        """Notes the first batch of this process."""
        if not self.begun:
            self.begun = True
            note = {"time": time.time(), "pid": os.getpid(), "rank": trainer.global_rank, "step": trainer.global_step}
            with (self.folder / BEGUN).open("a") as file:
                file.write(json.dumps(note) + "\n")

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.at_if_mine("start-up", trainer)
            add = RunFolder.add_checkpoint

            def add_checkpoint(*arguments: Any) -> None:
                self.at("upload", trainer)
                add(*arguments)
                self.at("uploaded", trainer)

            RunFolder.add_checkpoint = add_checkpoint  # type: ignore[method-assign]

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.begin(trainer)
        self.at_if_mine("step", trainer)

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.at_if_mine("validation", trainer)

    def on_test_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.begin(trainer)
        self.at_if_mine("test", trainer)


def train(
    folder: Path,
    moment: str = "",
    step: int = 0,
    rank: int = 0,
    dropout: float = DROPOUT,
    **options: Any,
) -> None:
    """Trains, on two workers if nothing else is said; the outcome is in `folder` then."""
    options = {"max_epochs": EPOCHS, "checkpoint_every_n_steps": EVERY, "logger": False, "seed": 5} | options
    options = {"num_workers": 2, "storage_path": str(folder), "name": "run"} | options
    trainer = Trainer(callbacks=[Moments(folder, moment, step, rank)], **options)
    torch.manual_seed(5)
    model = Net(dropout)
    trainer.fit(model, datamodule=Digits())
    result = {name: trainer.result.values[name] for name in RESULT}
    torch.save({"weights": model.state_dict(), "tested": model.tested, "result": result}, folder / OUTCOME)


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    where = Path(arguments.pop("folder"))
    train(where, **arguments)
