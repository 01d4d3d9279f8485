"""`scripts/benchmark tune`: what a trial of a sweep costs beyond its training, ours and stock."""

import os
import tempfile
import time

import pytorch_lightning as pl
import ray
import ray.train
import ray.tune
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

import ray_mnist
from ray_mnist import MNISTDataModule, SimpleModel

TRIALS, EPOCHS = 5, 2
RATES = [0.001 * (1 + trial) for trial in range(TRIALS)]


def train(config: dict[str, float]) -> None:
    """The training of one trial, as Ray's documentation has it in each worker."""
    trainer = pl.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    trainer.fit(SimpleModel(lr=config["lr"]), MNISTDataModule("digits"))
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    ray.train.report(metrics)


def trial(config: dict[str, float]) -> None:
    """A trial of the stock pattern: a function that starts a TorchTrainer."""
    TorchTrainer(
        train,
        train_loop_config=config,
        scaling_config=ray.train.ScalingConfig(num_workers=1),
        run_config=ray.train.RunConfig(callbacks=[TuneReportCallback()]),
    ).fit()


def stock(folder: str) -> float:
    """Seconds of a sweep of the stock pattern, one trial at a time."""
    started = time.monotonic()
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(trial, {"CPU": 0.01}),
        param_space={"lr": ray.tune.grid_search(RATES)},
        tune_config=ray.tune.TuneConfig(metric="val_loss", mode="min", max_concurrent_trials=1),
        run_config=ray.tune.RunConfig(storage_path=folder, name="stock", verbose=0),
    )
    errors = tuner.fit().errors
    assert not errors, errors[0]
    return time.monotonic() - started


def ours(folder: str) -> float:
    """Seconds of the same sweep, ours, with its test of the winner and its pictures."""
    started = time.monotonic()
    ray_mnist.tune(
        SimpleModel,
        MNISTDataModule,
        {"model.lr": RATES},
        data={"dataset": "digits"},
        search="grid",
        scheduler="fifo",
        max_concurrent=1,
        max_epochs=EPOCHS,
        storage_path=folder,
        name="ours",
    )
    return time.monotonic() - started


def training() -> float:
    """Seconds that the trainings alone take, one after the other in this process."""
    started = time.monotonic()
    for rate in RATES:
        trainer = pl.Trainer(
            max_epochs=EPOCHS, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False
        )
        trainer.fit(SimpleModel(lr=rate), MNISTDataModule("digits"))
    return time.monotonic() - started


def tune() -> None:
    """Prints seconds a trial beyond its training, for both, and their ratio."""
    with tempfile.TemporaryDirectory(prefix="ray_mnist-") as folder:
        ray.init(num_cpus=max(4, os.cpu_count() or 1), log_to_driver=False, logging_level="ERROR")
        alone = training()
        beyond = {name: (sweep(folder) - alone) / TRIALS for name, sweep in (("ours", ours), ("stock", stock))}
    print(f"{TRIALS} trials of {EPOCHS} epochs, alone {alone / TRIALS:.2f} s each; beyond that, seconds a trial:")
    ratio = beyond["stock"] / beyond["ours"]
    print(f"ours {beyond['ours']:.2f}   stock {beyond['stock']:.2f}   stock / ours {ratio:.1f}")
