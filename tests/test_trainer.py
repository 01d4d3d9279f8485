"""Trainer as Lightning's users know it: its methods, what it shows afterwards, and what it refuses."""

import inspect
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.tuner import Tuner
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from ray_mnist import MNISTDataModule, RequestError, SimpleModel, Trainer

SIZE = 1003
VALUES = torch.randn(SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Sums(pl.LightningModule):
    """Counts and adds up what it is shown, in every way that Lightning has; metrics meet at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.mean = MeanMetric(dist_sync_on_step=True)

    def _evaluate(self, batch: list[Tensor]) -> None:
        (values,) = batch
        self.log("count", float(len(values)), reduce_fx="sum")
        self.log("sum", values.sum(), reduce_fx="sum")
        self.log("largest", values.max(), reduce_fx="max")
        self.log("mean", values.mean())
        self.mean(values)
        self.log("metric", self.mean)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._evaluate(batch)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._evaluate(batch)

    def predict_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> tuple[Tensor, list[str]]:
        return self.weight * batch[0], [f"{value:.6f}" for value in batch[0].tolist()]


def loader(batch_size: int = 100, size: int = SIZE) -> DataLoader[Any]:
    return DataLoader(TensorDataset(VALUES[:size]), batch_size=batch_size)


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("task", ["validate", "test"])
def test_every_sample_is_evaluated_once(task: str, num_workers: int, gloo: None, tmp_path: Path) -> None:
    trainer = Trainer(num_workers=num_workers, storage_path=str(tmp_path / "runs"))
    (metrics,) = getattr(trainer, task)(Sums(), loader(), verbose=False)
    exact = {"count": SIZE, "sum": VALUES.sum().item(), "largest": VALUES.max().item(), "mean": VALUES.mean().item()}
    # Lightning and torchmetrics add up in float32.
    assert metrics == {
        **{name: pytest.approx(value, rel=1e-5) for name, value in exact.items()},
        "count": SIZE,
        "metric": pytest.approx(exact["mean"], rel=1e-5),
    }
    assert {name: value.item() for name, value in trainer.callback_metrics.items()} == metrics
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3, 4])
def test_predictions_come_in_the_order_of_the_data_each_once(num_workers: int, gloo: None, tmp_path: Path) -> None:
    trainer = Trainer(num_workers=num_workers, storage_path=str(tmp_path / "runs"))
    predictions = trainer.predict(Sums(), [loader(), loader(1000, size=2)])
    assert predictions is not None
    assert [[len(doubled) for doubled, _ in each] for each in predictions] == [[100] * 10 + [3], [2]]
    assert torch.equal(torch.cat([doubled for doubled, _ in predictions[0]]), 2 * VALUES)
    assert [text for _, texts in predictions[0] for text in texts] == [f"{value:.6f}" for value in VALUES.tolist()]
    assert torch.equal(predictions[1][0][0], 2 * VALUES[:2])
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("limit", "batches"), [(3, 3), (0.5, 5), (1.0, 11)])
def test_a_limit_on_predictions_is_for_all_workers_together(
    limit: float, batches: int, num_workers: int, gloo: None, tmp_path: Path
) -> None:
    trainer = Trainer(num_workers=num_workers, storage_path=str(tmp_path), limit_predict_batches=limit)
    predictions = trainer.predict(Sums(), loader())
    assert predictions is not None
    assert torch.equal(torch.cat([doubled for doubled, _ in predictions]), 2 * VALUES[: batches * 100])


class Unsendable(Sums):
    """Does something else with its predictions than to hand them over."""

    def predict_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> Any:
        return lambda: batch


def test_predictions_that_nobody_wants_are_not_gathered(gloo: None, tmp_path: Path) -> None:
    trainer = Trainer(num_workers=2, storage_path=str(tmp_path))
    assert trainer.predict(Unsendable(), loader(), return_predictions=False) is None


class Remembers(pl.Callback):
    """Collects what a person would plot afterwards."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.trainer: pl.Trainer | None = None

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.losses.append(trainer.callback_metrics["train_loss"].item())
        self.trainer = trainer  # which cannot be sent home

    def on_predict_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.losses.append(-1.0)


class Noting(SimpleModel):
    """Keeps something beside its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[int] = []

    def on_train_epoch_end(self) -> None:
        self.notes.append(self.trainer.current_epoch)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_fit_then_test_then_predict_then_fit_again(num_workers: int, gloo: None, tmp_path: Path) -> None:
    pl.seed_everything(5, verbose=False)
    remembers, model, datamodule = Remembers(), Noting(), MNISTDataModule("digits")
    before = model.net[1].weight.clone()
    trainer = Trainer(max_epochs=2, num_workers=num_workers, storage_path=str(tmp_path), callbacks=[remembers])
    trainer.fit(model, datamodule)
    first = trainer.result
    assert len(remembers.losses) == 2
    assert remembers.losses == [row["train_loss"] for row in first.history]
    assert model.notes == [0, 1]
    assert (trainer.current_epoch, trainer.global_step) == (2, 34)
    assert {"train_loss", "val_loss", "val_accuracy"} == set(trainer.callback_metrics) == set(trainer.logged_metrics)
    assert not torch.equal(model.net[1].weight, before)
    newest = torch.load(trainer.checkpoint_callback.last_model_path, weights_only=False)
    assert all(torch.equal(value, newest["state_dict"][name]) for name, value in model.state_dict().items())
    assert Path(trainer.checkpoint_callback.best_model_path).is_file()

    (tested,) = trainer.test(model, datamodule, ckpt_path="best", verbose=False)
    assert tested == trainer.test()[0] == first.test_metrics[0]
    assert set(trainer.callback_metrics) == {"test_loss", "test_accuracy"}
    assert (trainer.current_epoch, trainer.global_step) == (2, 34)

    predictions = trainer.predict(model, datamodule)
    assert predictions is not None
    assert torch.cat(predictions).shape == (359, 10)
    assert remembers.losses[2:] == [-1.0]

    trainer.fit(model, datamodule)
    assert trainer.result.path != first.path
    assert trainer.result.history[0]["train_loss"] < first.history[1]["train_loss"]  # from the trained weights on
    assert len(remembers.losses) == 5


def test_a_checkpoint_is_where_a_fit_starts_from(tmp_path: Path) -> None:
    trainer = Trainer(max_epochs=1, storage_path=str(tmp_path), name="first")
    trainer.fit(SimpleModel(), MNISTDataModule("digits"))
    trainer.save_checkpoint(tmp_path / "copy" / "first.ckpt")
    longer = Trainer(max_epochs=2, storage_path=str(tmp_path), name="second")
    longer.fit(SimpleModel(), MNISTDataModule("digits"), ckpt_path=tmp_path / "copy" / "first.ckpt", weights_only=False)
    assert longer.global_step == 34
    assert [row["epoch"] for row in longer.result.history] == [1, 2]  # the first came with the checkpoint
    with pytest.raises(RequestError, match=r"ckpt_path='/none\.ckpt': there is no such file"):
        longer.fit(SimpleModel(), MNISTDataModule("digits"), ckpt_path="/none.ckpt")
    with pytest.raises(RequestError, match="ckpt_path='best': there was no fit before"):
        Trainer(storage_path=str(tmp_path)).fit(SimpleModel(), MNISTDataModule("digits"), ckpt_path="best")


def test_the_best_is_what_the_users_own_checkpoint_callback_monitors(tmp_path: Path) -> None:
    class Rising(SimpleModel):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", -float(self.current_epoch))
            self.log("score", [1.0, 9.0, 4.0][self.current_epoch])

    keeper = ModelCheckpoint(monitor="score", mode="max")
    trainer = Trainer(max_epochs=3, storage_path=str(tmp_path), name="run", callbacks=keeper)
    trainer.fit(Rising(), MNISTDataModule("digits"))
    assert trainer.result.values["best_checkpoint"] == "checkpoint_000000034"
    assert trainer.checkpoint_callback is keeper
    assert Path(keeper.best_model_path).is_relative_to(tmp_path / "run")
    assert torch.load(keeper.best_model_path, weights_only=False)["global_step"] == 34


def test_its_methods_have_lightnings_parameters() -> None:
    for name in ("fit", "validate", "test", "predict"):
        theirs = inspect.signature(getattr(pl.Trainer, name)).parameters
        assert list(inspect.signature(getattr(Trainer, name)).parameters) == list(theirs), name


# What it refuses


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"devices": 3}, "devices=3 means nothing here, where every worker has one device: give num_workers=3"),
        ({"devices": [0, 1]}, r"devices=\[0, 1\] means nothing here, .* give num_workers=N"),
        ({"num_nodes": 2}, "num_nodes=2 means nothing here, where Ray places the workers: give num_workers=N"),
        ({"accelerator": "gpu"}, "accelerator='gpu' is not how a run chooses its devices: use_gpu=True"),
        ({"accelerator": "tpu"}, "accelerator='tpu' is not how a run chooses its devices: tpu_cores=N"),
        ({"accelerator": "hpu"}, "accelerator='hpu' is not how a run chooses its devices: leave it out"),
        ({"strategy": "ddp_spawn"}, "strategy='ddp_spawn' cannot run on workers that Ray starts: use one of auto, ddp"),
        ({"strategy": "fsdp"}, "strategy='fsdp' needs GPUs: give use_gpu=True, or use 'ddp'"),
        ({"strategy": pl.strategies.DDPStrategy()}, r"strategy=DDPStrategy\(…\) cannot run .*RayDDPStrategy"),
        ({"plugins": [LightningEnvironment()]}, "LightningEnvironment has no place where Ray"),
        ({"barebones": True}, "barebones=True leaves out the checkpoints"),
        (
            {"callbacks": LearningRateFinder()},
            "LearningRateFinder tries values out in trainings of its own",
        ),
        ({"callbacks": [BatchSizeFinder()]}, "BatchSizeFinder tries values out in trainings of its own"),
        ({"gpus": 2}, "Lightning's Trainer refuses its arguments: .*unexpected keyword argument 'gpus'"),
        ({"max_steps": "many"}, "Lightning's Trainer refuses its arguments"),
    ],
)
def test_arguments_that_mean_nothing_on_ray_are_refused(
    arguments: dict[str, Any], sentence: str, num_workers: int
) -> None:
    with pytest.raises(RequestError, match=sentence) as refusal:
        Trainer(max_epochs=1, num_workers=num_workers, **arguments)
    assert "\n" not in str(refusal.value)


def test_what_is_of_lightnings_trainer_alone_is_said_to_be(tmp_path: Path) -> None:
    trainer = Trainer(storage_path=str(tmp_path / "runs"))
    with pytest.raises(RequestError, match=r"LearningRateFinder tries .* search with ray_mnist\.tune"):
        Tuner(trainer).lr_find(SimpleModel(), MNISTDataModule("digits"))
    for use in (lambda: trainer.optimizers, lambda: Tuner(trainer).scale_batch_size(SimpleModel())):
        with pytest.raises(AttributeError, match=r"has no '\w+': .* Lightning's Trainer in each worker"):
            use()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("num_workers", [(4, 2), (0, 2), (2, 3, 4), (2.0, 4), (), True, "many"])
def test_a_range_of_workers_that_cannot_be(num_workers: Any) -> None:
    with pytest.raises(RequestError, match=r"^--num-workers \S* ?is not possible: give "):
        Trainer(num_workers=num_workers)


@pytest.mark.parametrize(
    "arguments", [{"devices": 1}, {"devices": "auto"}, {"accelerator": "cpu"}, {"strategy": "ddp"}, {"num_nodes": 1}]
)
def test_what_a_script_says_anyway_is_taken(arguments: dict[str, Any]) -> None:
    assert Trainer(num_workers=2, **arguments).config.num_workers == 2


def test_a_progress_bar_of_the_users_own_is_taken() -> None:
    assert Trainer(callbacks=[TQDMProgressBar()]).lightning["enable_progress_bar"]


def test_epochs_are_unlimited_only_where_steps_or_time_end_the_run() -> None:
    assert Trainer().lightning["max_epochs"] == Trainer(max_epochs=None).lightning["max_epochs"] == 10
    assert Trainer(max_steps=5).lightning["max_epochs"] == Trainer(max_time={"hours": 1}).lightning["max_epochs"] == -1
    assert Trainer(max_steps=5, max_epochs=3).lightning["max_epochs"] == 3
    assert Trainer(max_steps=5, max_epochs=-1).lightning["max_epochs"] == -1
    with pytest.raises(RequestError, match="--max-epochs -1 is not possible"):
        Trainer(max_epochs=-1)


class Holds(SimpleModel):
    """Has something deep inside that cannot be sent to another process."""

    def __init__(self, what: Any) -> None:
        super().__init__()
        self.net[1].cache = {"kept": [1, what]}


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        (threading.Lock, "model.net.1.cache['kept'][1], a lock, cannot be sent to the workers"),
        (lambda: sys.__stdout__, "model.net.1.cache['kept'][1], a TextIOWrapper, cannot be sent to the workers"),
        (lambda: (n for n in range(3)), "model.net.1.cache['kept'][1], a generator, cannot be sent to the workers"),
    ],
    ids=["lock", "open file", "generator"],
)
def test_what_cannot_be_sent_is_named_with_its_path_before_anything_starts(
    what: Any, sentence: str, tmp_path: Path
) -> None:
    trainer = Trainer(num_workers=2, storage_path=str(tmp_path / "runs"), name="run")
    with pytest.raises(RequestError) as refusal:
        trainer.fit(Holds(what()), MNISTDataModule("digits"))
    assert str(refusal.value).startswith(sentence)
    assert not (tmp_path / "runs").exists()


def test_a_model_of_another_lightning_is_refused(tmp_path: Path) -> None:
    trainer = Trainer(storage_path=str(tmp_path / "runs"))
    with pytest.raises(RequestError, match=r"model is of torch\.nn\.modules\.linear\.Linear, which is none of"):
        trainer.fit(nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="Give either datamodule or val_dataloaders, not both"):
        trainer.fit(SimpleModel(), MNISTDataModule("digits"), loader())
    assert not (tmp_path / "runs").exists()
