"""Programs about the calls: which methods and hooks, in which order, with which data, and what comes back."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.utilities import CombinedLoader
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from conformance.harness import Make, Net, Seen, data, files, loader, program, raised, seen, val_loader, weights

# Every hook, in order


def spied(kind: str, hooks: list[str]) -> Callable[[type], type]:
    """Has a class note the calls of its hooks, in the list of the trainer's first callback."""

    def spy(hook: Any) -> Any:
        @wraps(hook)
        def called(self: Any, *arguments: Any, **named: Any) -> Any:
            trainer = self._trainer if kind == "model" else getattr(self, "trainer", None)
            spies = [self] if kind == "callback" else trainer.callbacks if trainer else []
            calls = next((each.calls for each in spies if hasattr(each, "calls")), [])
            calls.append(f"{kind}.{hook.__name__}")
            return hook(self, *arguments, **named)

        return called

    def decorate(cls: type) -> type:
        for name in hooks:
            setattr(cls, name, spy(getattr(cls, name)))
        return cls

    return decorate


def public(*classes: type) -> list[str]:
    """The methods of these classes, but for one that Lightning refuses."""
    names = [name for each in classes for name, value in vars(each).items() if callable(value)]
    return [name for name in names if not name.startswith("_") and name != "configure_sharded_model"]


OF_DATA = [name for name in public(DataHooks) if not name.endswith("_dataloader")]
OPTIMIZES = ["backward", "configure_callbacks", "configure_gradient_clipping", "lr_scheduler_step", "optimizer_step"]
STEPS = ["training_step", "validation_step", "test_step", "predict_step", "configure_optimizers", "optimizer_zero_grad"]


@spied("callback", public(pl.Callback))
class Spy(pl.Callback):
    def __init__(self) -> None:
        self.calls: list[str] = []


@spied("model", [*public(ModelHooks, CheckpointHooks), *OF_DATA, *OPTIMIZES, *STEPS])
class SpiedNet(Net):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


