"""A run in this process: what the run folder says, and a run that is stopped and goes on as if it never had been."""

import csv
import json
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import yaml
from conftest import altered, every_damage
from PIL import Image
from processes import processes
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ray_mnist import MNISTDataModule, RequestError, SimpleModel, Trainer
from ray_mnist.callbacks import Recorder
from ray_mnist.cli import console
from ray_mnist.config import RunConfig
from ray_mnist.data import sources
from ray_mnist.launch import local
from ray_mnist.run.folder import CHECKPOINT, CHECKSUM, RunFolder, checkpoint_name, checksum_line
from ray_mnist.run.outcome import Outcome, Row, TrainerState
from ray_mnist.run.report import write_result
from ray_mnist.run.weights import load_weights

STEPS_PER_EPOCH = 1151 // 64
EPOCHS = 3
LAST = EPOCHS * STEPS_PER_EPOCH


class Stopped(Exception):
    """The run broke off."""


def await_uploads(trainer: pl.Trainer) -> None:
    """Returns once all checkpoints so far are in the run folder."""
    (recorder,) = (callback for callback in trainer.callbacks if isinstance(callback, Recorder))
    recorder.uploads.flush()


class Stop(pl.Callback):
    """Breaks the run off at the end of step `at`, by an error or by a signal to the process."""

    def __init__(self, at: int, by: type[BaseException] | signal.Signals = Stopped) -> None:
        self.at, self.by = at, by

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step != self.at:
            return
        if isinstance(self.by, signal.Signals):
            await_uploads(trainer)
            os.kill(os.getpid(), self.by)
        else:
            raise self.by


class Start(pl.Callback):
    """Sees at which step training starts."""

    step = -1

    def on_train_start(self, trainer: pl.Trainer, *_: object) -> None:
        self.step = trainer.global_step


class Dropped(SimpleModel):
    """Draws random numbers in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.net.insert(3, nn.Dropout(0.5))


@dataclass
class Run:
    model: pl.LightningModule
    trainer: Trainer
    folder: Path

    @property
    def result(self) -> dict[str, Any]:
        return json.loads((self.folder / "result.json").read_text())

    @property
    def history(self) -> list[Row]:
        return self.trainer.result.history

    def checkpoints(self) -> set[str]:
        return {path.name for path in self.folder.glob("*checkpoint_*")}


def train(
    storage: Path, name: str, *, model: type[pl.LightningModule] = SimpleModel, weights: int = 1, **options: Any
) -> Run:
    """Trains on digits; `weights` seeds the model's first weights."""
    torch.manual_seed(weights)
    trainer = Trainer(**({"max_epochs": EPOCHS} | options), storage_path=str(storage), name=name)
    run = Run(model(), trainer, storage / name)
    torch.seed()  # whatever a script drew before must not count
    run.trainer.fit(run.model, MNISTDataModule("digits", seed=0))
    run.trainer.test()
    return run


