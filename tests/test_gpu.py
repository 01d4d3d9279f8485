"""What only a GPU can show; `scripts/test --gpu` runs it. On a machine without one, that part is run that a CPU can do.

The CPU's part shows that the tests themselves are right, and that is all: this file is about the GPU.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from ranks import on_ranks
from test_fsdp import Net
from test_fsdp import loader as sums
from torch import nn

from ray_mnist import ConvModel, MNISTDataModule, SimpleModel, Trainer, TrainingError
from ray_mnist.launch.keeping import KEEPER
from ray_mnist.launch.local import LocalContext
from ray_mnist.run.folder import CHECKPOINT, RunFolder, checkpoint_name
from ray_mnist.worker import Job, run

# Read once, as CUDA's library for matrices is used first.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

GPUS = torch.cuda.device_count()
NO_GPU = "torch finds no GPU on this machine"
on_gpu = pytest.mark.skipif(not GPUS, reason=NO_GPU)
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

STEPS = 17  # of an epoch of the digits, 1,151 samples in batches of 64


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.slow), pytest.param("gpu", marks=on_gpu)])
def use_gpu(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "gpu")


def fit(folder: Path, name: str, model: Callable[[], pl.LightningModule] = SimpleModel, **options: Any) -> Trainer:
    """A run over the digits from the same start."""
    pl.seed_everything(3, verbose=False)
    trainer = Trainer(**{"max_epochs": 2, "logger": False, "storage_path": str(folder), "name": name} | options)
    trainer.fit(model(), MNISTDataModule("digits"))
    return trainer


def checkpoint(folder: Path, name: str, step: int) -> dict[str, Any]:
    file = folder / name / checkpoint_name(step) / CHECKPOINT
    loaded: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return loaded


@on_gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_each_precision_trains(precision: str, tmp_path: Path) -> None:
    trainer = fit(tmp_path, "run", ConvModel, use_gpu=True, precision=precision, max_epochs=3)
    assert trainer.result.values["device"] == torch.cuda.get_device_name(0)
    assert trainer.result.values["test_accuracy"] > 0.6
    saved = checkpoint(tmp_path, "run", 3 * STEPS)
    (group,) = saved["optimizer_states"][0]["param_groups"]
    assert group["fused"]
    scale = saved.get("MixedPrecision", {}).get("scale", 0)
    assert math.isfinite(scale)
    assert (scale > 0) == (precision == "16-mixed")


def test_a_gradient_that_is_clipped_is_not_left_to_one_kernel(use_gpu: bool, tmp_path: Path) -> None:
    """Lightning refuses to clip for an optimizer that can unscale gradients itself, as a fused one does."""
    trainer = fit(tmp_path, "run", use_gpu=use_gpu, precision="bf16-mixed", gradient_clip_val=1.0)
    assert trainer.result.values["steps"] == 2 * STEPS


def test_totals_and_predictions_are_those_of_the_cpu(use_gpu: bool, tmp_path: Path) -> None:
    cpu, other = fit(tmp_path, "cpu"), fit(tmp_path, "run", use_gpu=use_gpu)
    for theirs, mine in zip(cpu.result.history, other.result.history, strict=True):
        for key in ("train_loss", "val_loss"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-3)
        assert mine["val_accuracy"] == pytest.approx(theirs["val_accuracy"], abs=2 / 287)
    for key in ("train_samples", "val_samples", "test_samples", "steps"):
        assert other.result.values[key] == cpu.result.values[key]

    model, options = SimpleModel(), {"storage_path": str(tmp_path), "logger": False}
    found = []
    for gpu in (False, use_gpu):
        trainer, data = Trainer(use_gpu=gpu, **options), MNISTDataModule("digits")
        (totals,) = trainer.validate(model, datamodule=data, verbose=False)
        found.append((totals, trainer.predict(model, datamodule=data)))
    (theirs, on_cpu), (mine, predicted) = found
    assert mine["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-5)
    assert mine["val_accuracy"] == theirs["val_accuracy"]
    for expected, batch in zip(on_cpu, predicted, strict=True):
        assert batch.device.type == "cpu"
        torch.testing.assert_close(batch, expected, rtol=1e-4, atol=1e-5)


class Fails(pl.Callback):
    """Inside the second epoch."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == STEPS + 8:
            raise InterruptedError


class Dropping(SimpleModel):
    """Draws on the device in each step."""

    def make_net(self, *shape: int) -> nn.Module:
        return nn.Sequential(super().make_net(*shape), nn.Dropout(0.2))


