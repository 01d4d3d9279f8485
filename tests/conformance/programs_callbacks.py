"""One program for each callback of Lightning's."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.callbacks import (
    BackboneFinetuning,
    BasePredictionWriter,
    BatchSizeFinder,
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    RichModelSummary,
    RichProgressBar,
    StochasticWeightAveraging,
    ThroughputMonitor,
    Timer,
    TQDMProgressBar,
    WeightAveraging,
)
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.tuner import Tuner
from torch import nn

from conformance.harness import (
    Make,
    Net,
    Seen,
    files,
    loader,
    program,
    raised,
    seen,
    val_loader,
)

FINDERS = "refused: they try values out in trainings of their own, on one device; `ray_mnist.tune` searches"


def fitted(make: Make, *callbacks: Any, model: Any = None, **arguments: Any) -> Seen:
    """What can be seen after a fit of three epochs with these callbacks."""
    model = model or Net()
    trainer = make(**{"max_epochs": 3} | arguments, callbacks=list(callbacks))
    trainer.fit(model, loader(), val_loader())
    return seen(trainer, model)


KEPT = {
    "nothing said": {},
    "monitor": {"monitor": "val_loss", "filename": "{epoch}-{step}-{val_loss:.3f}"},
    "max": {"monitor": "val_loss", "mode": "max", "save_top_k": 2, "filename": "{epoch}"},
    "all": {"save_top_k": -1, "every_n_epochs": 2, "filename": "{epoch:02d}"},
    "none": {"save_top_k": 0, "monitor": "train_loss_epoch"},
    "last": {"save_last": True, "monitor": "val_loss", "every_n_epochs": 2},
    "link": {"save_last": "link", "save_top_k": -1, "every_n_epochs": 3},
    "steps": {"every_n_train_steps": 5, "save_top_k": -1, "filename": "{step}"},
    "top steps": {"every_n_train_steps": 4, "monitor": "train_loss", "save_top_k": 2, "filename": "{step}"},
    "time": {"train_time_interval": timedelta(0), "save_top_k": -1, "filename": "{step}"},
    "train end": {"save_on_train_epoch_end": True, "monitor": "train_loss", "filename": "{epoch}"},
    "weights": {"save_weights_only": True, "monitor": "train_loss_step", "auto_insert_metric_name": False},
}


@program("ModelCheckpoint in all modes: files, best, last, scores")
def model_checkpoints(make: Make, folder: Path) -> Seen:
    kept = {name: ModelCheckpoint(folder / name, **how) for name, how in KEPT.items()}
    found = fitted(make, *kept.values())
    for name, callback in kept.items():
        paths = [Path(path).name for path in (callback.best_model_path, callback.last_model_path)]
        scores = callback.best_model_score, callback.current_score, sorted(map(float, callback.best_k_models.values()))
        found[name] = paths, scores, files(folder / name)
    return found


@program(
    "what is in ModelCheckpoint's file",
    differs={
        "beside": "what a run needs to go on inside an epoch is beside the program's own",
        "loops": "each loader's batch size and seed are kept, which a resumed run compares",
    },
)
def checkpoint_contents(make: Make, folder: Path) -> Seen:
    kept = ModelCheckpoint(folder / "kept")
    fitted(make, kept, EarlyStopping("val_loss"))
    content = torch.load(kept.best_model_path, weights_only=False)
    callbacks, progress = content.pop("callbacks"), content.pop("loops")
    of_program = {name: state for name, state in callbacks.items() if name.startswith("EarlyStopping")}
    beside = "ray_mnist_epoch_so_far" in content, "Recorder" in callbacks
    content.pop("ray_mnist_epoch_so_far", None)
    return content | {"early stopping": of_program, "loops": progress, "beside": beside}


@program("EarlyStopping in both modes, with thresholds, at the end of the training epoch or of validation")
def early_stopping(make: Make, folder: Path) -> Seen:
    stops = [
        EarlyStopping("val_loss", patience=1, min_delta=0.2),
        EarlyStopping("train_loss", mode="max", patience=2, check_on_train_epoch_end=True),
        EarlyStopping("train_loss_epoch", patience=9, stopping_threshold=0.1),
        EarlyStopping("val_loss", mode="max", patience=8, divergence_threshold=-50.0, check_finite=False),
    ]
    found = fitted(make, *stops, max_epochs=9)
    found["state"] = [(each.stopped_epoch, each.wait_count, each.best_score) for each in stops]
    return found


class Scheduled(Net):
    """Two schedules: by the step and by the epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer, schedule in zip(self.optimizers(), self.lr_schedulers(), strict=True):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()
            self.untoggle_optimizer(optimizer)
            schedule.step()
            self.log("train_loss", loss, on_step=True, on_epoch=True)

    def configure_optimizers(self) -> Any:
        both = [
            torch.optim.SGD([self.layer.weight], lr=0.1, momentum=0.9),
            torch.optim.AdamW([self.layer.bias], lr=0.01),
        ]
        return both, [torch.optim.lr_scheduler.ExponentialLR(each, 0.9) for each in both]


@program("manual optimization with two optimizers and schedules; LearningRateMonitor")
def manual_optimization(make: Make, folder: Path) -> Seen:
    rates = LearningRateMonitor("step", log_momentum=True, log_weight_decay=True)
    logger = CSVLogger(folder, name="", version="")
    unused = "ddp_find_unused_parameters_true"  # each optimizer has a part of the weights
    found = fitted(make, rates, model=Scheduled(), logger=logger, log_every_n_steps=1, strategy=unused)
    return found | {"rates": rates.lrs, "table": (folder / "metrics.csv").read_text().splitlines()[0]}