def train_in_a_process_of_its_own(storage: Path, stop: Stop) -> None:
    train(storage, "stopped", checkpoint_every_n_steps=5, callbacks=[stop])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing happened to."""
    return train(tmp_path_factory.mktemp("runs"), "whole")


# The run folder


def test_the_run_folder_has_every_file_of_the_contract(whole: Run) -> None:
    plots = {f"plots/{name}.png" for name in ("loss", "accuracy", "confusion", "mistakes", "weights")}
    checkpoint = {f"{checkpoint_name(LAST)}/{file}" for file in (CHECKPOINT, CHECKSUM)}
    files = {file for file in contents(whole.folder) if not file.startswith("tensorboard/")}
    assert files == {"config.yaml", "metrics.csv", "report.html", "result.json", *checkpoint, *plots}
    assert any("tfevents" in file for file in contents(whole.folder))
    assert set(os.listdir(whole.folder.parent)) == {"whole"}


def test_the_result_has_the_keys_of_the_contract_in_their_order(whole: Run) -> None:
    assert ", ".join(whole.result) == (
        "name, dataset, model, device, num_workers, seed, epochs, steps, train_samples, val_samples, test_samples, "
        "train_loss, val_loss, val_accuracy, test_loss, test_accuracy, samples_per_second, seconds, restarts, "
        "best_checkpoint, versions"
    )
    assert list(whole.result["seconds"]) == ["startup", "fit", "test", "total"]


def test_the_result_says_what_was_done(whole: Run) -> None:
    told = {
        "name": "whole",
        "dataset": "digits",
        "model": "SimpleModel",
        "device": "cpu",
        "num_workers": 0,
        "seed": 0,
        "epochs": EPOCHS,
        "steps": LAST,
        "train_samples": 1151,
        "val_samples": 287,
        "test_samples": 359,
        "restarts": 0,
        "best_checkpoint": checkpoint_name(LAST),
    }
    assert {key: whole.result[key] for key in told} == told
    seconds = whole.result["seconds"]
    assert 0 < seconds["fit"] + seconds["test"] < seconds["total"]
    assert whole.result["versions"]["torch"] == torch.__version__


def test_the_files_agree_with_each_other(whole: Run) -> None:
    with (whole.folder / "metrics.csv").open() as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert rows == whole.history
    assert ", ".join(rows[0]) == "epoch, step, train_loss, val_loss, val_accuracy, samples_per_second, seconds"
    assert [(row["epoch"], row["step"]) for row in rows] == [(n, n * STEPS_PER_EPOCH) for n in (1, 2, 3)]
    for key in ("train_loss", "val_loss", "val_accuracy"):
        assert whole.result[key] == rows[-1][key]
    assert whole.result == whole.trainer.result.values
    assert whole.trainer.test() == [{key: whole.result[key] for key in ("test_loss", "test_accuracy")}]
    # Every epoch trains on equally many samples, so that the run's rate follows from the epochs'.
    rates = [row["samples_per_second"] for row in rows]
    assert whole.result["samples_per_second"] == pytest.approx(EPOCHS / sum(1 / rate for rate in rates))


def test_the_config_says_what_was_asked_for(whole: Run) -> None:
    config = yaml.safe_load((whole.folder / "config.yaml").read_text())
    asked = {"name": "whole", "max_epochs": EPOCHS, "seed": 0, "num_workers": 0, "resume": False}
    assert {key: config[key] for key in asked} == asked
    assert config["model"]["class_path"] == "ray_mnist.models.SimpleModel"
    assert config["model"]["init_args"] == {
        "lr": 1e-3,
        "schedule": "constant",
        "input_shape": [1, 28, 28],
        "num_classes": 10,
    }
    assert config["data"]["init_args"]["dataset"] == "digits"
    assert config["data"]["init_args"]["batch_size"] == 64


def test_the_plots_are_pictures(whole: Run) -> None:
    for name in ("loss", "accuracy", "confusion", "mistakes"):
        with Image.open(whole.folder / f"plots/{name}.png") as picture:
            assert picture.format == "PNG"
            assert all(400 <= length <= 2000 for length in picture.size)
            assert len(picture.convert("RGB").getcolors(1_000_000)) > 20, f"{name} is blank"


def test_what_is_drawn_is_the_seeds_alone(tmp_path: Path) -> None:
    one, same, other = (
        train(tmp_path, name, model=Dropped, max_epochs=1, seed=seed)
        for name, seed in (("one", 5), ("same", 5), ("other", 6))
    )
    assert_same_training(same, one)
    assert not torch.equal(other.model.net[1].weight, one.model.net[1].weight)


def test_the_result_counts_tpu_cores_as_workers(whole: Run, tmp_path: Path) -> None:
    outcome = Outcome(TrainerState({}, {}, {}, 1, 1), "xla", [], 1, 1, 1, None, 0.0, 1.0)
    for cores, workers in ((8, 8), (1, 1), (0, 0)):
        folder = RunFolder(str(tmp_path), f"on-{cores}")
        result = write_result(folder, RunConfig(tpu_cores=cores), whole.model, {}, outcome, started=0.0)
        assert result.values["num_workers"] == workers


# What it shows


def epochs_shown(capsys: pytest.CaptureFixture[str]) -> list[int]:
    return [int(epoch) for epoch in re.findall(r"^epoch +(\d+)/", capsys.readouterr().out, re.MULTILINE)]


class Shown(pl.Callback):
    """Collects the epochs that were shown by the time that the next one trains; from then on, no metrics are read."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.capsys, self.monkeypatch = capsys, monkeypatch
        self.epochs: list[list[int]] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: object) -> None:
        await_uploads(trainer)
        self.epochs.append(epochs_shown(self.capsys))
        read = RunFolder.read

        def refuse(folder: RunFolder, file: str) -> bytes:
            if file == "metrics.csv":
                raise OSError("SlowDown: reduce your request rate")
            return read(folder, file)

        self.monkeypatch.setattr(RunFolder, "read", refuse)


