"""The table of programs, and what they have in common: a net of one layer, 64 samples, and all that can be seen."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_utilities.core.inheritance import get_all_subclasses
from reference import QUIET, lightning, same
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, TensorDataset

from ray_mnist import Trainer

Make = Callable[..., Any]  # makes a Trainer
Seen = dict[str, Any]  # what a program found, by name


@dataclass
class Program:
    """A row of the table.

    `run` takes what makes a Trainer and a folder for what it writes. The findings named in `differs`, or on several
    workers also those in `differs_on_workers`, are other than Lightning's, for the reason given; all others are the
    same, numbers on several workers to `rel`.
    """

    about: str
    run: Callable[[Make, Path], Seen]
    differs: dict[str, str] = field(default_factory=dict)
    differs_on_workers: dict[str, str] = field(default_factory=dict)
    rel: float = 1e-5


PROGRAMS: dict[str, Program] = {}


def program(about: str, **more: Any) -> Callable[[Callable[[Make, Path], Seen]], None]:
    """Adds a row."""

    def add(run: Callable[[Make, Path], Seen]) -> None:
        PROGRAMS[run.__name__] = Program(about, run, **more)

    return add


def differing(name: str, folder: Path, num_workers: int) -> dict[str, str]:
    """The findings of a program that are other than with Lightning's Trainer, and how each differs."""
    row = PROGRAMS[name]
    ours = partial(make_ours, folder / "runs", num_workers, count())
    found = []
    for who, make in (("theirs", lightning), ("ours", ours)):
        pl.seed_everything(7, verbose=False)
        (folder / who).mkdir(parents=True)
        found.append(row.run(partial(make, default_root_dir=folder / who, logger=False), folder / who))
        undo_patches()
    theirs, ours_ = found
    assert set(theirs) == set(ours_)
    differences = {}
    for what in theirs:
        try:
            same(theirs[what], ours_[what], row.rel if num_workers else 1e-6, what)
        except AssertionError as difference:
            differences[what] = str(difference)
    return differences


def undo_patches() -> None:
    """What Lightning forgets where a hook that makes loaders raises: the classes of loaders keep its patches.

    Loaders that are made later in this process would carry a record with which they cannot be made again in a worker.
    """
    for base in (DataLoader, BatchSampler):
        for kind in get_all_subclasses(base) | {base}:
            for name in ("__setattr__", "__delattr__", "__init__"):
                if f"__old{name}" in vars(kind):
                    setattr(kind, name, getattr(kind, f"__old{name}"))
                    delattr(kind, f"__old{name}")


def make_ours(storage: Path, num_workers: int, number: Any, **arguments: Any) -> Trainer:
    return Trainer(storage_path=str(storage), name=f"run{next(number)}", num_workers=num_workers, **QUIET | arguments)


def data(samples: int = 64, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 4, generator=generator)
    return TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())


def loader(samples: int = 64, seed: int = 0, batch_size: int = 8) -> DataLoader[Any]:
    return DataLoader(data(samples, seed), batch_size=batch_size)


def val_loader() -> DataLoader[Any]:
    return loader(24, seed=1)


class Net(pl.LightningModule):
    """One layer, three classes; logs in every step."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng():  # whatever was drawn before
            torch.manual_seed(1)
            self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.log("val_loss", self.loss(batch), prog_bar=True)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"], momentum=0.9)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def seen(trainer: Any, model: pl.LightningModule, **more: Any) -> Seen:
    """What any program can see after its fit, and `more`."""
    return {
        "weights": weights(model),
        "metrics": [dict(getattr(trainer, f"{kind}_metrics")) for kind in ("callback", "logged", "progress_bar")],
        "epoch and step": (trainer.current_epoch, trainer.global_step),
        **more,
    }


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def raised(call: Callable[[], Any]) -> str:
    """The class and the first line of what a call raises."""
    try:
        call()
    except BaseException as error:  # KeyboardInterrupt and SystemExit are among what is compared
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return "nothing"
