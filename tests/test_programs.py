"""Lightning programs as strangers write them: two workers give what one process gives.

Each program is written for Lightning's Trainer, gets one to make its Trainers with, and returns all that it can see
afterwards. Data sets have sizes that nothing divides, so that last batches are ragged and shares unequal.
"""

import csv
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import torchmetrics
from pytorch_lightning.callbacks import (
    BaseFinetuning,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.utilities import CombinedLoader, grad_norm
from reference import lightning, same
from torch import Tensor, nn
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)
from torchmetrics import MeanMetric, MeanSquaredError, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassF1Score

from ray_mnist import Trainer
from ray_mnist.errors import RequestError

Make = Callable[..., Any]  # makes a Trainer
Seen = dict[str, Any]
PROGRAMS: dict[str, tuple[Callable[[Make], Seen], float]] = {}


def program(rel: float = 1e-5) -> Callable[[Callable[[Make], Seen]], Callable[[Make], Seen]]:
    """Adds a row to the table: a program, and how far apart its numbers may be."""

    def add(run: Callable[[Make], Seen]) -> Callable[[Make], Seen]:
        PROGRAMS[run.__name__] = run, rel
        return run

    return add


def seen(trainer: Any, model: pl.LightningModule, **more: Any) -> Seen:
    """What any program can see after its fit, and `more`."""
    measured = ("samples_per_second", "seconds")
    history = trainer.result.history if hasattr(trainer, "result") else []
    return {
        "weights": {name: weight.clone() for name, weight in model.state_dict().items()},
        "callback_metrics": dict(trainer.callback_metrics),
        "logged_metrics": dict(trainer.logged_metrics),
        "progress_bar_metrics": dict(trainer.progress_bar_metrics),
        "epoch and step": (trainer.current_epoch, trainer.global_step),
        "history": [{name: value for name, value in row.items() if name not in measured} for row in history],
        **more,
    }


