"""The TPU path on the real torch_xla, whose device is this machine's CPU. `scripts/test --tpu` runs it."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import psutil
import pytest

pytest.importorskip("torch_xla", reason="needs the environment that scripts/test --tpu makes")
os.environ["PJRT_DEVICE"] = "CPU"

import fake_tpu
import pytorch_lightning as pl
import torch
import torch_xla.core.xla_model as xm
from conftest import wait_until
from lightning_fabric.plugins.precision.xla import _PRECISION_INPUT
from test_lightning_package import FROM_THE_SHELL, NETS
from torch import nn
from torch.utils.data import DataLoader
from torch_xla.debug import metrics

from ray_mnist import MNISTDataModule, SimpleModel, Trainer
from ray_mnist.launch import tpu
from ray_mnist.run.folder import CHECKPOINT, RunFolder, checkpoint_name
from ray_mnist.run.records import read_metrics

pytestmark = pytest.mark.tpu
STEPS_PER_EPOCH = 17  # digits: 1,151 // 64
Run = subprocess.CompletedProcess[str]


def start(folder: Path, chips: int, *arguments: str) -> subprocess.Popen[str]:
    """Starts `python -m ray_mnist.train` as on a host with so many chips."""
    script = [sys.executable, fake_tpu.__file__, str(chips), "ray_mnist.train", *arguments]
    # The folder, for models of a test's own.
    environment = os.environ | {"PYTHONPATH": str(folder)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(script, cwd=folder, env=environment, **pipes)


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Run]:
    def run(chips: int, *arguments: str) -> Run:
        process = start(tmp_path, chips, *arguments)
        try:
            out, err = process.communicate(timeout=600)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return run


@pytest.fixture
def one_chip() -> Iterator[None]:
    """This process, as on a host with one chip."""
    with pytest.MonkeyPatch.context() as patch:
        fake_tpu.pretend(1, patch.setattr)
        yield


def result_of(folder: Path, name: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "runs" / name / "result.json").read_text())
    return values


def losses(folder: Path, name: str) -> list[float]:
    return [row["train_loss"] for row in read_metrics(RunFolder(str(folder / "runs"), name))]


def test_digits_on_one_core_as_on_the_cpu(train: Callable[..., Run], tmp_path: Path) -> None:
    on_tpu = train(1, "--dataset", "digits", "--tpu-cores", "1", "--name", "tpu")
    assert (on_tpu.returncode, on_tpu.stderr) == (0, "")
    header, where, *epochs, last = on_tpu.stdout.splitlines()
    assert header == "digits · SimpleModel (101,770 parameters) · 1 TPU core, Lightning's XLA trainer"
    assert (where, len(epochs)) == ("run folder runs/tpu", 10)
    result = result_of(tmp_path, "tpu")
    assert last == f"test accuracy {result['test_accuracy']:.4f} on 359 samples; run folder runs/tpu"
    assert (result["device"], result["versions"]["torch_xla"]) == ("xla", "2.9.0")
    assert (result["steps"], result["restarts"]) == (10 * STEPS_PER_EPOCH, 0)
    assert (tmp_path / "runs/tpu/plots/mistakes.png").exists()

    assert train(0, "--dataset", "digits", "--name", "cpu").returncode == 0
    assert abs(result["test_accuracy"] - result_of(tmp_path, "cpu")["test_accuracy"]) <= 0.003
    assert losses(tmp_path, "tpu") == pytest.approx(losses(tmp_path, "cpu"), rel=1e-4)


@pytest.mark.slow
def test_mnist_killed_and_resumed_as_on_the_cpu(train: Callable[..., Run], mnist_files: Path, tmp_path: Path) -> None:
    arguments = ("--data.data_dir", str(mnist_files), "--max-epochs", "5", "--seed", "1")
    process = start(tmp_path, 1, *arguments, "--tpu-cores", "1", "--name", "tpu", "--checkpoint-every-n-steps", "100")
    folder = RunFolder(str(tmp_path / "runs"), "tpu")
    third_epoch = checkpoint_name(2 * 750)  # 48,000 // 64 steps each
    wait_until(lambda: folder.checkpoints()[:1] > [third_epoch], 600, "a checkpoint inside the third epoch")
    process.kill()
    assert process.wait(240) == -signal.SIGKILL
    resumed = train(1, "--resume", "--name", "tpu")
    assert resumed.returncode == 0, resumed.stderr
    result = result_of(tmp_path, "tpu")
    assert result["test_accuracy"] >= 0.97
    counted = {key: result[f"{key}_samples"] for key in ("train", "val", "test")}
    assert counted == {"train": 48_000, "val": 12_000, "test": 10_000}

    assert train(0, *arguments, "--name", "cpu").returncode == 0
    assert abs(result["test_accuracy"] - result_of(tmp_path, "cpu")["test_accuracy"]) <= 0.003


class Dropping(SimpleModel):
    """Draws numbers on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Dropout(0.2), *self.net)