@spied("data", [*OF_DATA, "state_dict", "load_state_dict", "train_dataloader"])
class SpiedData(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader(16)

    def val_dataloader(self) -> Any:
        return loader(16, seed=1)

    predict_dataloader = val_dataloader


class SpiedTestData(SpiedData):
    """With a test, in which a fit would end."""

    test_dataloader = SpiedData.val_dataloader


SAVES = (".state_dict", ".on_save_checkpoint")


@program(
    "hooks of model, callback and data module in `fit`, `validate`, `test`, `predict`",
    differs={"saves": "the run folder's checkpoints are saved at each epoch's end, besides those of the program"},
    differs_on_workers={
        "predict": "a batch is predicted as a whole, by one worker: each has every second",
    },
)
def hooks(make: Make, folder: Path) -> Seen:
    spy, model, kept = Spy(), SpiedNet(), ModelCheckpoint(folder, filename="kept")
    trainer = make(max_epochs=2, callbacks=[spy, kept], num_sanity_val_steps=1, gradient_clip_val=1.0)
    found = {}
    trainer.fit(model, SpiedData())
    found["fit"], found["saves"] = without(SAVES, spy.calls), [call for call in spy.calls if call.endswith(SAVES)]
    for task in ("validate", "test", "predict"):
        spy = Spy()
        alone = make(callbacks=[spy])
        getattr(alone, task)(SpiedNet(), datamodule=SpiedTestData())
        found[task] = spy.calls
    again = Spy()
    more = make(max_epochs=3, callbacks=[again])
    more.fit(SpiedNet(), SpiedData(), ckpt_path=folder / "kept.ckpt", weights_only=False)
    return found | {"fit from a checkpoint": without(SAVES, again.calls)}


def without(names: tuple[str, ...], calls: list[str]) -> list[str]:
    return [call for call in calls if not call.endswith(names)]


# The methods


@program("`validate`, `test`, `predict` alone, with several loaders, with a data module, from a checkpoint")
def methods_alone(make: Make, folder: Path) -> Seen:
    first, model = make(max_epochs=1), Net()
    first.fit(model, loader())
    first.save_checkpoint(folder / "saved.ckpt")
    fresh, two = Net(), [loader(24, seed=1), loader(17, seed=2)]
    trainer = make()
    found = {"validate": trainer.validate(fresh, two, verbose=False)}
    found["shown"] = dict(trainer.callback_metrics)
    found["test"] = trainer.test(fresh, two, ckpt_path=folder / "saved.ckpt", verbose=False)
    found["weights after the test"] = weights(fresh)
    found["predict"] = trainer.predict(Net(), two)
    found["predict with data module"] = trainer.predict(Net(), datamodule=Data(), return_predictions=True)
    found["unwanted"] = trainer.predict(Net(), two, return_predictions=False)
    return found


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return val_loader()

    def predict_dataloader(self) -> Any:
        return loader(21)


@program(
    "`fit` twice with one Trainer",
    differs=dict.fromkeys(
        ("second weights",),
        "each `fit` is a run with a folder of its own; Lightning's second one finds its epochs done",
    ),
)
def fit_twice(make: Make, folder: Path) -> Seen:
    model, trainer = Net(), make(max_epochs=2)
    trainer.fit(model, loader(), val_loader())
    found = seen(trainer, model)
    trainer.fit(model, loader(), val_loader())
    after = seen(trainer, model)
    return found | {f"second {what}": after[what] for what in ("weights", "epoch and step")}


@program('`fit(ckpt_path="last")` before the first fit, after it, and by another Trainer')
def last_checkpoint(make: Make, folder: Path) -> Seen:
    found = {}
    for epochs in (1, 3):
        kept, model = ModelCheckpoint(folder / "kept", save_last=True, filename="{epoch}"), Net()
        trainer = make(max_epochs=epochs, callbacks=[kept])
        trainer.fit(model, loader(), val_loader(), ckpt_path="last")
        found[f"{epochs} epochs"] = seen(trainer, model, files=files(folder / "kept"))
    return found


class Tested(Net):
    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def on_test_start(self) -> None:
        self.notes.append("tests")

    def test_dataloader(self) -> Any:
        return loader(24, seed=3)


@program(
    "`fit` of a model that brings a test",
    differs={
        "notes": "a fit ends in the test of the best checkpoint, for result.json; `test` then has the metrics",
    },
)
def fit_that_tests(make: Make, folder: Path) -> Seen:
    model, trainer = Tested(), make(max_epochs=1)
    trainer.fit(model, loader(), val_loader())
    found = seen(trainer, model, notes=list(model.notes))
    return found | {"test": trainer.test(model, verbose=False)}


@program("several loaders, in each of CombinedLoader's modes")
def combined_loaders(make: Make, folder: Path) -> Seen:
    return {mode: combined(make, mode) for mode in ("min_size", "max_size", "max_size_cycle", "sequential")}


class Several(Net):
    def loss(self, batch: Any) -> Tensor:
        parts = [part for part in batch.values() if part is not None] if isinstance(batch, dict) else [batch]
        return torch.stack([super(Several, self).loss(part) for part in parts]).mean()

    def training_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss, batch_size=8, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.log("val_loss", self.loss(batch), batch_size=8)


def combined(make: Make, mode: str) -> Seen:
    model, trainer = Several(), make(max_epochs=2)
    train, val = ({"a": loader(48, seed), "b": loader(32, seed + 1)} for seed in (0, 2))
    how = "min_size" if mode == "sequential" else mode  # which Lightning refuses to train with
    trainer.fit(model, CombinedLoader(train, how), CombinedLoader(val, mode))
    return seen(trainer, model)


# Randomness


class Drops(Net):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.dropout(x))


