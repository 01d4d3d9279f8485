"""One program for each argument of Lightning's Trainer, or for several that belong together."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.profilers import SimpleProfiler
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from conformance.harness import Make, Net, Seen, data, files, loader, program, raised, seen, val_loader


def fitted(make: Make, model: Any = None, train: Any = None, val: Any = None, **arguments: Any) -> Seen:
    """What can be seen after a fit of two epochs."""
    model = model or Net()
    trainer = make(**{"max_epochs": 2} | arguments)
    trainer.fit(model, train or loader(), val or val_loader())
    return seen(trainer, model, notes=getattr(model, "notes", None))


class Noting(Net):
    """Notes at which step it validated, and what it was like there."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[Any] = []

    def on_validation_start(self) -> None:
        self.notes.append(("validates", self.trainer.sanity_checking, self.global_step))

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        super().validation_step(batch, batch_idx)
        self.notes.append((batch_idx, torch.is_inference_mode_enabled(), torch.is_grad_enabled()))


@program("`max_steps`, `min_epochs`, `min_steps`")
def steps(make: Make, folder: Path) -> Seen:
    class Stops(Net):
        def on_train_epoch_end(self) -> None:
            self.trainer.should_stop = True

    found = {"max_steps": fitted(make, max_steps=5, max_epochs=-1)}
    found["min_epochs"] = fitted(make, Stops(), max_epochs=4, min_epochs=3)
    found["min_steps"] = fitted(make, Stops(), max_epochs=4, min_steps=12)
    return found


@program("`max_time`, already over")
def max_time(make: Make, folder: Path) -> Seen:
    return fitted(make, max_time=timedelta(0))


@program("`limit_train_batches`, `limit_val_batches` as numbers and shares")
def limits_of_fit(make: Make, folder: Path) -> Seen:
    return {
        "numbers": fitted(make, Noting(), limit_train_batches=3, limit_val_batches=2),
        "shares": fitted(make, Noting(), limit_train_batches=0.5, limit_val_batches=0.34),
    }


@program("`limit_val_batches`, `limit_test_batches`, `limit_predict_batches`, `inference_mode` without a fit")
def limits_of_evaluation(make: Make, folder: Path) -> Seen:
    model = Noting()
    trainer = make(limit_val_batches=2, limit_test_batches=0.5, limit_predict_batches=3, inference_mode=False)
    return {
        "validate": trainer.validate(model, val_loader(), verbose=False),
        "notes": list(model.notes),
        "test": trainer.test(model, loader(40), verbose=False),
        "predict": trainer.predict(model, loader(40)),
    }


@program("`overfit_batches`")
def overfit_batches(make: Make, folder: Path) -> Seen:
    return fitted(make, Noting(), overfit_batches=2)


@program("`fast_dev_run`")
def fast_dev_run(make: Make, folder: Path) -> Seen:
    return fitted(make, Noting(), fast_dev_run=2) | {"files": files(folder)}


@program("`val_check_interval`, `check_val_every_n_epoch`")
def validation_intervals(make: Make, folder: Path) -> Seen:
    return {
        "share": fitted(make, Noting(), val_check_interval=0.25),
        "across epochs": fitted(make, Noting(), val_check_interval=11, check_val_every_n_epoch=None),
        "time": fitted(make, Noting(), val_check_interval=timedelta(0)),
        "every second epoch": fitted(make, Noting(), max_epochs=3, check_val_every_n_epoch=2),
    }


class Settings(Noting):
    """Notes torch's settings, too."""

    def on_train_start(self) -> None:
        how = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        self.notes.append((*how, torch.backends.cudnn.benchmark))


@program("`num_sanity_val_steps`")
def sanity_checking(make: Make, folder: Path) -> Seen:
    return fitted(make, Noting(), num_sanity_val_steps=2)


@program("`accumulate_grad_batches`, with a rest")
def accumulation(make: Make, folder: Path) -> Seen:
    return fitted(make, accumulate_grad_batches=3)


@program("`gradient_clip_val`, `gradient_clip_algorithm`")
def clipping(make: Make, folder: Path) -> Seen:
    return {how: fitted(make, gradient_clip_val=0.1, gradient_clip_algorithm=how) for how in ("norm", "value")}


# Half the bits round a share's gradient otherwise than the whole batch's.
@program("`precision`", rel=3e-2)
def precisions(make: Make, folder: Path) -> Seen:
    return {how: fitted(make, precision=how) for how in ("64-true", "bf16-true")}


