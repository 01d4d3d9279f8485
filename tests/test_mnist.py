"""The main job from the command line: on digits, and on the real MNIST."""

import gzip
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ray_mnist import MNISTDataModule, SimpleModel, Trainer
from ray_mnist.run.folder import CHECKPOINT, RunFolder
from ray_mnist.run.records import read_metrics
from ray_mnist.run.report import Result

Command = Callable[..., CompletedProcess[str]]


def test_the_main_job_on_digits(command: Command, tmp_path: Path) -> None:
    # As in a person's own shell, where Ray makes a token for its local cluster.
    environment = {key: value for key, value in os.environ.items() if key != "RAY_AUTH_MODE"} | {"HOME": str(tmp_path)}
    done = command("--dataset", "digits", "--num-workers", "2", "--name", "run", env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    header, where, *epochs, last = done.stdout.splitlines()
    assert re.fullmatch(r"digits · SimpleModel \(101,770 parameters\) · 2 workers on CPU, Ray .*", header)
    assert where == "run folder runs/run"
    line = r"epoch {:2}/10  train_loss \d\.\d{{4}}  val_loss \d\.\d{{4}}  val_accuracy \d\.\d{{4}}  [\d,]+ samples/s"
    for number, text in enumerate(epochs, start=1):
        assert re.fullmatch(line.format(number), text), text
    assert len(epochs) == 10
    result = json.loads((tmp_path / "runs/run/result.json").read_text())
    assert last == f"test accuracy {result['test_accuracy']:.4f} on 359 samples; run folder runs/run"
    assert result["test_accuracy"] >= 0.93
    assert (result["num_workers"], result["restarts"], result["device"]) == (2, 0, "cpu")
    plots = {path.name for path in (tmp_path / "runs/run/plots").iterdir()}
    assert plots == {"loss.png", "accuracy.png", "confusion.png", "mistakes.png", "weights.png"}
    rows = read_metrics(RunFolder(str(tmp_path / "runs"), "run"))
    assert [row["epoch"] for row in rows] == list(range(1, 11))
    assert all(row["samples_per_second"] > 0 and row["seconds"] > 0 for row in rows)


def read_test_set(folder: Path) -> tuple[Tensor, Tensor]:
    """MNIST's test images as float32 (10000, 784) in [0, 1], and labels (10000,), read by hand."""
    images = np.frombuffer(gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    return torch.from_numpy(images.reshape(-1, 784) / np.float32(255)), torch.from_numpy(labels.astype(np.int64))


def fit(folder: Path, data: Path, num_workers: int, max_epochs: int) -> Result:
    pl.seed_everything(1, verbose=False)
    trainer = Trainer(
        max_epochs=max_epochs, num_workers=num_workers, storage_path=str(folder), name=f"on-{num_workers}"
    )
    trainer.fit(SimpleModel(), MNISTDataModule(data_dir=str(data)))
    return trainer.result


@pytest.fixture(scope="module")
def two_workers(cluster: None, mnist_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Five epochs on two workers of Ray."""
    return fit(tmp_path_factory.mktemp("mnist"), mnist_files, num_workers=2, max_epochs=5)


@pytest.mark.slow
def test_mnist_on_two_workers(two_workers: Result, mnist_files: Path) -> None:
    values = two_workers.values
    assert values["test_accuracy"] >= 0.970
    assert [values[f"{key}_samples"] for key in ("train", "val", "test")] == [48_000, 12_000, 10_000]

    best = torch.load(Path(two_workers.path) / values["best_checkpoint"] / CHECKPOINT, weights_only=False)
    network = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    network.load_state_dict(
        {
            f"{layer}.{kind}": best["state_dict"][f"net.{layer + 1}.{kind}"]
            for layer in (0, 2)
            for kind in ("weight", "bias")
        }
    )
    images, labels = read_test_set(mnist_files)
    assert values["test_accuracy"] == (network(images).argmax(dim=1) == labels).sum().item() / 10_000


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1, 4])
def test_mnist_at_every_number_of_workers(
    num_workers: int, two_workers: Result, gloo: None, mnist_files: Path, tmp_path: Path
) -> None:
    other = fit(tmp_path, mnist_files, num_workers, max_epochs=2)
    assert [other.values[f"{key}_samples"] for key in ("train", "val", "test")] == [48_000, 12_000, 10_000]
    for mine, theirs in zip(other.history, two_workers.history, strict=False):
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