DRAWS = (
    "what is drawn depends on seed, epoch and batch alone, so that a run resumes exactly, and not on the draws before"
)


@program(
    "a loader that shuffles",
    differs=dict.fromkeys(
        ("weights", "metrics"),
        "the order of an epoch depends on seed and epoch alone: it is the same for any number of workers",
    ),
)
def shuffled(make: Make, folder: Path) -> Seen:
    model, trainer = Net(), make(max_epochs=2)
    trainer.fit(model, DataLoader(data(), batch_size=8, shuffle=True))
    return seen(trainer, model)


@program("dropout", differs=dict.fromkeys(("weights", "metrics"), DRAWS))
def dropout(make: Make, folder: Path) -> Seen:
    model, trainer = Drops(), make(max_epochs=2)
    trainer.fit(model, loader())
    return seen(trainer, model)


# Loggers and files


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@program("CSVLogger and TensorBoardLogger: files, rows, curves, hyperparameters")
def loggers(make: Make, folder: Path) -> Seen:
    table, board = CSVLogger(folder, name="table"), TensorBoardLogger(folder, name="board")
    model = Net()
    trainer = make(max_epochs=2, logger=[table, board], log_every_n_steps=3)
    trainer.fit(model, loader(), val_loader())
    events = [name for name in files(folder) if "events" not in name and "checkpoints" not in name]
    rows = [
        list(map(float, filter(None, row.split(","))))
        for row in Path(table.log_dir, "metrics.csv").read_text().splitlines()[1:]
    ]
    return seen(
        trainer,
        model,
        files=events,
        rows=rows,
        curves=scalars(Path(board.log_dir)),
        dirs=[Path(each.log_dir).name for each in trainer.loggers],
    )


@program(
    "the default logger and ModelCheckpoint",
    differs={
        "files": "they are in the run folder: `tensorboard/`, `checkpoint_*/`",
        "callback": "the run folder's checkpoints take the place of Lightning's default ModelCheckpoint",
    },
)
def defaults(make: Make, folder: Path) -> Seen:
    model, trainer = Net(), make(max_epochs=2, logger=True)
    trainer.fit(model, loader(), val_loader())
    best = trainer.checkpoint_callback.best_model_path
    found = torch.load(best, weights_only=False)["state_dict"]
    return seen(
        trainer,
        model,
        files=[name for name in files(folder) if "events" not in name],
        best=found,
        callback=len(trainer.callbacks),
    )


# What is raised


class Raises(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise {"error": ValueError, "interrupt": KeyboardInterrupt}[self.how]("in the step")

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how


class NoOptimizer(pl.LightningModule):
    training_step = Net.training_step


IN_WORKER = "an error in a worker is a TrainingError, which has the worker's traceback"


@program(
    "errors",
    differs={
        "interrupt": "Ctrl-C ends a fit as KeyboardInterrupt, which says how to go on, and not as SystemExit",
        "arguments": "what is wrong with the request is a RequestError, one sentence, with the way out",
        "no module": "what is wrong with the request is a RequestError, one sentence, with the way out",
    },
    differs_on_workers={
        "step": IN_WORKER,
        "monitor": IN_WORKER,
        "no optimizer": IN_WORKER,
        "no loader": IN_WORKER,
    },
)
def errors(make: Make, folder: Path) -> Seen:
    def fit(model: Any, *loaders: Any, **arguments: Any) -> str:
        return raised(lambda: make(**{"max_epochs": 1} | arguments).fit(model, *loaders))

    return {
        "step": fit(Raises("error"), loader()),
        "interrupt": fit(Raises("interrupt"), loader()),
        "monitor": fit(Net(), loader(), callbacks=EarlyStopping("nothing")),
        "no optimizer": fit(NoOptimizer(), loader()),
        "no loader": fit(Net()),
        "arguments": fit(Net(), loader(), max_steps="many"),
        "no module": fit(nn.Linear(4, 3), loader()),
    }