def test_each_epoch_is_shown_as_it_ends_without_a_look_at_the_storage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = Shown(capsys, monkeypatch)
    train(tmp_path, "run", callbacks=[shown])
    assert shown.epochs == [[], [1], [2]]
    assert epochs_shown(capsys) == [3]


def test_a_resumed_run_shows_its_own_epochs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Stopped):
        train(tmp_path, "run", callbacks=[Stop(at=STEPS_PER_EPOCH + 3)])
    assert epochs_shown(capsys) == [1]
    train(tmp_path, "run", resume=True)
    assert epochs_shown(capsys) == [2, 3]


def test_news_that_was_lost_is_shown_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = local.launch

    def launch_unheard(job: Any, context: Any) -> Any:
        context.tell = lambda event: None
        return launch(job, context)

    monkeypatch.setattr(local, "launch", launch_unheard)
    train(tmp_path, "run")
    assert epochs_shown(capsys) == [1, 2, 3]


def test_a_terminal_that_is_gone_harms_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(pl.Callback):
        def on_train_start(self, *_: object) -> None:
            reading, writing = os.pipe()
            os.close(reading)
            monkeypatch.setattr(sys, "stdout", os.fdopen(writing, "w", buffering=1))

    monkeypatch.setattr(console.console, "quiet", False)  # which rich sets where nobody reads
    assert len(train(tmp_path, "run", callbacks=[Gone()]).history) == EPOCHS


# The test, recomputed with nothing but torch


def plain_accuracy(checkpoint: Path) -> float:
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    state = torch.load(checkpoint / CHECKPOINT, weights_only=False)["state_dict"]
    net.load_state_dict({name.removeprefix("net."): value for name, value in state.items()})
    data = sources.load("digits", Path())
    right = net(data.test_images / 255).argmax(1) == data.test_labels
    return right.sum().item() / len(data.test_labels)


class WorseAndWorse(SimpleModel):
    """Its first epoch is its best, by what it says."""

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", float(self.current_epoch), batch_size=len(batch[1]))


def test_the_test_accuracy_is_the_best_checkpoints_to_the_last_digit(whole: Run, tmp_path: Path) -> None:
    assert whole.result["test_accuracy"] == plain_accuracy(whole.folder / checkpoint_name(LAST))
    worse = train(tmp_path, "worse", model=WorseAndWorse)
    first, newest = checkpoint_name(STEPS_PER_EPOCH), checkpoint_name(LAST)
    assert worse.result["best_checkpoint"] == first
    assert worse.result["test_accuracy"] == plain_accuracy(worse.folder / first)
    assert worse.result["test_accuracy"] != plain_accuracy(worse.folder / newest)


def test_only_newest_and_best_checkpoint_are_kept(tmp_path: Path) -> None:
    better = train(tmp_path, "better", checkpoint_every_n_steps=5)
    assert better.checkpoints() == {checkpoint_name(LAST)}
    worse = train(tmp_path, "worse", model=WorseAndWorse, checkpoint_every_n_steps=5)
    assert worse.checkpoints() == {checkpoint_name(STEPS_PER_EPOCH), checkpoint_name(LAST)}


@pytest.mark.parametrize("epochs", [2, 3])
def test_the_best_is_chosen_among_the_epochs_that_were_validated(tmp_path: Path, epochs: int) -> None:
    run = train(tmp_path, "run", max_epochs=epochs, check_val_every_n_epoch=2)
    assert run.result["best_checkpoint"] == checkpoint_name(2 * STEPS_PER_EPOCH)


# Stopped, and resumed


def assert_same_training(run: Run, whole: Run) -> None:
    """The same weights, bit for bit, and the same loss and validation after every epoch."""
    weights, expected = run.model.state_dict(), whole.model.state_dict()
    assert list(weights) == list(expected)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    measured = ("epoch", "step", "train_loss", "val_loss", "val_accuracy")
    assert [[row[name] for name in measured] for row in run.history] == [
        [row[name] for name in measured] for row in whole.history
    ]
    same = ("steps", "train_loss", "val_loss", "val_accuracy", "test_loss", "test_accuracy", "best_checkpoint")
    assert {key: run.result[key] for key in same} == {key: whole.result[key] for key in same}