class Decays(Net):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


@program("a schedule that follows validation; LearningRateMonitor by the epoch")
def plateau(make: Make, folder: Path) -> Seen:
    rates = LearningRateMonitor("epoch")
    logger = CSVLogger(folder, name="", version="")
    return fitted(make, rates, model=Decays(), logger=logger) | {"rates": rates.lrs}


@program("StochasticWeightAveraging")
def stochastic_weight_averaging(make: Make, folder: Path) -> Seen:
    return fitted(make, StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1))


@program("WeightAveraging, EMAWeightAveraging, with what ModelCheckpoint saves of them")
def weight_averaging(make: Make, folder: Path) -> Seen:
    found = {}
    for name, callback in (("mean", WeightAveraging()), ("moving", EMAWeightAveraging(decay=0.8))):
        kept = ModelCheckpoint(folder / name)
        found[name] = fitted(make, callback, kept)
        found[f"{name} saved"] = torch.load(kept.best_model_path, weights_only=False)["state_dict"]
    return found


def collecting(bar: type[Any]) -> type[Any]:
    """Notes what the bar shows after each batch."""

    def on_train_batch_end(self: Any, trainer: Any, model: Any, *arguments: Any) -> None:
        bar.on_train_batch_end(self, trainer, model, *arguments)
        shown = {name: value for name, value in self.get_metrics(trainer, model).items() if name != "v_num"}
        vars(self).setdefault("shown", []).append((self.total_train_batches, shown))

    return type(bar.__name__, (bar,), {"on_train_batch_end": on_train_batch_end})


@program(
    "RichProgressBar, TQDMProgressBar, RichModelSummary",
    differs_on_workers={"values": "inside an epoch a bar shows worker 0's share of a step, as under Lightning's DDP"},
)
def progress_bars(make: Make, folder: Path) -> Seen:
    shown = []
    for kind in (RichProgressBar, TQDMProgressBar):
        bar = collecting(kind)()
        fitted(make, bar, RichModelSummary(), enable_progress_bar=True)
        shown.append(bar.shown)
    return {"names": [[(total, sorted(values)) for total, values in each] for each in shown], "values": shown}


@program("GradientAccumulationScheduler, LambdaCallback, Timer")
def small_callbacks(make: Make, folder: Path) -> Seen:
    counted = LambdaCallback(on_train_epoch_end=lambda trainer, model: model.log("of_lambda", float(model.global_step)))
    return fitted(make, GradientAccumulationScheduler({0: 1, 1: 3}), counted, Timer("00:01:00:00"))


class Backbone(Net):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = self.layer
        self.layer = nn.Sequential(self.backbone, nn.Tanh(), nn.Linear(3, 3, bias=False))
        nn.init.eye_(self.layer[2].weight)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(filter(lambda weight: weight.requires_grad, self.parameters()), lr=0.1)


@program("BackboneFinetuning")
def finetuning(make: Make, folder: Path) -> Seen:
    return fitted(make, BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False), model=Backbone())


@program("ModelPruning")
def pruning(make: Make, folder: Path) -> Seen:
    return fitted(make, ModelPruning("l1_unstructured", amount=0.2))


@program("DeviceStatsMonitor, ThroughputMonitor: what they log")
def monitors(make: Make, folder: Path) -> Seen:
    logger = CSVLogger(folder, name="", version="")
    throughput = ThroughputMonitor(batch_size_fn=lambda batch: len(batch[0]))
    fitted(make, DeviceStatsMonitor(cpu_stats=False), throughput, logger=logger, log_every_n_steps=2)
    return {"columns": sorted((folder / "metrics.csv").read_text().splitlines()[0].split(","))}


class Writer(BasePredictionWriter):
    """One file a batch."""

    def __init__(self, folder: Path) -> None:
        super().__init__("batch")
        self.folder = folder

    def write_on_batch_end(self, trainer: Any, model: Any, prediction: Any, indices: Any, *_: Any) -> None:
        torch.save((indices, prediction), self.folder / f"{indices[0]}.pt")


@program("BasePredictionWriter, by the batch")
def prediction_writer(make: Make, folder: Path) -> Seen:
    make(callbacks=[Writer(folder)]).predict(Net(), loader(40), return_predictions=False)
    return {path.name: torch.load(path) for path in sorted(folder.glob("*.pt"))}


class Fails(Net):
    def on_train_epoch_end(self) -> None:
        raise ValueError("no more")


@program(
    "OnExceptionCheckpoint",
    differs_on_workers={"raises": "an error in a worker is a TrainingError, which has the worker's traceback"},
)
def exception_checkpoint(make: Make, folder: Path) -> Seen:
    callback = OnExceptionCheckpoint(folder, "failed")
    return {"raises": raised(lambda: fitted(make, callback, model=Fails())), "files": files(folder)}


@program("LearningRateFinder, BatchSizeFinder, Tuner", differs={"raises": FINDERS})
def finders(make: Make, folder: Path) -> Seen:
    def tuned(trainer: Any) -> None:
        Tuner(trainer).lr_find(Net(), loader(), num_training=3)

    def scaled(trainer: Any) -> None:
        Tuner(trainer).scale_batch_size(Net(), loader(), max_trials=1)

    return {
        "raises": [
            raised(lambda: fitted(make, LearningRateFinder(num_training_steps=3))),
            raised(lambda: make(callbacks=BatchSizeFinder())),
            raised(lambda: tuned(make(max_epochs=1))),
            raised(lambda: scaled(make(max_epochs=1))),
        ]
    }
