"""Models that are compiled as a whole; `conformance/programs_models.py` compares what they find with Lightning."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ray_mnist import Trainer
from ray_mnist.errors import RequestError


class Net(pl.LightningModule):
    """Predicts whether it is compiled, and trains for the sake of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def training_step(self, batch: Any) -> Any:
        return self.layer(batch[0]).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch[0]) * 0 + torch.compiler.is_compiling()


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(6, 4)), batch_size=3)


def predicted(trainer: Trainer, model: Any = None) -> float:
    predictions = trainer.predict(model, loader())
    assert predictions is not None
    return float(torch.cat(predictions).mean())


def test_a_model_is_compiled_for_the_calls_that_it_was_given_to_compiled_and_sent_as_it_is(
    tmp_path: Path, gloo: None
) -> None:
    model, trainer = Net(), Trainer(storage_path=str(tmp_path), max_epochs=1)
    compiled: Any = torch.compile(model, backend="eager")
    trainer.fit(compiled, loader())
    assert predicted(trainer) == 1
    assert predicted(Trainer(storage_path=str(tmp_path)), model) == 0
    assert predicted(Trainer(storage_path=str(tmp_path), num_workers=2), compiled) == 1


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: Trainer(compile=True, tpu_cores=1), "on a TPU XLA compiles the model"),
        (
            lambda: Trainer(compile=True, strategy=ModelParallelStrategy()),
            "--compile compiles the model as a whole",
        ),
        (
            lambda: Trainer(strategy=ModelParallelStrategy()).predict(torch.compile(Net()), loader()),
            r"torch.compile\(model\) compiles the model as a whole, which ModelParallelStrategy has in shards",
        ),
        (lambda: Trainer().predict(torch.compile(nn.Linear(2, 2)), loader()), "model is of .*none of Lightning's"),
    ],
)
def test_what_cannot_be_compiled_is_refused(
    call: Callable[[], Any], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray_mnist.launch.tpu.check", lambda config: None)  # which looks for a TPU
    with pytest.raises(RequestError, match=complaint):
        call()


def test_what_is_compiled_in_place_here_is_not_left_uncompiled_there(tmp_path: Path, gloo: None) -> None:
    model = Net()
    model.layer.compile(backend="eager")
    trainer = Trainer(storage_path=str(tmp_path), num_workers=2)
    with pytest.raises(RequestError, match=r"model.layer.compile\(\) was called in this process.*configure_model"):
        trainer.predict(model, loader())


PROGRAM = """
import torch
from ray_mnist import SimpleModel

class Traced(SimpleModel):
    def training_step(self, batch, batch_idx):
        self.log("compiled", float(torch.compiler.is_compiling()))
        return super().training_step(batch, batch_idx)
"""
OPTIONS = ("--model", "traced.Traced", "--dataset", "digits", "--max-epochs", "1", "--compile")


@pytest.mark.slow
def test_the_option_compiles_any_model(
    command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """With a real compiler."""
    (tmp_path / "traced.py").write_text(PROGRAM)
    done = command(*OPTIONS, "--name", "run", "--batch-size", "256", timeout=1500)
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "runs" / "run" / "metrics.csv").read_text().splitlines()
    assert dict(zip(*(row.split(",") for row in rows), strict=True))["compiled"] == "1.0"
    best = json.loads((tmp_path / "runs" / "run" / "result.json").read_text())["best_checkpoint"]
    checkpoint = torch.load(tmp_path / "runs" / "run" / best / "checkpoint.ckpt", weights_only=True)
    assert not [name for name in checkpoint["state_dict"] if "_orig_mod" in name]


@pytest.mark.slow
def test_a_machine_without_a_compiler_says_so(
    command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "traced.py").write_text(PROGRAM)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # where there is nothing compiled yet
    done = command(*OPTIONS)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") <= 3, done.stderr
    assert "torch.compile needs a C++ compiler, and this machine has none" in done.stderr
    assert "Traceback" not in done.stderr
    assert not [*(tmp_path / "runs").glob("*")]
