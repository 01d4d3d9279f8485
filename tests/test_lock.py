"""One run at a time writes into a run folder, and a run that died keeps nobody out."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest
import pytorch_lightning as pl
from conftest import wait_until
from processes import processes

from ray_mnist import MNISTDataModule, RequestError, SimpleModel, Trainer, tune
from ray_mnist.run import lock
from ray_mnist.run.folder import RunFolder

DIGITS = {"dataset": "digits"}


@pytest.fixture(params=["local", "object store"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> RunFolder:
    if request.param == "local":
        return RunFolder(str(tmp_path / "new/runs"), "run")
    return RunFolder(f"{request.getfixturevalue('bucket')}/{tmp_path.name}", "run")


def contents(folder: RunFolder) -> dict[str, bytes]:
    """The files in the run folder, hidden ones too."""
    selector = pyarrow.fs.FileSelector(folder.path, allow_not_found=True, recursive=True)
    files = [info.path for info in folder.fs.get_file_info(selector) if info.is_file]
    return {path.removeprefix(f"{folder.path}/"): folder.fs.open_input_stream(path).read() for path in files}


def claims(folder: RunFolder) -> dict[str, dict[str, Any]]:
    return {name: json.loads(text) for name, text in contents(folder).items() if name.startswith(lock.CLAIM)}


def claim_of(folder: RunFolder, unrenewed_s: float = 0, **changed: Any) -> str:
    """Another run's claim, like one of this process but for what is `changed`."""
    name = f"{lock.CLAIM}theirs"
    folder.write(name, json.dumps(json.loads(lock.myself()) | changed))
    if unrenewed_s:
        os.utime(folder.at(name), (time.time() - unrenewed_s,) * 2)
    return name


HOLD = """
import sys, signal
from ray_mnist.run.folder import RunFolder
from ray_mnist.run.lock import held
with held(RunFolder(sys.argv[1], "run")):
    print(flush=True)
    signal.pause()
"""


@contextmanager
def another_process(folder: RunFolder) -> Iterator[subprocess.Popen[bytes]]:
    """One that has the folder; it is not waited for, so that it is a zombie once it is killed."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, folder.storage_path], stdout=subprocess.PIPE)
    try:
        assert process.stdout
        assert process.stdout.readline() == b"\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_folder_is_one_runs_at_a_time(folder: RunFolder) -> None:
    with lock.held(folder) as existed:
        assert not existed
        folder.write("config.yaml", "mine")
        before = contents(folder)
        with pytest.raises(RequestError) as refusal, lock.held(folder):
            pass
        assert str(refusal.value) == (
            f"The folder {folder} is in use by process {os.getpid()} on {socket.gethostname()}: wait until that has "
            "ended, or end it, or give another --name."
        )
        assert contents(folder) == before
        assert len(claims(folder)) == 1
    assert contents(folder) == {"config.yaml": b"mine"}
    with lock.held(folder) as existed:
        assert existed


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_where_nothing_was_written(folder: RunFolder, error: Any, tmp_path: Path) -> None:
    with ExitStack() as stack:
        if error:
            stack.enter_context(pytest.raises(error))
        stack.enter_context(lock.held(folder))
        assert folder.exists()
        if error:
            raise error
    assert not folder.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_was_killed_keeps_nobody_out(folder: RunFolder) -> None:
    with another_process(folder) as process:
        with pytest.raises(RequestError, match=f"process {process.pid} on"), lock.held(folder):
            pass
        os.kill(process.pid, signal.SIGKILL)
        wait_until(lambda: lock.begun(process.pid) is None, 600, "the process to end")
        assert len(claims(folder)) == 1
        with lock.held(folder):
            assert [claim["pid"] for claim in claims(folder).values()] == [os.getpid()]


def test_a_process_id_that_is_used_again_is_another_process(folder: RunFolder) -> None:
    claim_of(folder, begun="1")
    with lock.held(folder):
        assert len(claims(folder)) == 1


def test_a_claim_that_was_cut_off_keeps_nobody_out(folder: RunFolder) -> None:
    folder.write(f"{lock.CLAIM}theirs", "")
    with lock.held(folder):
        assert len(claims(folder)) == 1


def test_a_run_on_another_machine_is_alive_as_long_as_it_renews_its_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "DEAD_S", 5000)
    folder = RunFolder(str(tmp_path), "run")
    there: dict[str, Any] = {"host": "far", "pid": 7, "machine": "another"}
    claim_of(folder, unrenewed_s=lock.DEAD_S - 2000, **there)
    with pytest.raises(RequestError) as refusal, lock.held(folder):
        pass
    end = re.escape(" or end it (if it died, try again in ") + r"(19\d\d|2000) s\), or give another --name\."
    assert re.search(f"is in use by process 7 on far: wait until that has ended,{end}$", str(refusal.value))
    claim_of(folder, unrenewed_s=lock.DEAD_S, **there)
    with lock.held(folder):
        assert len(claims(folder)) == 1


def test_an_object_store_tells_the_age_by_its_own_clock(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(bucket, "run")
    claim_of(folder, machine="another", host="far")
    monkeypatch.setattr(time, "time", lambda: 0.0)
    monkeypatch.setattr(lock, "DEAD_S", 2000)
    with pytest.raises(RequestError, match=r"on far: .* try again in (19\d\d|2000) s"), lock.held(folder):
        pass
    monkeypatch.setattr(lock, "DEAD_S", 0)
    with lock.held(folder):
        assert len(claims(folder)) == 1


def test_a_claim_is_renewed_and_a_storage_that_hiccups_is_no_reason_to_fail(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "RENEW_S", 0.01)
    write, tried = RunFolder.write, threading.Event()

    def fail(*_: Any) -> None:
        tried.set()
        raise OSError("throttled")

    with lock.held(folder):
        monkeypatch.setattr(RunFolder, "write", fail)
        assert tried.wait(240)
        [mine] = claims(folder)
        folder.fs.delete_file(folder.at(mine))
        monkeypatch.setattr(RunFolder, "write", write)
        wait_until(lambda: list(claims(folder)) == [mine], 600, "the claim to be written again")
    assert not folder.exists()


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (f"{tmp_path}/file/runs", "/proc/runs"):
        with pytest.raises(RequestError) as refusal, lock.held(RunFolder(place, "run")):
            pass
        assert re.fullmatch(f"--storage-path {place} cannot be written to: .*; use another folder.", str(refusal.value))


def test_a_disk_that_is_full_is_left_as_it_was(full_disk: Path) -> None:
    (full_disk / "large").write_bytes(bytes(64 * 1024))
    with pytest.raises(RequestError, match="No space left on device"), lock.held(RunFolder(str(full_disk), "run")):
        pass
    assert [path.name for path in full_disk.iterdir()] == ["large"]


# Runs


def fit(storage: Path, **options: Any) -> Trainer:
    trainer = Trainer(storage_path=str(storage), name="run", seed=0, **{"max_epochs": 2} | options)
    trainer.fit(SimpleModel(), MNISTDataModule("digits"))
    return trainer


class Pause(pl.Callback):
    """Stays in the second epoch for ever."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.current_epoch == 1:
            self.marker.touch()
            signal.pause()