def stopped(storage: Path, at: int, **options: Any) -> set[str]:
    """Breaks a run off at the end of step `at`; returns the checkpoints it leaves."""
    with pytest.raises(Stopped):
        train(storage, "stopped", callbacks=[Stop(at)], **options)
    return set(RunFolder(str(storage), "stopped").checkpoints())


def resumed(storage: Path, *, starts_at: int, **options: Any) -> Run:
    """Goes on, from other first weights: all that counts is the checkpoint's."""
    start = Start()
    run = train(storage, "stopped", weights=2, resume=True, callbacks=[start], **options)
    assert start.step == starts_at
    return run


def test_a_run_killed_inside_an_epoch_goes_on_at_the_next_sample(whole: Run, tmp_path: Path) -> None:
    stop = Stop(at=STEPS_PER_EPOCH + 7, by=signal.SIGKILL)
    process = processes.Process(target=train_in_a_process_of_its_own, args=(tmp_path, stop))
    process.start()
    process.join(240)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "stopped/result.json").exists()
    assert_same_training(resumed(tmp_path, starts_at=20, checkpoint_every_n_steps=5), whole)


@pytest.mark.parametrize(
    ("at", "starts_at", "every"),
    [
        (STEPS_PER_EPOCH + 1, STEPS_PER_EPOCH, None),
        (LAST, 2 * STEPS_PER_EPOCH, None),
        (9, 5, 5),
        (STEPS_PER_EPOCH, 16, 4),
        (STEPS_PER_EPOCH + 1, STEPS_PER_EPOCH, 1),
        (40, 39, 3),
    ],
)
def test_a_run_that_breaks_off_anywhere_goes_on_from_its_newest_checkpoint(
    whole: Run, tmp_path: Path, at: int, starts_at: int, every: int | None
) -> None:
    left = stopped(tmp_path, at, checkpoint_every_n_steps=every)
    assert max(left) == checkpoint_name(starts_at)
    assert_same_training(resumed(tmp_path, starts_at=starts_at, checkpoint_every_n_steps=every), whole)


class KilledInMidSave(pl.Callback):
    """Kills the process while it writes the checkpoint of a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_save_checkpoint(self, trainer: pl.Trainer, model: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.global_step == self.at:
            checkpoint["killer"] = Killer()


class Killer:
    """Kills who writes it."""

    def __reduce__(self) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("killed")


def train_with(storage: Path, callback: pl.Callback) -> None:
    tempfile.tempdir = str(storage / "tmp")
    train(storage, "stopped", callbacks=[callback])


def test_a_run_killed_in_mid_save_leaves_nothing_outside_of_its_folder(whole: Run, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    killer = KilledInMidSave(2 * STEPS_PER_EPOCH)
    # Not forked from this one, in which another test may have computed gradients on another device than the CPU.
    process = processes.Process(target=train_with, args=(tmp_path, killer))
    process.start()
    process.join(240)
    assert process.exitcode == -signal.SIGKILL
    assert not list((tmp_path / "tmp").glob("ray_mnist-*"))
    resumed = train(tmp_path, "stopped", resume=True)
    assert_same_training(resumed, whole)
    assert resumed.checkpoints() == {checkpoint_name(LAST)}  # hidden ones, too


def test_a_run_may_be_stopped_again_and_again(whole: Run, tmp_path: Path) -> None:
    stopped(tmp_path, 9, checkpoint_every_n_steps=4)
    for at in (14, 26, 45):
        stopped(tmp_path, at, checkpoint_every_n_steps=4, resume=True)
    assert_same_training(resumed(tmp_path, starts_at=44, checkpoint_every_n_steps=4), whole)


@pytest.mark.parametrize(("at", "starts_at"), [(STEPS_PER_EPOCH + 1, STEPS_PER_EPOCH), (24, 20)])
def test_a_model_that_draws_random_numbers_goes_on_with_the_same(tmp_path: Path, at: int, starts_at: int) -> None:
    whole = train(tmp_path, "whole", model=Dropped)
    stopped(tmp_path, at, model=Dropped, checkpoint_every_n_steps=5)
    assert_same_training(
        resumed(tmp_path, model=Dropped, starts_at=starts_at, checkpoint_every_n_steps=5),
        whole,
    )


@every_damage
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_line(
    whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[bytes], bytes], why: str
) -> None:
    assert stopped(tmp_path, 24, checkpoint_every_n_steps=5) == {checkpoint_name(17), checkpoint_name(20)}
    newest = tmp_path / "stopped" / checkpoint_name(20) / CHECKPOINT
    newest.write_bytes(damage(newest.read_bytes()))
    assert_same_training(resumed(tmp_path, starts_at=17, checkpoint_every_n_steps=5), whole)
    assert f"passed over the checkpoint {newest}: it {why}\n" in capsys.readouterr().out
    assert set(RunFolder(str(tmp_path), "stopped").checkpoints()) == {checkpoint_name(LAST)}


def test_a_run_that_is_done_has_the_weights_of_its_newest_sound_checkpoint(whole: Run, tmp_path: Path) -> None:
    train(tmp_path, "stopped")
    newest, planted = (tmp_path / "stopped" / checkpoint_name(step) for step in (LAST, LAST + 1))
    shutil.copytree(newest, planted)
    (planted / CHECKPOINT).write_bytes(altered((planted / CHECKPOINT).read_bytes()))
    again = train(tmp_path, "stopped", weights=2, resume=True)
    assert_same_training(again, whole)
    assert again.trainer.checkpoint_callback.last_model_path == str(newest / CHECKPOINT)


class Planted:
    """Makes the folder `mark` when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("with_checksum", [True, False])