@program("`log_every_n_steps`, `enable_autolog_hparams`")
def logging_intervals(make: Make, folder: Path) -> Seen:
    found = {}
    for every, hparams in ((3, True), (5, False)):
        logger = CSVLogger(folder, name=f"every_{every}")
        fitted(make, logger=logger, log_every_n_steps=every, enable_autolog_hparams=hparams)
        found[f"every {every}"] = Path(logger.log_dir, "metrics.csv").read_text().splitlines()[0]
        found[f"rows of {every}"] = len(Path(logger.log_dir, "metrics.csv").read_text().splitlines())
    return found | {"hparams": [path.read_text() for path in sorted(folder.rglob("hparams.yaml"))]}


class Reloads(Net):
    """Brings its loaders, other ones in each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[int] = []

    def train_dataloader(self) -> Any:
        self.notes.append(self.current_epoch)
        return loader(seed=self.current_epoch)

    def val_dataloader(self) -> Any:
        return loader(24, seed=10 + self.current_epoch)


@program("`reload_dataloaders_every_n_epochs`")
def reloading(make: Make, folder: Path) -> Seen:
    model = Reloads()
    trainer = make(max_epochs=3, reload_dataloaders_every_n_epochs=2)
    trainer.fit(model)
    return seen(trainer, model, reloads=model.notes)


class NaNs(Net):
    def loss(self, batch: Any) -> Any:
        return (self(batch[0]) * 0).sqrt().sum()


@program(
    "`detect_anomaly`",
    differs_on_workers={"raises": "an error in a worker is a TrainingError, which has the worker's traceback"},
)
def detect_anomaly(make: Make, folder: Path) -> Seen:
    return {"raises": raised(lambda: fitted(make, NaNs(), detect_anomaly=True))}


class CountingIO(TorchCheckpointIO):
    """A plugin: writes checkpoints with a note in them."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint | {"note": "by the plugin"}, path, storage_options)


@program("`plugins`: an IO of checkpoints")
def plugins(make: Make, folder: Path) -> Seen:
    kept = ModelCheckpoint(folder / "kept")
    found = fitted(make, plugins=[CountingIO()], callbacks=[kept])
    note = torch.load(kept.best_model_path, weights_only=False)["note"]
    return found | {"files": files(folder / "kept"), "note": note}


class Normalised(Net):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


@program(
    "batch normalisation; `sync_batchnorm` has one over the whole batch on GPUs",
    differs_on_workers=dict.fromkeys(
        ("weights", "metrics"), "each worker normalises its share of the batch, as under Lightning's DDP"
    ),
)
def batch_normalisation(make: Make, folder: Path) -> Seen:
    return fitted(make, Normalised())


class SharesItself(Net):
    def train_dataloader(self) -> Any:
        ranks = self.trainer.world_size
        sampler = DistributedSampler(data(), ranks, self.trainer.global_rank, shuffle=False)
        return DataLoader(data(), batch_size=8 // ranks, sampler=sampler)


@program("`use_distributed_sampler=False`, with a DistributedSampler of the program's own")
def own_sampler(make: Make, folder: Path) -> Seen:
    model = SharesItself()
    trainer = make(max_epochs=2, use_distributed_sampler=False)
    trainer.fit(model)
    return seen(trainer, model)


@program("`deterministic`")
def deterministic(make: Make, folder: Path) -> Seen:
    try:
        return fitted(make, Settings(), deterministic="warn")
    finally:
        torch.use_deterministic_algorithms(False)


@program("`benchmark`, `enable_checkpointing`, `sync_batchnorm` of a net without, `model_registry`")
def other_arguments(make: Make, folder: Path) -> Seen:
    before = torch.backends.cudnn.benchmark
    try:
        found = fitted(
            make,
            Settings(),
            benchmark=True,
            sync_batchnorm=True,
            model_registry="name:version",
            enable_checkpointing=False,
        )
    finally:
        torch.backends.cudnn.benchmark = before
    return found | {"files": files(folder)}


@program(
    "`profiler`",
    differs_on_workers={"files": "one file a worker, with its rank, as under Lightning's DDP"},
)
def profilers(make: Make, folder: Path) -> Seen:
    found = fitted(make, profiler=SimpleProfiler(folder, "simple"))
    fitted(make, profiler="advanced")
    return found | {"files": [name for name in files(folder) if "simple" in name]}