def fit_and_pause(storage: Path, marker: Path) -> None:
    fit(storage, callbacks=[Pause(marker)], logger=False)


def test_a_second_run_changes_nothing_and_the_first_ones_death_lets_it_go_on(tmp_path: Path) -> None:
    folder, marker = RunFolder(str(tmp_path), "run"), tmp_path / "paused"
    first = processes.Process(target=fit_and_pause, args=(tmp_path, marker))
    first.start()
    try:
        wait_until(marker.exists, 600, "the second epoch")
        before = contents(folder)
        for resume in (True, False):
            with pytest.raises(RequestError, match=f"is in use by process {first.pid} on {socket.gethostname()}"):
                fit(tmp_path, resume=resume, max_epochs=3)
            assert contents(folder) == before
    finally:
        first.kill()
        first.join()
    trainer = fit(tmp_path, resume=True)
    assert [row["epoch"] for row in trainer.result.history] == [1, 2]
    assert claims(folder) == {}


class Fails(pl.Callback):
    def __init__(self, folder: RunFolder, error: BaseException) -> None:
        self.folder, self.error = folder, error

    def on_train_start(self, *_: Any) -> None:
        assert len(claims(self.folder)) == 1
        raise self.error


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt()])
def test_a_run_that_ends_early_leaves_the_folder_to_the_next(tmp_path: Path, error: BaseException) -> None:
    folder = RunFolder(str(tmp_path), "run")
    with pytest.raises(type(error)):
        fit(tmp_path, callbacks=[Fails(folder, error)])
    assert folder.has("config.yaml")
    assert claims(folder) == {}


@pytest.mark.parametrize("resume", [True, False])
def test_a_second_sweep_changes_nothing(tmp_path: Path, resume: bool) -> None:
    folder = RunFolder(str(tmp_path), "sweep")
    folder.write("config.yaml", "theirs")
    claim_of(folder)
    before = contents(folder)
    search: Callable[[], Any] = lambda: tune(  # noqa: E731
        SimpleModel,
        MNISTDataModule,
        {"model.lr": [0.1]},
        data=DIGITS,
        storage_path=str(tmp_path),
        name="sweep",
        resume=resume,
    )
    with pytest.raises(RequestError, match=f"The folder {folder} is in use by process {os.getpid()}"):
        search()
    assert contents(folder) == before
