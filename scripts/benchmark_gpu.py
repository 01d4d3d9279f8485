"""`scripts/benchmark gpu`: training on one GPU against a bare loop of PyTorch on it, in alternating runs.

Both have the samples on the GPU, gather each batch there, and use Adam in one kernel.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import accumulate
from typing import Any

import pytorch_lightning as pl
import torch
from benchmark_train import machine, spread
from torch import nn

from ray_mnist import ConvModel, MNISTDataModule, SimpleModel, Trainer

PRECISIONS = ("32-true", "bf16-mixed")
AIM = 0.99  # of the validation samples


def options_of(arguments: Sequence[str]) -> argparse.Namespace:
    """What is measured; `--quick` only shows that it can be, `--cpu` so too on a machine without a GPU."""
    parser = argparse.ArgumentParser(prog="scripts/benchmark gpu")
    parser.add_argument("--quick", action="store_true", help="everything once, on 1,797 digits: to see that it runs")
    parser.add_argument("--cpu", action="store_true", help="on the CPU: to see that it runs")
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--conv-epochs", type=int, default=5)
    parser.add_argument("--conv-batch-size", type=int, default=512)
    options = parser.parse_args(arguments)
    if options.quick:
        options.dataset, options.epochs, options.runs, options.conv_epochs = "digits", 2, 1, 2
        options.batch_size = options.conv_batch_size = 128
    return options


def now(options: argparse.Namespace) -> float:
    """The time in seconds, once all that the GPU was given to do is done."""
    if not options.cpu:
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock(pl.Callback):
    """Notes the samples a second of each epoch's training."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.rates: list[float] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        """Lightning's."""
        self.started = now(self.options)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Lightning's."""
        if trainer.is_last_batch:
            samples = (batch_idx + 1) * self.options.batch_size
            self.rates.append(samples / (now(self.options) - self.started))


def train(options: argparse.Namespace, model: pl.LightningModule, batch_size: int, **arguments: Any) -> Trainer:
    """A run of ours, in this process."""
    with tempfile.TemporaryDirectory(prefix="ray_mnist-") as folder:
        trainer = Trainer(use_gpu=not options.cpu, storage_path=folder, logger=False, **arguments)
        trainer.fit(model, MNISTDataModule(options.dataset, options.data_dir, batch_size))
    return trainer


def ours(options: argparse.Namespace, precision: str) -> float:
    """Samples a second; the first epoch warms up."""
    clock = Clock(options)
    train(options, SimpleModel(), options.batch_size, max_epochs=options.epochs, precision=precision, callbacks=[clock])
    return statistics.median(clock.rates[1:])


def bare(options: argparse.Namespace, precision: str) -> float:
    """As `ours`, of a loop over the same samples."""
    device = torch.device("cpu" if options.cpu else "cuda")
    datamodule = MNISTDataModule(options.dataset, options.data_dir)
    datamodule.setup("fit")
    images, labels = (part.to(device) for part in (datamodule.parts["train"].images, datamodule.parts["train"].labels))
    net, rates = SimpleModel().net.to(device), []
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=not options.cpu or None)
    cast = torch.autocast(device.type, torch.bfloat16) if precision == "bf16-mixed" else nullcontext()
    batches = len(labels) // options.batch_size
    for _ in range(options.epochs):
        started = now(options)
        order = torch.randperm(len(labels), device=device)
        for rows in order[: batches * options.batch_size].split(options.batch_size):
            optimizer.zero_grad()
            with cast:
                logits = net(images.index_select(0, rows).float().div(255))
                loss = nn.functional.cross_entropy(logits, labels.index_select(0, rows))
            loss.backward()
            optimizer.step()
        rates.append(batches * options.batch_size / (now(options) - started))
    return statistics.median(rates[1:])


def seconds_to_aim(options: argparse.Namespace) -> float | None:
    """Of training ConvModel, without its validations, until the first that finds AIM; None if none does."""
    limits: dict[str, Any] = {"max_epochs": options.conv_epochs, "precision": "bf16-mixed"}
    model = ConvModel(input_shape=MNISTDataModule(options.dataset).input_shape)
    trainer = train(options, model, options.conv_batch_size, **limits)
    rows, samples = trainer.result.history, trainer.result.values["train_samples"]
    trained = accumulate(samples / row["samples_per_second"] for row in rows)
    return next((seconds for seconds, row in zip(trained, rows, strict=True) if row["val_accuracy"] >= AIM), None)


def gpu(arguments: Sequence[str]) -> None:
    """Measures, and prints the table and the JSON."""
    options = options_of(arguments)
    if not options.cpu and not torch.cuda.is_available():
        print("skipped: torch finds no GPU on this machine")
        return
    contenders: dict[str, Callable[[argparse.Namespace, str], float]] = {"ours": ours, "bare": bare}
    found: dict[str, dict[str, list[float]]] = {precision: {"ours": [], "bare": []} for precision in PRECISIONS}
    for _ in range(options.runs):
        for precision, rates in found.items():
            for name, measure in contenders.items():
                rates[name].append(measure(options, precision))
                print(f"{precision} {name}: {rates[name][-1]:,.0f} samples/s", file=sys.stderr)
    conv = [seconds_to_aim(options) for _ in range(options.runs + 1)][1:]  # the first warms up
    where = machine() | {"device": "cpu" if options.cpu else torch.cuda.get_device_name(0)}
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    print(
        f"{options.dataset}, median of {options.runs} (least to most). {where['date']}: {where['device']}; {versions}."
    )
    print(f"\n| SimpleModel, batch {options.batch_size:,} | ray_mnist, samples/s | bare PyTorch, samples/s | ratio |")
    print("| --- | --- | --- | --- |")
    for precision, rates in found.items():
        ratio = [mine / theirs for mine, theirs in zip(rates["ours"], rates["bare"], strict=True)]
        print(f"| {precision} | {spread(rates['ours'])} | {spread(rates['bare'])} | {spread(ratio, 2)} |")
    reached = [seconds for seconds in conv if seconds is not None]
    there = f"{spread(reached, 2)} s" if reached else "not reached"
    print(f"\nConvModel, bf16-mixed, batch {options.conv_batch_size}, trained to {AIM:.0%} of the validation: {there}.")
    print("\n" + json.dumps({"machine": where, "options": vars(options), "samples_per_second": found, "conv": conv}))