class BreakOff(pl.Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.at:
            raise RuntimeError("broken off")


def test_a_run_that_breaks_off_inside_an_epoch_ends_as_if_it_had_not(one_chip: None, tmp_path: Path) -> None:
    def fit(name: str, resume: bool = False, at: int = -1) -> dict[str, torch.Tensor]:
        pl.seed_everything(1, verbose=False)
        options: dict[str, Any] = {"max_epochs": 2, "checkpoint_every_n_steps": 5, "storage_path": str(tmp_path)}
        trainer = Trainer(**options, tpu_cores=1, name=name, resume=resume, callbacks=[BreakOff(at)])
        trainer.fit(Dropping(), MNISTDataModule("digits"))
        newest = tmp_path / name / RunFolder(str(tmp_path), name).checkpoints()[0] / CHECKPOINT
        state: dict[str, torch.Tensor] = torch.load(newest, weights_only=False)["state_dict"]
        return state

    whole = fit("whole")
    with pytest.raises(RuntimeError, match="broken off"):
        fit("broken", at=STEPS_PER_EPOCH + 7)
    assert RunFolder(str(tmp_path), "broken").checkpoints()[0] == "checkpoint_000000020"
    resumed = fit("broken", resume=True)
    assert all(value.device.type == "cpu" and torch.equal(value, whole[name]) for name, value in resumed.items())


class Compiled(pl.Callback):
    """How often XLA had compiled after each epoch's first step, and after each batch of the test."""

    def __init__(self) -> None:
        self.in_training: list[int] = []
        self.in_test: list[int] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.in_training.append(metrics.counter_value("UncachedCompile"))

    def on_test_batch_start(self, *_: Any) -> None:
        self.in_test.append(metrics.counter_value("UncachedCompile"))


class SmallBatches(MNISTDataModule):
    """Evaluates in several batches, of which the last is smaller."""

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("val", batch_size=64)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader("test", batch_size=64)


def test_nothing_is_compiled_after_the_first_epoch(one_chip: None, tmp_path: Path) -> None:
    compiled = Compiled()
    trainer = Trainer(max_epochs=5, tpu_cores=1, storage_path=str(tmp_path), callbacks=[compiled])
    trainer.fit(SimpleModel(), SmallBatches("digits"))
    first, *others = compiled.in_training
    # The second epoch's first step comes with what is reset after an epoch.
    assert others[0] > first > 0
    assert len(set(others)) == 1, others
    # The test is gone through once: each batch that is not the first or the last has been compiled for.
    assert len(compiled.in_test) == 6
    assert len(set(compiled.in_test[2:])) == 1, compiled.in_test
    # Padding would have made one shape of the two; this way no model can count what was padded.
    result = trainer.result.values
    assert (result["val_samples"], result["test_samples"]) == (287, 359)


class Lazy(SimpleModel):
    """Asks for no value before the evaluation is over."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        self.log("val_loss", nn.functional.cross_entropy(self(images), labels), batch_size=len(labels))


class Executed(pl.Callback):
    """How often the device had computed when each batch of the validation came."""

    def __init__(self) -> None:
        self.before: list[int] = []

    def on_validation_batch_start(self, *_: Any) -> None:
        xm.wait_device_ops()
        self.before.append(metrics.counter_value("ExecuteComputation"))


def test_an_evaluation_is_computed_batch_by_batch(one_chip: None, tmp_path: Path) -> None:
    executed = Executed()
    trainer = Trainer(tpu_cores=1, storage_path=str(tmp_path), callbacks=[executed])
    trainer.validate(Lazy(), SmallBatches("digits"), verbose=False)
    assert len(executed.before) == 5
    assert all(later > earlier for earlier, later in pairwise(executed.before)), executed.before


def test_bf16_is_kept_in_16_bits(train: Callable[..., Run], tmp_path: Path) -> None:
    arguments = ("--dataset", "digits", "--max-epochs", "3", "--tpu-cores", "1", "--precision", "bf16-true")
    done = train(1, *arguments, "--name", "bf16")
    assert done.returncode == 0, done.stderr
    result = result_of(tmp_path, "bf16")
    assert result["test_accuracy"] > 0.85
    checkpoint = tmp_path / "runs/bf16" / result["best_checkpoint"] / CHECKPOINT
    weights = torch.load(checkpoint, weights_only=False)["state_dict"]
    assert all(torch.equal(value, value.bfloat16().float()) for name, value in weights.items() if "net" in name)


def test_a_program_of_the_other_lightning(train: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    on_tpu = train(2, *FROM_THE_SHELL, "--tpu-cores", "2")
    assert (on_tpu.returncode, on_tpu.stderr) == (0, "")
    assert "Net (760 parameters) · 2 TPU cores" in on_tpu.stdout
    assert result_of(tmp_path, "run")["device"] == "xla"


def test_the_precisions_are_lightnings() -> None:
    assert set(tpu.PRECISIONS) - {"32"} == set(get_args(_PRECISION_INPUT))


def test_two_cores_train_as_one(train: Callable[..., Run], tmp_path: Path) -> None:
    arguments = ("--dataset", "digits", "--max-epochs", "3", "--batch-size", "63")  # which two cannot share equally
    one = train(1, *arguments, "--tpu-cores", "1", "--name", "one")
    two = train(2, *arguments, "--tpu-cores", "2", "--name", "two")
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    assert "2 TPU cores, Lightning's XLA trainer" in two.stdout
    of_one, of_two = result_of(tmp_path, "one"), result_of(tmp_path, "two")
    for key in ("steps", "train_samples", "val_samples", "test_samples", "best_checkpoint"):
        assert of_one[key] == of_two[key], key
    assert of_two["test_accuracy"] == pytest.approx(of_one["test_accuracy"], abs=0.003)
    assert losses(tmp_path, "two") == pytest.approx(losses(tmp_path, "one"), rel=1e-4)


MODELS = """
import time
from ray_mnist import SimpleModel

class FailsOnOneCore(SimpleModel):
    def on_train_start(self):
        print("printed on core", self.global_rank)

    def on_train_epoch_end(self):
        if self.global_rank == 1:
            raise ValueError("broken on purpose")
        time.sleep(600)

class Sleeps(SimpleModel):
    def on_train_epoch_end(self):
        time.sleep(600)
"""


def test_a_core_that_fails_ends_the_others(train: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "models.py").write_text(MODELS)
    done = train(2, "--dataset", "digits", "--tpu-cores", "2", "--model", "models.FailsOnOneCore")
    assert done.returncode == 1
    *_, where, error = done.stderr.splitlines()
    assert error == "error: training failed: core 1: ValueError: broken on purpose"
    assert done.stdout.count("printed on core") == done.stdout.count("printed on core 0\n") == 1
    (logs,) = re.findall("What the cores printed is in (.+) on .+", where)
    assert Path(logs, "core-1.log").read_text().endswith("printed on core 1\n")  # after what gloo says


def test_cores_do_not_outlive_a_killed_driver(tmp_path: Path) -> None:
    (tmp_path / "models.py").write_text(MODELS)
    driver = start(tmp_path, 2, "--dataset", "digits", "--tpu-cores", "2", "--model", "models.Sleeps", "--name", "run")
    folder = tmp_path / "runs/run"
    wait_until(lambda: any(folder.glob("tensorboard/events*")), 600, "the training to start")
    cores = psutil.Process(driver.pid).children(recursive=True)
    assert len(cores) >= 2
    driver.kill()
    driver.wait(240)
    _, alive = psutil.wait_procs(cores, timeout=600)
    for core in alive:
        core.kill()
    assert not alive


def test_two_hosts_of_a_slice_train_as_one(train: Callable[..., Run], tmp_path: Path) -> None:
    arguments = ("--dataset", "digits", "--max-epochs", "2")
    one = train(1, *arguments, "--tpu-cores", "1", "--name", "one")
    assert one.returncode == 0, one.stderr
    script = [sys.executable, str(Path(__file__).with_name("fake_pod.py")), *arguments, "--tpu-cores", "8"]
    done = subprocess.run([*script, "--name", "two"], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "8 TPU cores, Lightning's XLA trainer on 2 hosts, Ray " in done.stdout
    assert losses(tmp_path, "two") == pytest.approx(losses(tmp_path, "one"), rel=1e-4)
    of_one, of_two = result_of(tmp_path, "one"), result_of(tmp_path, "two")
    assert of_two["test_accuracy"] == pytest.approx(of_one["test_accuracy"], abs=0.003)
    assert (of_two["test_samples"], of_two["best_checkpoint"]) == (359, of_one["best_checkpoint"])
