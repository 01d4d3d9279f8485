"""Checkpoints are uploaded beside the training: no storage holds it up, and none that fails loses one in silence."""

import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import use_s3_at, wait_until
from processes import processes

from ray_mnist import MNISTDataModule, SimpleModel, Trainer
from ray_mnist.callbacks import Recorder
from ray_mnist.cli.console import Display
from ray_mnist.distributed.collectives import gather
from ray_mnist.errors import TrainingError
from ray_mnist.run import uploads
from ray_mnist.run.events import EpochEnded, Event, StorageFails
from ray_mnist.run.folder import CHECKPOINT, RunFolder, checkpoint_name
from ray_mnist.run.progress import position
from ray_mnist.run.records import read_metrics
from ray_mnist.run.uploads import Saved, Uploads

SECONDS = 240  # more than anything here takes
STEPS_PER_EPOCH, LAST = 17, 34
# What the storages below put something else in place of, where they train.
PATCHED: list[Any] = [(RunFolder, "add_checkpoint"), (Uploads, "flush"), (uploads, "PATIENCE_S"), (uploads, "RETRY_S")]


def fit(folder: Path | str, num_workers: int = 0, name: str = "run", **options: Any) -> Trainer:
    """Two epochs over digits, from the same start."""
    pl.seed_everything(3, verbose=False)
    options = {"max_epochs": 2, "checkpoint_every_n_steps": 5, "logger": False} | options
    trainer = Trainer(num_workers=num_workers, storage_path=str(folder), name=name, **options)
    with pytest.MonkeyPatch.context() as patch:
        for owner, attribute in PATCHED:
            patch.setattr(owner, attribute, getattr(owner, attribute))
        trainer.fit(SimpleModel(), MNISTDataModule("digits"))
    return trainer


def weights(folder: Path | str, name: str = "run") -> dict[str, torch.Tensor]:
    """Those of the last step's checkpoint."""
    run = RunFolder(str(folder), name)
    assert run.checkpoints()[0] == checkpoint_name(LAST)
    with run.local_checkpoint(checkpoint_name(LAST)) as path:
        found: dict[str, torch.Tensor] = torch.load(path)["state_dict"]
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of a run that no storage disturbed, in this process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    fit(folder)
    return weights(folder)