@pytest.mark.parametrize("best", [True, False])
def test_a_pickle_planted_in_the_run_folder_never_runs(tmp_path: Path, with_checksum: bool, best: bool) -> None:
    run = train(tmp_path, "run", max_epochs=1)
    planted = run.folder / checkpoint_name(STEPS_PER_EPOCH + (not best))
    planted.mkdir(exist_ok=True)
    whole = torch.load(run.folder / checkpoint_name(STEPS_PER_EPOCH) / CHECKPOINT)
    torch.save(whole | {"planted": Planted(tmp_path / "mark")}, planted / CHECKPOINT)
    (planted / CHECKSUM).unlink(missing_ok=True)
    if with_checksum:
        with open(planted / CHECKPOINT, "rb") as file:
            (planted / CHECKSUM).write_bytes(checksum_line(file))
    with pytest.raises(RequestError, match=f"The checkpoint {planted / CHECKPOINT} holds more than tensors and plain"):
        train(tmp_path, "run", resume=True)
    with pytest.raises(RequestError, match=f"The checkpoint {planted / CHECKPOINT} holds more than tensors and plain"):
        load_weights(SimpleModel(), str(planted / CHECKPOINT))
    if best:
        with pytest.raises(RequestError, match="holds more than tensors and plain types"):
            run.trainer.validate(ckpt_path="best", verbose=False)
    assert not (tmp_path / "mark").exists()
    (planted / CHECKPOINT).write_bytes(pickle.dumps(Planted(tmp_path / "mark")))  # not torch's file
    assert Path(train(tmp_path, "run", resume=True).folder, "result.json").exists()
    assert not (tmp_path / "mark").exists()


def test_a_checkpoint_of_the_users_runs_code_only_if_they_say_so(whole: Run, tmp_path: Path) -> None:
    state = torch.load(whole.folder / checkpoint_name(LAST) / CHECKPOINT)
    torch.save(state | {"planted": Planted(tmp_path / "mark")}, tmp_path / "given.ckpt")
    trainer, arguments = Trainer(), (SimpleModel(), MNISTDataModule("digits"), tmp_path / "given.ckpt")
    for told in (None, True):
        with pytest.raises(RequestError) as error:
            trainer.validate(*arguments, verbose=False, weights_only=told)
        assert str(error.value) == (
            f"The checkpoint {tmp_path / 'given.ckpt'} holds more than tensors and plain types, and to load it could "
            "run code that came with it: delete it, or, if you trust whoever made it, start from it with ckpt_path and "
            "weights_only=False."
        )
        assert not (tmp_path / "mark").exists()
    trainer.validate(*arguments, verbose=False, weights_only=False)
    assert (tmp_path / "mark").exists()