def clusters(samples: int, features: int = 8, classes: int = 3, seed: int = 0) -> TensorDataset:
    """Points around one centre for each class, near enough to each other to be mistaken."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % classes
    centres = torch.randn(classes, features, generator=torch.Generator().manual_seed(100))
    return TensorDataset(centres[labels] + torch.randn(samples, features, generator=generator), labels)


def mlp(features: int = 8, out: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, 16), nn.Tanh(), nn.Linear(16, out))


# A classifier as in Lightning's introduction: loaders are passed to fit, `self.log` has no options.


class LitClassifier(pl.LightningModule):
    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self.log("val_loss", F.cross_entropy(logits, y), prog_bar=True)
        self.log("val_acc", (logits.argmax(1) == y).float().mean())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("test_loss", F.cross_entropy(self(x), y))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"])


@program()
def loaders_passed_to_fit(make: Make) -> Seen:
    train, val = random_split(clusters(98), [61, 37], generator=torch.Generator().manual_seed(42))
    model = LitClassifier()
    trainer = make(max_epochs=3, log_every_n_steps=1)
    trainer.fit(model, DataLoader(train, batch_size=7, shuffle=True), DataLoader(val, batch_size=10))
    return seen(trainer, model)


# Metrics as objects, loaders on the module.


class LitMetrics(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.criterion = nn.CrossEntropyLoss()
        metrics = MetricCollection({"acc": MulticlassAccuracy(3), "f1": MulticlassF1Score(3)})
        self.train_metrics, self.val_metrics = metrics.clone(prefix="train/"), metrics.clone(prefix="val/")
        self.step_acc = MulticlassAccuracy(3, average="micro", dist_sync_on_step=True)
        self.auroc = MulticlassAUROC(3)
        self.heads = nn.ModuleDict({"mse": MeanSquaredError(), "mean": MeanMetric()})

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        x, y = batch
        logits = self.net(x)
        loss = self.criterion(logits, y)
        self.train_metrics(logits, y)
        self.log_dict(self.train_metrics, on_step=False, on_epoch=True)
        self.step_acc(logits, y)
        self.log("train/step_acc", self.step_acc, on_step=True, on_epoch=True)
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return {"loss": loss, "logits": logits}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self.net(x)
        self.val_metrics.update(logits, y)
        self.auroc.update(logits.softmax(1), y)
        self.heads["mse"](logits.softmax(1), F.one_hot(y, 3).float())
        self.heads["mean"](self.criterion(logits, y), weight=len(y))
        self.log("val/mse", self.heads["mse"])
        self.log("val/mean", self.heads["mean"])

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.val_metrics.compute())
        self.val_metrics.reset()
        self.log("val/auroc", self.auroc.compute(), prog_bar=True)
        self.auroc.reset()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def train_dataloader(self) -> Any:
        return DataLoader(clusters(45), batch_size=8, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(clusters(31, seed=1), batch_size=9)


@program()
def metrics_as_objects_and_loaders_on_the_module(make: Make) -> Seen:
    model = LitMetrics()
    trainer = make(max_epochs=2)
    trainer.fit(model)
    return seen(trainer, model)


# Two optimizers, stepped by hand.


class Noisy(Dataset[Any]):
    """Points on a circle, each with noise for the generator: drawn anew each time, from all three generators."""

    def __len__(self) -> int:
        return 29

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        angle = torch.tensor(index * 0.7)
        point = torch.stack([angle.cos(), angle.sin()]) * (1 + 0.1 * random.random())
        noise = torch.cat([torch.randn(3), torch.from_numpy(np.random.randn(1)).float()])
        return point, noise


class LitGAN(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = mlp(4, 2), mlp(2, 1)

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z)

    def adversarial_loss(self, x: Tensor, real: bool) -> Tensor:
        score = self.discriminator(x)
        return F.binary_cross_entropy_with_logits(score, torch.full_like(score, float(real)))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real, z = batch
        g, d = self.optimizers()
        self.toggle_optimizer(g)
        g_loss = self.adversarial_loss(self(z), True)
        self.log("g_loss", g_loss, prog_bar=True)
        g.zero_grad()
        self.manual_backward(g_loss)
        g.step()
        self.untoggle_optimizer(g)
        self.toggle_optimizer(d)
        d_loss = (self.adversarial_loss(real, True) + self.adversarial_loss(self(z).detach(), False)) / 2
        self.log("d_loss", d_loss, on_step=False, on_epoch=True)
        d.zero_grad()
        self.manual_backward(d_loss)
        self.clip_gradients(d, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        d.step()
        self.untoggle_optimizer(d)

    def on_train_epoch_end(self) -> None:
        for schedule in self.lr_schedulers():
            schedule.step()

    def configure_optimizers(self) -> Any:
        both = [
            torch.optim.SGD(self.generator.parameters(), lr=0.1),
            torch.optim.SGD(self.discriminator.parameters(), lr=0.2),
        ]
        return both, [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in both]


@program()
def gan_by_manual_optimization(make: Make) -> Seen:
    model = LitGAN()
    trainer = make(max_epochs=3, strategy="ddp_find_unused_parameters_true", log_every_n_steps=2)
    trainer.fit(model, DataLoader(Noisy(), batch_size=6, shuffle=True))
    return seen(trainer, model)


class LitAccumulating(LitClassifier):
    """Steps by hand, every third batch; the schedule follows what validation says."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        optimizer = self.optimizers()
        loss = F.cross_entropy(self(x), y)
        self.manual_backward(loss / 3)
        if (batch_idx + 1) % 3 == 0 or self.trainer.is_last_batch:
            optimizer.step()
            optimizer.zero_grad()
        self.log("train_loss", loss, on_step=True, on_epoch=True)

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.lr_schedulers().step(self.trainer.callback_metrics["val_loss"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}


@program()
def accumulating_by_hand(make: Make) -> Seen:
    model = LitAccumulating()
    rates = LearningRateMonitor()
    trainer = make(max_epochs=4, callbacks=[rates])
    trainer.fit(model, DataLoader(clusters(50), batch_size=7), DataLoader(clusters(19, seed=1), batch_size=5))
    return seen(trainer, model, rates=rates.lrs)


# What a well-kept training script has around its fit.


class LitPlateau(LitClassifier):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams["lr"], momentum=0.9)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0, threshold=0.05)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}