def test_a_resumed_run_ends_in_the_same_bits(use_gpu: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"use_gpu": use_gpu, "deterministic": True, "checkpoint_every_n_steps": 5}
    try:
        fit(tmp_path, "whole", Dropping, **options)
        with pytest.raises(InterruptedError):
            fit(tmp_path, "run", Dropping, callbacks=[Fails()], **options)
        assert RunFolder(str(tmp_path), "run").checkpoints()[0] == checkpoint_name(STEPS + 3)  # every fifth step: 20
        fit(tmp_path, "run", Dropping, resume=True, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    whole, resumed = (checkpoint(tmp_path, name, 2 * STEPS) for name in ("whole", "run"))
    torch.testing.assert_close(resumed["state_dict"], whole["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(resumed["optimizer_states"], whole["optimizer_states"], rtol=0, atol=0)


class Greedy(SimpleModel):
    """Wants more memory than any GPU has."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.device.type == "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 PiB. Of the allocated memory 3 MiB")
        torch.empty(2**50, dtype=torch.uint8, device=self.device)


def test_a_gpu_without_enough_memory_ends_the_run_in_one_sentence(use_gpu: bool, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"CUDA out of memory\. Tried to allocate .+: use a smaller --batch") as end:
        fit(tmp_path, "run", Greedy, use_gpu=use_gpu)
    assert "\n" not in str(end.value)
    assert "Of the allocated" not in str(end.value)


class NoWaiting(pl.Callback):
    """Has CUDA raise where anything waits for it, from an epoch's third step to the end of its last."""

    steps = 0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:  # DDP has arranged its buckets by then
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.steps += 1
        if trainer.is_last_batch:
            torch.cuda.set_sync_debug_mode("default")

    def on_exception(self, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("model_class", [SimpleModel, ConvModel])
def test_nothing_waits_for_the_gpu_inside_an_epoch(model_class: Any, precision: str, tmp_path: Path) -> None:
    """Of what `tests/test_waits.py` cannot see: copies to the device, and what CUDA's own kernels do."""
    waits = NoWaiting()
    pl.seed_everything(3, verbose=False)
    trainer = Trainer(use_gpu=True, max_epochs=2, precision=precision, callbacks=[waits], storage_path=str(tmp_path))
    trainer.fit(model_class(), MNISTDataModule("digits", batch_size=8))
    assert waits.steps == 2 * (1151 // 8)


# Several workers


class OneOfTwo(LightningEnvironment):
    """A rank of a process group that is there, on the first GPU of its machine."""

    creates_processes_externally = True

    def global_rank(self) -> int:
        return torch.distributed.get_rank()

    def node_rank(self) -> int:
        return torch.distributed.get_rank()

    def world_size(self) -> int:
        return torch.distributed.get_world_size()

    def set_global_rank(self, rank: int) -> None: ...

    def set_world_size(self, size: int) -> None: ...


class Shares(LocalContext):
    """A `WorkerContext`: one of two processes on one device."""

    def trainer_arguments(self) -> dict[str, Any]:
        strategy = DDPStrategy(process_group_backend="gloo")
        return super().trainer_arguments() | {"strategy": strategy, "num_nodes": 2, "plugins": [OneOfTwo()]}


def test_two_processes_share_a_gpu_over_gloo(use_gpu: bool, tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        pl.seed_everything(3, verbose=False)
        arguments: dict[str, Any] = {"logger": False, "callbacks": [], "max_epochs": 2}
        data = {"datamodule": MNISTDataModule("digits")}
        job = Job("fit", SimpleModel(), data, str(tmp_path), "two", 3, lightning=arguments)
        outcome = run(job, Shares(job, use_gpu, lambda event: None))
        return outcome.history, outcome.num_workers, outcome.test_metrics

    alone, found = fit(tmp_path, "one", use_gpu=use_gpu), on_ranks(work)
    for rows, workers, tested in found:
        assert workers == 2
        assert [row["train_loss"] for row in rows] == pytest.approx(
            [row["train_loss"] for row in alone.result.history], rel=1e-4
        )
        assert tested[0]["test_accuracy"] == pytest.approx(alone.result.values["test_accuracy"], abs=2 / 359)


# On Ray: a process group over NCCL, of as many workers as there are GPUs

SEVERAL = [
    pytest.param(1, marks=on_gpu, id="1 worker"),
    pytest.param(2, marks=pytest.mark.skipif(GPUS < 2, reason=f"needs two GPUs, and there are {GPUS}"), id="2 workers"),
]


class Tells(pl.Callback):
    """Notes over what the gradients go."""

    backend = ""

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.backend = torch.distributed.get_backend_config()
        assert trainer.strategy.root_device == torch.device("cuda", trainer.local_rank)
        assert next(pl_module.parameters()).is_cuda


@pytest.mark.parametrize("num_workers", SEVERAL)
def test_workers_with_a_gpu_each_exchange_gradients_over_nccl(num_workers: int, tmp_path: Path) -> None:
    alone, tells = fit(tmp_path, "one", use_gpu=True), Tells()
    try:
        options: dict[str, Any] = {"use_gpu": True, "num_workers": num_workers, "max_failures": 0}
        trainer = fit(tmp_path, "ray", callbacks=[tells, NoWaiting()], **options)
        assert tells.backend == "cpu:gloo,cuda:nccl"
        for theirs, mine in zip(alone.result.history, trainer.result.history, strict=True):
            assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
        predictions = trainer.predict(datamodule=MNISTDataModule("digits"))
        assert all(batch.device.type == "cpu" for batch in predictions)
        with pytest.raises(TrainingError, match=r"worker \d: CUDA out of memory.+: use a smaller --batch-size"):
            fit(tmp_path, "full", Greedy, **options)
    finally:
        KEEPER.give_back()


@pytest.mark.parametrize("strategy", ["fsdp", "ModelParallelStrategy"])
@pytest.mark.parametrize("num_workers", SEVERAL)
def test_a_model_in_shards_trains_as_a_whole_one(num_workers: int, strategy: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_epochs": 2, "logger": False, "storage_path": str(tmp_path), "use_gpu": True}
    losses = []
    try:
        wanted: Any = "fsdp" if strategy == "fsdp" else ModelParallelStrategy()
        for more in ({}, {"strategy": wanted, "num_workers": num_workers, "max_failures": 0}):
            trainer = Trainer(**options, **more)
            trainer.fit(Net(), sums(shuffle=True), sums())
            losses.append([row[kind] for row in trainer.result.history for kind in ("train_loss", "val_loss")])
    finally:
        KEEPER.give_back()
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