def assert_equal(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


class Storage(pl.Callback):
    """Stands before the run folder in the process that trains."""

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.event, self.begun = threading.Event(), threading.Event()
            add = RunFolder.add_checkpoint

            def take(folder: RunFolder, source: Path, name: str, *more: Any) -> None:
                self.begun.set()
                self.before(name)
                add(folder, source, name, *more)

            RunFolder.add_checkpoint = take  # type: ignore[method-assign]

    def before(self, name: str) -> None:
        """What happens before it takes a checkpoint."""

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Waits after the first checkpoint, of which the next would take the place, until it is being taken."""
        if trainer.global_step > 5 and trainer.is_global_zero:
            assert self.begun.wait(SECONDS)

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            del self.event, self.begun  # only what can be sent goes home from a worker


class Shut(Storage):
    """Takes nothing until step `until` begins, or, if that is None, until somebody waits for it."""

    def __init__(self, until: int | None) -> None:
        self.until, self.taken, self.aside = until, list[str](), -1

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, module, stage)
        if stage == "fit" and self.until is None:
            flush, opens = Uploads.flush, self.event

            def open_and_flush(uploads: Uploads) -> None:
                opens.set()
                flush(uploads)

            Uploads.flush = open_and_flush  # type: ignore[method-assign]

    def before(self, name: str) -> None:
        assert self.event.wait(SECONDS)
        self.taken.append(name)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        super().on_train_batch_start(trainer)
        if trainer.global_step == self.until and trainer.is_global_zero:
            self.aside = len(list(Path(trainer.default_root_dir).glob(".checkpoint_*")))
            self.event.set()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_goes_on_while_the_storage_takes_nothing(
    num_workers: int, gloo: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = Shut(until=28)
    trainer = fit(tmp_path, num_workers, callbacks=[storage])
    # When it opens, that of step 5 is under way, that of the first epoch is the best, and that of step 25 the newest.
    assert storage.aside == 3
    assert storage.taken[:2] == [checkpoint_name(5), checkpoint_name(STEPS_PER_EPOCH)]
    assert not {checkpoint_name(step) for step in (10, 15, 20)} & set(storage.taken)
    folder = RunFolder(str(tmp_path), "run")
    assert folder.checkpoints() == [checkpoint_name(LAST)]
    assert not list(tmp_path.glob("run/.*"))
    assert [row["epoch"] for row in read_metrics(folder)] == [1, 2]
    shown = capsys.readouterr().out
    assert [line.split()[1] for line in shown.splitlines() if line.startswith("epoch")] == ["1/2", "2/2"]
    fit(tmp_path, num_workers, name="undisturbed")
    assert_equal(weights(tmp_path), weights(tmp_path, "undisturbed"))
    assert trainer.result.values["best_checkpoint"] == checkpoint_name(LAST)


class Ends(Shut):
    """Takes nothing until somebody waits for it; ends the run at step `at`, if not by itself; looks before the test."""

    def __init__(self, at: int | None = None) -> None:
        super().__init__(until=None)
        self.at, self.there = at, list[list[str]]()

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.at and trainer.is_global_zero:
            (recorder,) = (callback for callback in trainer.callbacks if isinstance(callback, Recorder))
            recorder.rank_zero.stop.set()

    def on_test_start(self, trainer: pl.Trainer, *_: Any) -> None:
        run = Path(trainer.default_root_dir)
        self.there = gather(trainer, RunFolder(str(run.parent), run.name).checkpoints())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_all_ranks_find_the_last_checkpoint_when_the_test_begins(num_workers: int, gloo: None, tmp_path: Path) -> None:
    ends = Ends()
    fit(tmp_path, num_workers, callbacks=[ends])
    assert ends.there == [[checkpoint_name(LAST)]] * max(1, num_workers)


def test_sigterm_ends_a_run_whose_checkpoint_is_there(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        fit(tmp_path, callbacks=[Ends(at=0)])
    assert end.value.code == 143
    assert len(RunFolder(str(tmp_path), "run").checkpoints()) == 1


class Fails(Storage):
    """Fails from checkpoint `at` on: so many times, or for ever; each step after the next waits for that."""

    def __init__(self, at: int, times: int | None = None) -> None:
        self.at, self.left, self.ended_at = at, times, -1

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, module, stage)
        if stage == "fit":
            uploads.RETRY_S = 0.01
            uploads.PATIENCE_S = 10  # steps, by the clock below

    def before(self, name: str) -> None:
        if name >= checkpoint_name(self.at) and self.left != 0:
            self.left = None if self.left is None else self.left - 1
            self.event.set()
            raise OSError("slow down")

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        super().on_train_batch_start(trainer)
        if trainer.is_global_zero:
            (recorder,) = (callback for callback in trainer.callbacks if isinstance(callback, Recorder))
            recorder.uploads.clock = lambda: trainer.global_step
            assert trainer.global_step <= self.at or self.event.wait(SECONDS)
            if trainer.global_step == self.at + 1 and self.left is not None:
                wait_until(lambda: self.left == 0, SECONDS, "the storage to be well again")

    def on_exception(self, trainer: pl.Trainer, *_: Any) -> None:
        self.ended_at = trainer.global_step


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_storage_that_fails_for_a_while_costs_a_line(
    num_workers: int, gloo: None, undisturbed: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = fit(tmp_path, num_workers, callbacks=[Fails(at=10, times=4)])
    shown = [line for line in capsys.readouterr().out.splitlines() if "trying again" in line]
    assert shown == [f"no checkpoint can be written to {tmp_path / 'run'}, trying again for up to 10 s: slow down"]
    assert trainer.result.values["restarts"] == 0
    assert RunFolder(str(tmp_path), "run").checkpoints() == [checkpoint_name(LAST)]
    if not num_workers:
        assert_equal(weights(tmp_path), undisturbed)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_storage_that_stays_away_ends_the_run_which_goes_on_later(
    num_workers: int, gloo: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fails = Fails(at=10)
    with pytest.raises(TrainingError) as error:
        fit(tmp_path, num_workers, callbacks=[fails])
    assert num_workers or fails.ended_at in (21, 22)  # and not at the end; that of step 5 may have taken until step 11
    newest = tmp_path / "run" / checkpoint_name(5) / CHECKPOINT
    assert str(error.value) == (
        f"no checkpoint could be written to {tmp_path / 'run'} for 10 s (slow down): {newest} is the newest one that "
        "is whole, go on with --resume once the storage is there again."
    )
    assert {path.name for path in tmp_path.glob("run/*checkpoint_*")} == {checkpoint_name(5)}
    fit(tmp_path, num_workers, resume=True)
    fit(tmp_path, num_workers, name="undisturbed")
    assert_equal(weights(tmp_path), weights(tmp_path, "undisturbed"))


# The uploads themselves


class Steps:
    """A run folder that takes a checkpoint as it is told: `part`, `fail` or `done`, each of which is awaited."""

    def __init__(self, folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.orders, self.followed = 0.0, queue.Queue[str](), queue.Queue[str]()
        self.told: list[Event] = []
        self.uploads = Uploads(folder, self.told.append, lambda: self.now)
        add = RunFolder.add_checkpoint

        def take(folder: RunFolder, source: Path, name: str, went_on: Callable[[], None], part: None) -> None:
            while (order := self.orders.get(timeout=SECONDS)) == "part":
                went_on()
                self.followed.put(order)
            self.followed.put(order)
            if order == "fail":
                raise OSError("no route to host")
            add(folder, source, name)

        monkeypatch.setattr(RunFolder, "add_checkpoint", take)
        monkeypatch.setattr(uploads, "RETRY_S", 0)

    def save(self, step: int, best: int | None = None, epochs: int = 0) -> None:
        held = ExitStack()
        place = held.enter_context(self.uploads.folder.new_checkpoint(checkpoint_name(step)))
        place.mkdir(parents=True)
        torch.save({"step": step}, place / CHECKPOINT)
        history = [{"epoch": epoch, "step": step} for epoch in range(1, epochs + 1)]
        name = None if best is None else checkpoint_name(best)
        self.uploads.add(Saved(checkpoint_name(step), place, held, name, history))

    def then(self, *orders: str) -> None:
        for order in orders:
            self.orders.put(order)
            assert self.followed.get(timeout=SECONDS) == order


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(RunFolder(str(tmp_path), "run"), monkeypatch)


def test_only_what_gets_further_than_before_is_a_reason_to_be_patient(steps: Steps) -> None:
    steps.save(1)
    for _ in range(3):
        steps.now += uploads.PATIENCE_S
        steps.uploads.check()
        steps.then("part")
    steps.then("fail")
    steps.now += uploads.PATIENCE_S
    steps.then("part", "part", "part")
    steps.uploads.check()
    steps.then("part")
    steps.now += uploads.PATIENCE_S
    steps.uploads.check()
    steps.then("fail", *("part", "fail") * 3)
    steps.now += 1
    with pytest.raises(TrainingError, match=r"for 600 s \(no route to host\): none is, go on with --resume once"):
        steps.uploads.check()
    steps.orders.put("done")


def test_a_storage_that_does_not_answer_is_gone_and_gets_nothing_later(steps: Steps, tmp_path: Path) -> None:
    with steps.uploads:
        steps.save(1, epochs=1)
        steps.then("part")
        steps.save(2)
        steps.now += uploads.PATIENCE_S + 1
        with pytest.raises(TrainingError, match=r"\(no answer\)"):
            steps.uploads.flush()
    steps.then("done")
    wait_until(steps.uploads._idle.is_set, SECONDS, "the upload to end")
    # Another run has the folder by now.
    assert [path.name for path in (tmp_path / "run").iterdir()] == [checkpoint_name(1)]
    assert steps.told == []


def test_who_waits_for_an_upload_that_goes_on_does_not_stand_still(steps: Steps) -> None:
    seen = [position().actions]
    steps.save(1)
    for order in ("part", "part", "fail", "part"):
        steps.then(order)
        wait_until(lambda: position().actions > seen[-1], SECONDS, "the upload to be seen going on")
        seen.append(position().actions)
    steps.then("done")
    steps.uploads.flush()


def test_a_best_checkpoint_that_waits_is_not_dropped_and_epochs_are_told_in_their_order(steps: Steps) -> None:
    steps.save(1)
    steps.then("part")
    steps.save(2, best=2, epochs=1)
    steps.save(3, best=2, epochs=2)
    steps.save(4, best=2, epochs=3)
    steps.then("done", "done", "done")
    steps.uploads.flush()
    assert steps.uploads.folder.checkpoints() == [checkpoint_name(4), checkpoint_name(2)]
    assert [event.row["epoch"] for event in steps.told if isinstance(event, EpochEnded)] == [1, 2, 3]
    assert steps.uploads.newest == checkpoint_name(4)


def test_what_is_under_way_when_a_training_breaks_off_is_waited_for(
    steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "LOOK_S", 0)  # that for its thread to end, once nobody waits any more
    steps.save(1)
    with ExitStack() as training:
        training.enter_context(pytest.raises(ValueError, match="a bug"))
        training.enter_context(steps.uploads)
        threading.Timer(0.1, lambda: steps.then("part", "done")).start()
        raise ValueError("a bug")
    assert steps.uploads.folder.checkpoints() == [checkpoint_name(1)]


# Object stores


def upload_and_die(storage_path: str, environment: dict[str, str]) -> None:
    """Is killed when the first of several parts is there."""
    os.environ.update(environment)
    folder = RunFolder(storage_path, "run")
    with folder.new_checkpoint(checkpoint_name(2)) as place:
        torch.save(torch.zeros(3 << 20), place / CHECKPOINT)
        folder.add_checkpoint(place, checkpoint_name(2), lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_a_process_killed_in_mid_upload_leaves_no_checkpoint(bucket: str, tmp_path: Path) -> None:
    storage_path = f"{bucket}/{tmp_path.name}"
    folder = RunFolder(storage_path, "run")
    with folder.new_checkpoint(checkpoint_name(1)) as place:
        torch.save(torch.zeros(3 << 20), place / CHECKPOINT)
        folder.add_checkpoint(place, checkpoint_name(1))
    uploading = processes.Process(target=upload_and_die, args=(storage_path, dict(os.environ)))
    uploading.start()
    uploading.join(SECONDS)
    assert uploading.exitcode == -signal.SIGKILL
    passed_over: list[str] = []
    assert folder.newest_sound_checkpoint(lambda *each: passed_over.append(each)) == checkpoint_name(1)
    assert folder.checkpoints() == [checkpoint_name(1)]
    assert not folder.has(f"{checkpoint_name(2)}/{CHECKPOINT}")


class S3:
    """moto's server as a process of its own, which forgets all it has when it is killed."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def start(self) -> None:
        command = ["-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self.process = subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_until(self.answers, SECONDS, "S3 to start")

    def answers(self) -> bool:
        with socket.socket() as asking:
            return asking.connect_ex(("127.0.0.1", self.port)) == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def s3() -> Iterator[S3]:
    server = S3()
    server.start()
    yield server
    server.kill()


class KillsStorage(pl.Callback):
    """S3 dies in step 7, and comes back in step 14, when a checkpoint has failed and training has gone on."""

    def __init__(self, s3: S3, told: list[Event], patch: pytest.MonkeyPatch) -> None:
        self.s3, self.told, self.patch = s3, told, patch

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 7:
            self.s3.kill()
        if trainer.global_step == 14:
            wait_until(lambda: any(isinstance(each, StorageFails) for each in self.told), SECONDS, "a failure")
            self.s3.start()
            use_s3_at(f"http://127.0.0.1:{self.s3.port}", self.patch)


@pytest.mark.slow
def test_an_object_store_may_be_killed_and_brought_back(
    s3: S3, undisturbed: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(uploads, "RETRY_S", 0.1)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    storage_path = use_s3_at(f"http://127.0.0.1:{s3.port}", monkeypatch)
    told: list[Event] = []
    show = Display.__call__
    monkeypatch.setattr(Display, "__call__", lambda display, event: (told.append(event), show(display, event))[1])
    fit(storage_path, callbacks=[KillsStorage(s3, told, monkeypatch)])
    assert RunFolder(storage_path, "run").checkpoints() == [checkpoint_name(LAST)]
    assert_equal(weights(storage_path), undisturbed)
    assert {path.name.partition("-")[0] for path in tmp_path.iterdir()} == {"ray_mnist_data"}