class WithObjects(SimpleModel):
    """Its hyperparameters are not all plain."""

    def __init__(self, criterion: nn.Module, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_hyperparameters_that_are_objects_are_left_out_and_named(tmp_path: Path) -> None:
    stop, data, model = Stop(21), MNISTDataModule("digits", seed=0), WithObjects(nn.CrossEntropyLoss())
    options = {"storage_path": str(tmp_path), "name": "run", "max_epochs": EPOCHS}
    with (
        pytest.warns(UserWarning, match="give load_from_checkpoint criterion yourself") as warned,
        pytest.raises(Stopped),
    ):
        Trainer(**options, checkpoint_every_n_steps=5, callbacks=[stop]).fit(model, data)
    assert len([each for each in warned if "load_from_checkpoint" in str(each.message)]) == 1
    start = Start()
    trainer = Trainer(**options, resume=True, callbacks=[start])
    trainer.fit(WithObjects(nn.CrossEntropyLoss()), data)
    assert start.step == 20
    path = trainer.checkpoint_callback.last_model_path
    assert torch.load(path, weights_only=True)["hyper_parameters"]["width"] == 3
    loaded = WithObjects.load_from_checkpoint(path, criterion=nn.CrossEntropyLoss())
    assert loaded.hparams["width"] == 3


class Odd:
    """No plain type."""


class SavesAnObject(pl.Callback):
    """Has an object in its state, once it has seen so many epochs."""

    def __init__(self, after: int = 0) -> None:
        self.after, self.epochs = after, 0

    def on_train_epoch_end(self, *_: object) -> None:
        self.epochs += 1

    def state_dict(self) -> dict[str, Any]:
        return {"odd": Odd()} if self.epochs > self.after else {}


def test_an_object_in_a_callbacks_state_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=rf"plain types only, and {__name__}\.Odd is none"):
        train(tmp_path, "run", callbacks=[SavesAnObject()])
    assert not (tmp_path / "run").exists()
    with pytest.raises(RequestError):
        train(tmp_path, "late", callbacks=[SavesAnObject(after=1)])
    assert RunFolder(str(tmp_path), "late").checkpoints() == [checkpoint_name(STEPS_PER_EPOCH)]
    with torch.serialization.safe_globals([Odd]):
        train(tmp_path, "run", callbacks=[SavesAnObject()], max_epochs=1)
        resumed = train(tmp_path, "run", callbacks=[SavesAnObject()], max_epochs=2, resume=True)
    assert len(resumed.history) == 2


def test_the_state_of_lightnings_own_callbacks_is_plain(tmp_path: Path) -> None:
    def callbacks() -> list[pl.Callback]:
        return [
            pl.callbacks.ModelCheckpoint(tmp_path / "own", monitor="val_loss", save_last=True, save_top_k=2),
            pl.callbacks.EarlyStopping("val_loss", patience=9),
            pl.callbacks.Timer(duration="01:00:00:00"),
            pl.callbacks.LearningRateMonitor(),
            pl.callbacks.StochasticWeightAveraging(1e-3, swa_epoch_start=2),
        ]

    train(tmp_path, "run", callbacks=callbacks(), max_epochs=2)
    resumed = train(tmp_path, "run", callbacks=callbacks(), resume=True)
    assert len(resumed.history) == EPOCHS
    assert resumed.trainer.early_stopping_callback.best_score < 1
    assert len(resumed.trainer.checkpoint_callback.best_k_models) == 2


def test_a_run_that_was_killed_in_its_test_is_tested(whole: Run, tmp_path: Path) -> None:
    class StopInTest(pl.Callback):
        def on_test_start(self, *_: object) -> None:
            raise Stopped

    with pytest.raises(Stopped):
        train(tmp_path, "stopped", callbacks=[StopInTest()])
    assert_same_training(train(tmp_path, "stopped", weights=2, resume=True), whole)


def test_a_resumed_run_may_train_for_more_epochs(whole: Run, tmp_path: Path) -> None:
    train(tmp_path, "stopped", max_epochs=1)
    assert_same_training(resumed(tmp_path, starts_at=STEPS_PER_EPOCH), whole)


