"""SIGTERM to the process that started a run has all ranks checkpoint at once, and ends it with status 143."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl

from ray_mnist import MNISTDataModule, SimpleModel, Trainer
from ray_mnist.callbacks import Recorder
from ray_mnist.errors import Stopped
from ray_mnist.launch import termination
from ray_mnist.launch.termination import on_sigterm
from ray_mnist.run.folder import RunFolder, checkpoint_name

SECONDS = 240  # more than a signal takes


@pytest.fixture(autouse=True)
def answers() -> Iterator[None]:
    """Ctrl-C has its usual answer, which a shell's `&` takes away, and SIGTERM has the one that it had."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    terminated = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGINT, before)
    assert signal.getsignal(signal.SIGTERM) == terminated


class Terminate(pl.Callback):
    """Sends SIGTERM to this process, from rank 0 in the middle of step `at`, after which each step asks rank 0."""

    def __init__(self, at: int) -> None:
        self.at, self.driver, self.started_at = at, os.getpid(), -1

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.started_at = trainer.global_step
        (self.recorder,) = (callback for callback in trainer.callbacks if isinstance(callback, Recorder))
        self.recorder.rank_zero.clock = lambda: trainer.global_step

    def on_train_batch_start(self, trainer: pl.Trainer, _: Any, batch: Any, batch_idx: int) -> None:
        stop = self.recorder.rank_zero.stop
        if trainer.global_step == self.at - 1 and trainer.is_global_zero and not stop.is_set():
            os.kill(self.driver, signal.SIGTERM)
            assert stop.wait(SECONDS)

    def on_train_end(self, *_: Any) -> None:
        del self.recorder


def fit(folder: Path, name: str, num_workers: int, **options: Any) -> Trainer:
    pl.seed_everything(3, verbose=False)
    # An epoch has 17 batches, and so 9 steps.
    options = {"max_epochs": 2, "accumulate_grad_batches": 2, "logger": False} | options
    trainer = Trainer(num_workers=num_workers, storage_path=str(folder), name=name, **options)
    trainer.fit(SimpleModel(), MNISTDataModule("digits"))
    return trainer


@pytest.mark.parametrize(
    ("num_workers", "at"), [(0, 4), (2, 13), (0, 9)], ids=["alone", "two ranks", "at an epoch's end"]
)
def test_all_ranks_checkpoint_and_the_run_goes_on_from_there(
    num_workers: int, at: int, gloo: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        fit(tmp_path, "run", num_workers, callbacks=[Terminate(at)])
    assert end.value.code == 143
    advice = f"go on with `Trainer(resume=True, name='run', storage_path='{tmp_path}', …)`"
    assert capfd.readouterr().err.splitlines()[-1] == f"terminated: {advice}"
    assert RunFolder(str(tmp_path), "run").checkpoints()[0] == checkpoint_name(at)
    goes_on = Terminate(at=0)
    resumed = fit(tmp_path, "run", num_workers, resume=True, callbacks=[goes_on])
    assert goes_on.started_at == at
    assert resumed.result.values["restarts"] == 0
    whole = fit(tmp_path, "whole", num_workers)
    for name in ("step", "train_loss", "val_loss"):
        assert [row[name] for row in resumed.result.history] == [row[name] for row in whole.result.history]


def run_on(*signals: signal.Signals, stop: Any = lambda: None) -> None:
    """A run that only an exception ends, and which gets the signals."""
    with on_sigterm(stop):
        for number in signals:
            os.kill(os.getpid(), number)
        threading.Event().wait(SECONDS)
    raise AssertionError("nothing came")


def test_a_run_that_does_not_end_in_time_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(termination, "GRACE_S", 0.1)
    monkeypatch.setattr(termination, "SAME_S", 0)
    asked = threading.Event()
    with pytest.raises(Stopped):
        run_on(signal.SIGTERM, stop=asked.set)
    assert asked.is_set()


def test_a_second_sigterm_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(termination, "SAME_S", 0)
    with pytest.raises(Stopped):
        run_on(signal.SIGTERM, signal.SIGTERM)


def test_two_at_once_are_one() -> None:
    asked: list[str] = []

    def stop() -> None:
        asked.append("to stop")
        os.kill(os.getpid(), signal.SIGTERM)

    with on_sigterm(stop):
        os.kill(os.getpid(), signal.SIGTERM)
    assert asked == ["to stop"]


def test_ctrl_c_stays_what_it_is() -> None:
    with pytest.raises(KeyboardInterrupt):
        run_on(signal.SIGINT)


def test_a_run_that_is_done_all_the_same_is_done() -> None:
    with on_sigterm(lambda: None):
        os.kill(os.getpid(), signal.SIGTERM)