def csv_rows(logger: CSVLogger) -> list[dict[str, float]]:
    """What CSVLogger wrote, as numbers."""
    with open(Path(logger.log_dir, "metrics.csv"), newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


@program()
def plateau_early_stopping_checkpoints_and_loggers(make: Make) -> Seen:
    folder = make.keywords["default_root_dir"]  # type: ignore[attr-defined]
    model = LitPlateau(lr=0.5)
    best = ModelCheckpoint(
        dirpath=folder / "best",
        filename="{epoch}-{val_acc:.2f}",
        monitor="val_acc",
        mode="max",
        save_top_k=2,
        save_last=True,
    )
    stopping = EarlyStopping("val_loss", patience=2, min_delta=0.02)
    rates = LearningRateMonitor(logging_interval="epoch")
    table, board = CSVLogger(folder, name="table"), TensorBoardLogger(folder, name="board")
    trainer = make(max_epochs=20, callbacks=[best, stopping, rates], logger=[table, board], log_every_n_steps=2)
    trainer.fit(model, DataLoader(clusters(44), batch_size=8, shuffle=True), DataLoader(clusters(29, seed=1), 6))
    assert Path(best.best_model_path).is_file()
    assert list(Path(board.log_dir).glob("events.out.tfevents.*"))
    loaded = LitPlateau.load_from_checkpoint(best.best_model_path)
    after = seen(
        trainer,
        model,
        stopped=(stopping.stopped_epoch, stopping.best_score, stopping.wait_count),
        best=(Path(best.best_model_path).name, best.best_model_score),
        kept=sorted(path.name for path in (folder / "best").iterdir()),
        kept_scores=sorted(float(score) for score in best.best_k_models.values()),
        same_checkpoint=trainer.checkpoint_callback is best,
        rates=rates.lrs,
        table=csv_rows(table),
        loaded=loaded.state_dict(),
    )
    tested = trainer.test(ckpt_path="best", dataloaders=DataLoader(clusters(17, seed=3), batch_size=5))
    tested_weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    return after | {"test": tested, "metrics after the test": dict(trainer.callback_metrics), "tested": tested_weights}


# One-cycle, accumulation, clipping, and the gradient's norm.


class LitOneCycle(LitClassifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log_dict(grad_norm(self.net, norm_type=2))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


@program()
def one_cycle_with_accumulation_and_clipping(make: Make) -> Seen:
    model = LitOneCycle()
    rates = LearningRateMonitor(logging_interval="step")
    trainer = make(
        max_epochs=3, accumulate_grad_batches=4, gradient_clip_val=0.3, callbacks=[rates], log_every_n_steps=1
    )
    trainer.fit(model, DataLoader(clusters(67), batch_size=7, shuffle=True), DataLoader(clusters(9, seed=1)))
    return seen(trainer, model, rates=rates.lrs)


# A DataModule and a module in the style of lightning-hydra-template.


class PointsDataModule(pl.LightningDataModule):
    def __init__(self, sizes: tuple[int, int, int] = (56, 24, 16), batch_size: int = 8, num_workers: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.data_train: Dataset[Any] | None = None
        self.data_val: Dataset[Any] | None = None
        self.data_test: Dataset[Any] | None = None

    @property
    def num_classes(self) -> int:
        return 3

    def setup(self, stage: str | None = None) -> None:
        if not self.data_train and not self.data_val and not self.data_test:
            dataset = ConcatDataset([clusters(70), clusters(26, seed=1)])
            self.data_train, self.data_val, self.data_test = random_split(
                dataset, self.hparams["sizes"], generator=torch.Generator().manual_seed(42)
            )

    def _loader(self, dataset: Any, shuffle: bool = False) -> DataLoader[Any]:
        workers = self.hparams["num_workers"]
        return DataLoader(dataset, self.hparams["batch_size"], shuffle=shuffle, num_workers=workers)

    def train_dataloader(self) -> Any:
        return self._loader(self.data_train, shuffle=True)

    def val_dataloader(self) -> Any:
        return self._loader(self.data_val)

    def test_dataloader(self) -> Any:
        return self._loader(self.data_test)


class PointsLitModule(pl.LightningModule):
    def __init__(self, net: nn.Module, optimizer: Any, scheduler: Any, betas: dict[str, Any], compile: bool) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.net = net
        self.criterion = nn.CrossEntropyLoss()
        self.train_acc, self.val_acc, self.test_acc = (MulticlassAccuracy(3, average="micro") for _ in range(3))
        self.train_loss, self.val_loss, self.test_loss = MeanMetric(), MeanMetric(), MeanMetric()
        self.val_acc_best = torchmetrics.MaxMetric()

    def on_train_start(self) -> None:
        self.val_loss.reset()
        self.val_acc.reset()
        self.val_acc_best.reset()

    def model_step(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, y = batch
        logits = self.net(x)
        return self.criterion(logits, y), logits.argmax(1), y

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, preds, targets = self.model_step(batch)
        self.train_loss(loss)
        self.train_acc(preds, targets)
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("train/acc", self.train_acc, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss, preds, targets = self.model_step(batch)
        self.val_loss(loss)
        self.val_acc(preds, targets)
        self.log("val/loss", self.val_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("val/acc", self.val_acc, on_step=False, on_epoch=True, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        self.val_acc_best(self.val_acc.compute())
        self.log("val/acc_best", self.val_acc_best.compute(), sync_dist=True, prog_bar=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        loss, preds, targets = self.model_step(batch)
        self.test_loss(loss)
        self.test_acc(preds, targets)
        self.log("test/loss", self.test_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("test/acc", self.test_acc, on_step=False, on_epoch=True, prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizer = self.hparams["optimizer"](params=self.trainer.model.parameters())
        scheduler = self.hparams["scheduler"](optimizer=optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss", "interval": "epoch", "frequency": 1},
        }


# Its MeanMetric is the mean of the batches' losses, the same for half batches only where all are full, as here.
@program()
def hydra_template(make: Make) -> Seen:
    datamodule = PointsDataModule(num_workers=1)
    model = PointsLitModule(
        net=mlp(),
        optimizer=partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
        scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
        betas={"nested": (0.9, [1, 2]), "loss": nn.MSELoss()},
        compile=False,
    )
    checkpoints = ModelCheckpoint(monitor="val/acc", mode="max", save_last=True, auto_insert_metric_name=False)
    trainer = make(max_epochs=3, callbacks=[checkpoints], check_val_every_n_epoch=1)
    trainer.fit(model=model, datamodule=datamodule)
    train_metrics = dict(trainer.callback_metrics)
    after = seen(trainer, model, best=checkpoints.best_model_score)
    # The checkpoint holds hyperparameters that are objects.
    best = checkpoints.best_model_path
    tested = trainer.test(model=model, datamodule=datamodule, ckpt_path=best, weights_only=False)
    return after | {"test": tested, "all": {**train_metrics, **trainer.callback_metrics}}


# Several loaders.


class LitSeveral(LitClassifier):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        x, y = batch
        logits = self(x)
        self.log("val_loss", F.cross_entropy(logits, y))
        self.log(f"right_{dataloader_idx}", (logits.argmax(1) == y).float().sum(), reduce_fx="sum",
                 add_dataloader_idx=False)  # fmt: skip

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return {"where": f"loader {dataloader_idx}", "class": self(batch[0]).argmax(1)}


@program()
def several_validation_loaders(make: Make) -> Seen:
    model = LitSeveral()
    stopping = EarlyStopping("val_loss/dataloader_idx_1", patience=1)
    best = ModelCheckpoint(monitor="val_loss/dataloader_idx_0", filename="best")
    trainer = make(max_epochs=3, callbacks=[stopping, best])
    several = [DataLoader(clusters(size, seed=size), batch_size=4) for size in (13, 6, 27)]
    trainer.fit(model, DataLoader(clusters(33), batch_size=5), val_dataloaders=several)
    after = seen(
        trainer,
        model,
        stopping=(stopping.stopped_epoch, stopping.best_score),
        best=best.best_model_score,
    )
    return after | {"predictions": trainer.predict(model, several)}


class LitTwoSources(LitClassifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x, y), (u, v) = batch["labelled"], batch["more"]
        loss = F.cross_entropy(self(x), y) + 0.3 * F.cross_entropy(self(u), v)
        self.log("train_loss", loss, batch_size=len(x) + len(u), on_epoch=True)
        return loss


@program()
def two_train_loaders_at_once(make: Make) -> Seen:
    model = LitTwoSources()
    trainer = make(max_epochs=2)
    sources = {
        "labelled": DataLoader(clusters(40), batch_size=4, shuffle=True),
        "more": DataLoader(clusters(26, seed=1), batch_size=6, shuffle=True, drop_last=True),
    }
    trainer.fit(model, train_dataloaders=sources, val_dataloaders=DataLoader(clusters(11, seed=2), batch_size=3))
    return seen(trainer, model)


class LitPairs(LitClassifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x, y), (u, v) = batch
        loss = F.cross_entropy(self(torch.cat([x, u])), torch.cat([y, v]))
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(x) + len(u))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        for name, part in batch.items():
            if part is not None:
                self.log(f"val_loss_{name}", F.cross_entropy(self(part[0]), part[1]), batch_size=len(part[0]))


@program()
def combined_loaders(make: Make) -> Seen:
    model = LitPairs()
    trainer = make(max_epochs=2)
    train = [DataLoader(clusters(size, seed=size), batch_size=4, shuffle=True, drop_last=True) for size in (23, 15)]
    val = {name: DataLoader(clusters(size, seed=size), batch_size=5) for name, size in (("a", 12), ("b", 28))}
    trainer.fit(model, CombinedLoader(train, "min_size"), CombinedLoader(val, "max_size"))
    return seen(trainer, model)


# Streams of samples.


class Counting(IterableDataset[Any]):
    """Samples one after the other, from a file as it were; nobody knows how many."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for x, y in clusters(self.samples):
            yield {"x": x + 0.1 * torch.randn(8), "y": y}


class LitStream(LitClassifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch["x"], batch["y"]), batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step((batch["x"], batch["y"]), batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return [f"class {label}" for label in self(batch["x"]).argmax(1).tolist()]


@program()
def streams(make: Make) -> Seen:
    model = LitStream()
    trainer = make(max_epochs=2, val_check_interval=4)
    val = DataLoader(Counting(11), batch_size=4)
    trainer.fit(model, DataLoader(Counting(43), batch_size=6), val)
    after = seen(trainer, model)
    return after | {"predictions": trainer.predict(model, val)}


# Samples drawn at random.


class Augmented(Dataset[Any]):
    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.dataset[index]
        if random.random() < 0.5:
            x = x.flip(0)
        return x * np.float32(np.random.uniform(0.9, 1.1)) + 0.1 * torch.randn(8), y


@program()
def weighted_sampler_over_augmented_samples(make: Make) -> Seen:
    data = clusters(60)
    weights = torch.tensor([1.0, 2.0, 4.0])[data.tensors[1]]
    sampler = WeightedRandomSampler(weights.tolist(), num_samples=39)
    model = LitClassifier()
    trainer = make(max_epochs=3)
    loader = DataLoader(Augmented(data), 6, sampler=sampler, num_workers=2, persistent_workers=True)
    trainer.fit(model, loader, DataLoader(Augmented(clusters(15, seed=1)), batch_size=4))
    return seen(trainer, model)


# Sentences of different lengths, batched with others of their length.


class Sentences(Dataset[Any]):
    def __init__(self, sentences: int) -> None:
        generator = torch.Generator().manual_seed(sentences)
        self.lengths = [2 + index * 5 % 7 for index in range(sentences)]
        self.words = [torch.randint(1, 20, (length,), generator=generator) for length in self.lengths]

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"id": f"s{index}", "words": self.words[index], "label": self.words[index].sum() % 2}


def pad(samples: list[dict[str, Any]]) -> dict[str, Any]:
    words = nn.utils.rnn.pad_sequence([sample["words"] for sample in samples], batch_first=True)
    return {
        "ids": [sample["id"] for sample in samples],
        "words": words,
        "lengths": torch.tensor([len(sample["words"]) for sample in samples]),
        "labels": torch.stack([sample["label"] for sample in samples]),
    }


class BucketSampler(Sampler[list[int]]):
    """Batches of sentences of about the same length, in any order."""

    def __init__(self, lengths: list[int], batch_size: int) -> None:
        by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
        self.batches = [by_length[start : start + batch_size] for start in range(0, len(lengths), batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        batches = list(self.batches)
        random.shuffle(batches)
        return iter(batches)


class LitRNN(pl.LightningModule):
    def __init__(self, hidden: int = 6) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.Embedding(20, 5, padding_idx=0)
        self.rnn = nn.GRU(5, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 2)
        self.wrong: list[str] = []

    def forward(self, batch: dict[str, Any]) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embedding(batch["words"]), batch["lengths"].cpu(), batch_first=True, enforce_sorted=False
        )
        return self.head(self.rnn(packed)[1][-1])

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch), batch["labels"])
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(batch["ids"]))
        self.log("longest", batch["lengths"].max().float(), on_step=False, on_epoch=True, reduce_fx="max")
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        loss = F.cross_entropy(self(batch), batch["labels"])
        self.log("val_loss", loss, batch_size=len(batch["ids"]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


@program()
def rnn_over_buckets_of_sentences(make: Make) -> Seen:
    sentences = Sentences(41)
    model = LitRNN()
    trainer = make(max_epochs=2)
    train = DataLoader(sentences, batch_sampler=BucketSampler(sentences.lengths, 6), collate_fn=pad)
    val = DataLoader(Sentences(17), batch_size=5, collate_fn=pad)
    trainer.fit(model, train, val)
    return seen(trainer, model)


# Steps instead of epochs.


@program()
def steps_instead_of_epochs(make: Make) -> Seen:
    every = ModelCheckpoint(every_n_train_steps=4, save_top_k=-1, filename="{step}")
    model = LitClassifier()
    trainer = make(
        max_steps=17,
        val_check_interval=0.5,
        limit_train_batches=6,
        limit_val_batches=3,
        callbacks=[every],
        log_every_n_steps=1,
    )
    trainer.fit(model, DataLoader(clusters(60), batch_size=7, shuffle=True), DataLoader(clusters(31, seed=1), 4))
    return seen(trainer, model, kept=sorted(path.name for path in Path(every.dirpath).iterdir()))


# Reductions, and an autoencoder whose step returns a dictionary.


class LitAutoEncoder(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(8, 2), mlp(2, 8)
        self.epoch_losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        x, _ = batch
        error = ((self.decoder(self.encoder(x)) - x) ** 2).mean(1)
        self.log_dict({"worst": error.max(), "worst_again": error.max()}, on_epoch=True, reduce_fx="max")
        self.log("least", error.min(), on_step=False, on_epoch=True, reduce_fx=min)
        self.log("samples", float(len(x)), on_step=False, on_epoch=True, reduce_fx="sum")
        self.log("samples_synced", len(x), on_step=False, on_epoch=True, reduce_fx=torch.sum, sync_dist=True)
        self.log("train_loss", error.mean(), on_step=False, on_epoch=True, sync_dist=True)
        return {"loss": error.mean(), "error": error.detach()}

    def on_train_epoch_end(self) -> None:
        self.epoch_losses.append(float(self.trainer.callback_metrics["train_loss"]))
        self.log("best_so_far", min(self.epoch_losses))

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        error = ((self.decoder(self.encoder(x)) - x) ** 2).mean(1)
        self.log_dict({"val_worst": error.max()}, reduce_fx="max", on_step=True, on_epoch=True)
        self.log("val_least", error.min(), reduce_fx=torch.min)
        self.log("val_sum", error.sum(), reduce_fx=sum)
        self.log("val_loss", error.mean())
        self.log("val_loss_synced", error.mean(), sync_dist=True)
        return error.mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


@program()
def autoencoder_with_every_reduction(make: Make) -> Seen:
    model = LitAutoEncoder()
    trainer = make(max_epochs=3, enable_progress_bar=False)
    data = clusters(25)
    trainer.fit(model, DataLoader(clusters(47), batch_size=9, shuffle=True), DataLoader(data, batch_size=7))
    return seen(trainer, model)


# Callbacks.


@program()
def stochastic_weight_averaging(make: Make) -> Seen:
    model = LitClassifier()
    trainer = make(max_epochs=4, callbacks=[StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2)])
    trainer.fit(model, DataLoader(clusters(37), batch_size=6, shuffle=True), DataLoader(clusters(16, seed=1), 5))
    return seen(trainer, model)


class Diary(pl.Callback):
    """A user's own: collects, keeps an average of the weights, measures, and stops the training."""

    def __init__(self, stop_after: int) -> None:
        self.stop_after = stop_after
        self.losses: list[float] = []
        self.events: list[str] = []
        self.average: dict[str, Tensor] = {}
        self.accuracy = MulticlassAccuracy(3, average="micro")
        self.accuracies: list[Tensor] = []
        self.best: tuple[float, int] | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.events.append("fit")
        self.average = {name: weight.clone() for name, weight in pl_module.state_dict().items()}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for name, weight in pl_module.state_dict().items():
            self.average[name] = 0.9 * self.average[name] + 0.1 * weight

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.accuracy.update(pl_module(batch[0]), batch[1])

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        value = self.accuracy.compute()
        self.accuracy.reset()
        self.accuracies.append(value)
        self.log("diary_acc", value)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.losses.append(trainer.callback_metrics["train_loss_epoch"].item())
        self.events.append(f"epoch {trainer.current_epoch} at step {trainer.global_step}")
        score = trainer.callback_metrics["diary_acc"].item()
        if self.best is None or score > self.best[0]:
            self.best = (score, trainer.current_epoch)
        if len(self.losses) == self.stop_after:
            trainer.should_stop = True

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.events.append("end")

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses, "best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.losses, self.best = state_dict["losses"], state_dict["best"]


class LitBringsCallbacks(LitOneCycle):
    def configure_callbacks(self) -> Any:
        return [EarlyStopping("train_loss_epoch", patience=3), LearningRateMonitor()]


@program()
def callback_of_the_users_own_then_on_from_its_checkpoint(make: Make) -> Seen:
    diary, last = Diary(stop_after=2), ModelCheckpoint(save_last=True)
    model = LitBringsCallbacks()
    train = DataLoader(clusters(39), batch_size=7, shuffle=True)
    val = DataLoader(clusters(22, seed=1), batch_size=5)
    trainer = make(max_epochs=5, min_epochs=1, callbacks=[diary, last])
    trainer.fit(model, train, val)
    attributes = ("losses", "events", "average", "accuracies", "best")
    after = seen(trainer, model, diary={name: getattr(diary, name) for name in attributes})
    second = Diary(stop_after=4)
    again = make(max_epochs=5, callbacks=[second], name="again")
    model = LitBringsCallbacks()
    again.fit(model, train, val, ckpt_path=last.last_model_path)
    return after | {"again": seen(again, model, diary={name: getattr(second, name) for name in attributes})}


class Unfreeze(BaseFinetuning):
    """Lightning's own example: trains the head first, all of the net from epoch 1 on, and then the rest alone."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.05)
        if epoch == 2:
            pl_module.net[2].requires_grad_(False)


class LitHead(LitClassifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(filter(lambda weight: weight.requires_grad, self.parameters()), lr=0.1)


@program()
def finetuning_that_unfreezes_and_freezes(make: Make) -> Seen:
    model = LitHead()
    trainer = make(max_epochs=3, callbacks=[Unfreeze()])
    trainer.fit(model, DataLoader(clusters(41), batch_size=6, shuffle=True), DataLoader(clusters(14, seed=1), 4))
    return seen(trainer, model)


# Parameters that the loss does not depend on.


class LitUnused(LitClassifier):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        use_spare = self.training and self.global_step % 3 == 2
        return self.spare(x) if use_spare else self.net(x)


@program()
def parameters_used_only_now_and_then(make: Make) -> Seen:
    model = LitUnused()
    trainer = make(max_epochs=2, strategy="ddp_find_unused_parameters_true")
    trainer.fit(model, DataLoader(clusters(38), batch_size=7), DataLoader(clusters(13, seed=1), batch_size=5))
    return seen(trainer, model)


# Optimizers and precisions.


class LitLBFGS(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3)
        self.closures = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.linear(x), y) + 0.01 * self.linear.weight.square().sum()
        self.closures += 1
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        self.log("closures", float(self.closures), reduce_fx="max", on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.5, max_iter=4)


@program(rel=1e-9)
def lbfgs_in_double_precision(make: Make) -> Seen:
    model = LitLBFGS()
    trainer = make(max_epochs=2, precision="64-true")
    trainer.fit(model, DataLoader(clusters(31), batch_size=9))
    return seen(trainer, model)


# bfloat16 keeps 8 bits, and rounds the gradient of a share otherwise than that of a batch: by 2**-8 at each step.
@program(rel=2e-2)
def mixed_precision_over_the_first_batches_only(make: Make) -> Seen:
    model = LitClassifier()
    trainer = make(max_epochs=3, overfit_batches=2, precision="bf16-mixed", log_every_n_steps=1)
    trainer.fit(model, DataLoader(clusters(45), batch_size=7, shuffle=True), DataLoader(clusters(12, seed=1), 5))
    return seen(trainer, model)


# What each step logs decides on learning rates and checkpoints; the last batch is one sample, for two workers.


class LitByTheStep(LitClassifier):
    def __init__(self) -> None:
        super().__init__(lr=0.5)
        self.acc = MulticlassAccuracy(3, average="micro")
        self.several = MetricCollection([MulticlassAccuracy(3), MulticlassF1Score(3)])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.log("train_loss", loss)
        self.log("synced", loss, sync_dist=True, on_epoch=True)
        self.log("greatest", logits.max(), reduce_fx="max")
        self.log("sum", logits.sum(), reduce_fx="sum", on_epoch=True)
        if batch_idx % 3 == 0:
            self.log("sometimes", loss)
        self.acc(logits, y)
        self.log("acc", self.acc, on_step=False, on_epoch=True)
        self.several(logits, y)
        self.log_dict(self.several, on_step=False, on_epoch=True)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("afterwards", outputs["loss"], on_epoch=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.7, patience=0)
        how = {"scheduler": schedule, "monitor": "train_loss", "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": how}


@program()
def rates_and_checkpoints_by_the_step(make: Make) -> Seen:
    folder = make.keywords["default_root_dir"]  # type: ignore[attr-defined]
    name, rates, table = "{step}-{train_loss:.4f}", LearningRateMonitor(), CSVLogger(folder, name="table")
    after_validation = ModelCheckpoint(folder / "epochs", name, monitor="train_loss")
    every_third = ModelCheckpoint(folder / "steps", name, monitor="train_loss", every_n_train_steps=3, save_top_k=2)
    model = LitByTheStep()
    trainer = make(max_epochs=2, callbacks=[after_validation, every_third, rates], logger=table, log_every_n_steps=1)
    trainer.fit(model, DataLoader(clusters(29), batch_size=7), DataLoader(clusters(9, seed=1), batch_size=4))
    best = [(Path(each.best_model_path).name, each.best_model_score) for each in (after_validation, every_third)]
    return seen(trainer, model, best=best, rates=rates.lrs, table=csv_rows(table))


def run(name: str, folder: Path, make: Callable[..., Any]) -> Seen:
    """What a program sees with the Trainers that `make` makes."""
    pl.seed_everything(7, verbose=False)
    folder.mkdir()
    return PROGRAMS[name][0](partial(make, default_root_dir=folder))


def run_ours(name: str, folder: Path, num_workers: int) -> Seen:
    return run(name, folder, partial(Trainer, storage_path=str(folder), name="run", num_workers=num_workers))


def compare_two_workers_with_one_process(name: str, folder: Path) -> None:
    here = run_ours(name, folder / "here", num_workers=0)
    there = run_ours(name, folder / "there", num_workers=2)
    assert here["epoch and step"][1] > 0
    same(here, there, PROGRAMS[name][1], name)


@pytest.mark.parametrize("name", PROGRAMS)
def test_two_workers_give_what_one_process_gives(name: str, gloo: None, tmp_path: Path) -> None:
    compare_two_workers_with_one_process(name, tmp_path)


@pytest.mark.slow
def test_two_workers_of_ray_give_what_one_process_gives(cluster: None, tmp_path: Path) -> None:
    compare_two_workers_with_one_process("several_validation_loaders", tmp_path)


SHUFFLES_NOTHING = (
    "accumulating_by_hand",
    "several_validation_loaders",
    "parameters_used_only_now_and_then",
    "lbfgs_in_double_precision",
    "mixed_precision_over_the_first_batches_only",
    "rates_and_checkpoints_by_the_step",
)


@pytest.mark.parametrize("name", PROGRAMS)
def test_one_process_gives_what_lightning_gives(name: str, tmp_path: Path) -> None:
    """The same names and counts; the same numbers too where no order is drawn, which is done in a way of our own."""
    ours, theirs = run_ours(name, tmp_path / "ours", num_workers=0), run(name, tmp_path / "theirs", lightning)
    for what in ("weights", "callback_metrics", "logged_metrics", "progress_bar_metrics"):
        assert set(ours[what]) == set(theirs[what]), what
    assert ours["epoch and step"][1] > 0
    if "early_stopping" not in name:  # where it stops is up to the numbers
        assert ours["epoch and step"] == theirs["epoch and step"]
    if name in SHUFFLES_NOTHING:
        del ours["history"], theirs["history"]
        same(theirs, ours, 1e-6, name)


def test_weights_that_the_loss_does_not_reach_are_named_with_the_way_out(gloo: None, tmp_path: Path) -> None:
    trainer = Trainer(max_epochs=1, num_workers=2, storage_path=str(tmp_path), name="run")
    with pytest.raises(
        RequestError,
        match=r"The loss does not depend on spare\.weight, spare\.bias, .*'ddp_find_unused_parameters_true'\.$",
    ):
        trainer.fit(LitUnused(), DataLoader(clusters(38), batch_size=7))
    assert not (tmp_path / "run").exists()


class AnyOrder(Counting):
    """In an order that nobody seeds, and so another one on each worker."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        samples = [*super().__iter__()]
        return (samples[index] for index in np.random.default_rng().permutation(len(samples)))


def test_a_stream_that_nobody_seeds_is_refused_with_the_way_out(gloo: None, tmp_path: Path) -> None:
    trainer = Trainer(max_epochs=1, num_workers=2, storage_path=str(tmp_path), name="run")
    with pytest.raises(RequestError, match=r"different samples from the stream AnyOrder: .*sampler=False\.$"):
        trainer.fit(LitStream(), DataLoader(AnyOrder(43), batch_size=6))
    assert not (tmp_path / "run").exists()


class LitNormalised(LitClassifier):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.BatchNorm1d(8), self.net)


def test_a_shard_too_small_to_normalise_is_refused_with_the_way_out(gloo: None, tmp_path: Path) -> None:
    trainer = Trainer(max_epochs=1, num_workers=2, storage_path=str(tmp_path), name="run")
    with pytest.raises(RequestError) as refusal:
        trainer.fit(LitNormalised(), DataLoader(clusters(7), batch_size=4))  # the last batch: 2 samples and 1
    assert str(refusal.value) == (
        "Batch normalisation cannot train on one sample, which is what a batch left for one of 2 workers: use "
        "drop_last=True if it was the last batch, which is smaller, or a batch_size of at least 4."
    )
    assert not (tmp_path / "run").exists()