@pytest.fixture
def interrupts() -> Iterator[Any]:
    """The process's answer to Ctrl-C, which Lightning changes; a shell's `&` would have it be none."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_says_how_to_go_on_and_works_again_afterwards(tmp_path: Path, interrupts: Any) -> None:
    with pytest.raises(KeyboardInterrupt) as interrupt:
        train(tmp_path, "late", callbacks=[Stop(20, by=signal.SIGINT)])
    assert str(interrupt.value) == f"go on with `Trainer(resume=True, name='late', storage_path='{tmp_path}', …)`"
    assert signal.getsignal(signal.SIGINT) is interrupts


def test_a_run_that_died_before_its_first_checkpoint_resumes_from_the_start(
    whole: Run, tmp_path: Path, interrupts: Any
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, "stopped", checkpoint_every_n_steps=None, callbacks=[Stop(2, by=signal.SIGINT)])
    # There are no weights to go on from but the script's own.
    assert_same_training(train(tmp_path, "stopped", resume=True), whole)


# Names


def test_a_name_that_is_taken_is_refused_and_its_run_left_as_it_is(whole: Run) -> None:
    before = contents(whole.folder)
    with pytest.raises(RequestError) as error:
        train(whole.folder.parent, "whole")
    assert str(error.value) == (
        f"The run folder {whole.folder} exists: give --resume to go on with it, or another --name."
    )
    assert contents(whole.folder) == before
    assert os.listdir(whole.folder.parent) == ["whole"]


def test_there_is_nothing_to_resume_where_no_run_was_started(tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    with pytest.raises(RequestError, match=r"there is no run in .*/none to go on with"):
        train(storage, "none", resume=True)
    assert not storage.exists()
    with pytest.raises(RequestError, match="--resume needs --name"):
        Trainer(resume=True)


def test_a_run_that_cannot_start_leaves_nothing(tmp_path: Path) -> None:
    trainer = Trainer(storage_path=str(tmp_path / "runs"), name="run")
    with pytest.raises(RequestError, match="more than the 1151 training samples"):
        trainer.fit(SimpleModel(), MNISTDataModule("digits", batch_size=2000))
    with pytest.raises(RequestError, match="test needs a model: give it one, or call fit first"):
        trainer.test()
    assert not (tmp_path / "runs").exists()


# Models and data of one's own


class Own(pl.LightningModule):
    """Knows nothing of this project, and logs nothing but a metric of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(784, 12)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.layer(batch[0].flatten(1)), batch[1])
        self.log("own_loss", loss, on_step=False, on_epoch=True)
        return loss

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class OwnWithLogits(Own):
    """Tells more classes apart than the data has names for."""

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return {"logits": self.layer(batch[0].flatten(1))}


@pytest.mark.plots
@pytest.mark.parametrize(
    ("model", "plots"), [(Own, set()), (OwnWithLogits, {"confusion.png", "mistakes.png", "weights.png"})]
)
def test_a_model_of_ones_own_trains(tmp_path: Path, model: type[Own], plots: set[str]) -> None:
    run = train(tmp_path, "own", model=model)
    assert {run.result[key] for key in ("train_loss", "val_loss", "val_accuracy", "test_loss", "test_accuracy")} == {
        None
    }
    assert (run.result["steps"], run.result["test_samples"]) == (LAST, 359)
    # Without a val_loss the newest checkpoint is the best.
    assert run.result["best_checkpoint"] == checkpoint_name(LAST)
    assert run.checkpoints() == {checkpoint_name(LAST)}
    assert run.history[-1]["own_loss"] < run.history[0]["own_loss"]
    assert (
        (run.folder / "metrics.csv")
        .read_text()
        .startswith("epoch,step,train_loss,val_loss,val_accuracy,own_loss,samples_per_second,seconds\n1,17,,,,")
    )
    assert {path.name for path in run.folder.glob("plots/*")} == plots


@pytest.mark.plots
def test_a_datamodule_of_ones_own_trains_on_what_is_no_image(tmp_path: Path) -> None:
    data = sources.load("digits", Path())
    train_set = TensorDataset(data.train_images[:640].flatten(1) / 255, data.train_labels[:640])
    test_set = TensorDataset(data.test_images[:103].flatten(1) / 255, data.test_labels[:103])
    datamodule = pl.LightningDataModule.from_datasets(train_set, test_dataset=test_set, batch_size=32)
    trainer = Trainer(storage_path=str(tmp_path), name="own", max_epochs=1)
    trainer.fit(OwnWithLogits(), datamodule)
    values = trainer.result.values
    assert values["dataset"] == "LightningDataModule"
    counts = [values[key] for key in ("steps", "train_samples", "val_samples", "test_samples")]
    assert counts == [20, 640, 0, 103]
    assert os.listdir(tmp_path / "own/plots") == ["confusion.png"]


@pytest.mark.parametrize("several", [True, False])
def test_callbacks_are_ones_own_and_left_as_they_are(tmp_path: Path, several: bool) -> None:
    start = Start()
    callbacks = [start]
    train(tmp_path, "run", max_epochs=1, callbacks=callbacks if several else start)
    assert start.step == 0
    assert callbacks == [start]
