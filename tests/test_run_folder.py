"""The run folder: whole files or none, the newest whole checkpoint, and tables that come back as they went."""

import csv
import json
import math
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest
import torch
from conftest import every_damage
from fsspec.implementations.memory import MemoryFileSystem

from ray_mnist import RequestError
from ray_mnist.errors import one_line
from ray_mnist.run.folder import CHECKPOINT, CHECKSUM, RunFolder, checkpoint_name
from ray_mnist.run.records import metrics_csv, read_metrics, throughput, to_json
from ray_mnist.run.scratch import scratch_folder


@pytest.fixture
def local(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "runs"), "run")


def in_memory() -> RunFolder:
    """A run folder in an object store: one that knows keys, and no renaming of a folder."""
    folder = RunFolder("/bucket", "run")
    store = MemoryFileSystem()
    store.store, store.pseudo_dirs = {}, [""]  # they are the class's, and would be the next test's too
    folder.fs = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(store))
    return folder


@pytest.fixture(params=["local", "object store"])
def folder(request: pytest.FixtureRequest) -> RunFolder:
    return request.getfixturevalue("local") if request.param == "local" else in_memory()


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[float], Path]:
    """Makes a folder with a checkpoint, as torch writes it, whose one weight is `value`."""

    def save(value: float) -> Path:
        source = tmp_path / "saved"
        source.mkdir(exist_ok=True)
        torch.save({"weight": torch.full((1000,), value)}, source / CHECKPOINT)
        return source

    return save


def weight(folder: RunFolder, name: str) -> float:
    with folder.local_checkpoint(name) as path:
        assert path is not None
        return torch.load(path)["weight"][0].item()


def names(folder: RunFolder) -> set[str]:
    """Everything in the run folder, hidden files too."""
    entries = folder.fs.get_file_info(pyarrow.fs.FileSelector(folder.path))
    return {Path(entry.path).name for entry in entries}


# Files


def test_a_file_comes_back_as_it_was_written(folder: RunFolder) -> None:
    assert not folder.exists()
    assert not folder.has("plots/loss.png")
    with pytest.raises(FileNotFoundError):
        folder.read("plots/loss.png")
    folder.write("plots/loss.png", bytes(range(256)))
    folder.write("config.yaml", "name: löss\n")
    folder.write("config.yaml", "name: new\n")
    assert folder.exists()
    assert folder.has("plots/loss.png")
    assert folder.read("plots/loss.png") == bytes(range(256))
    assert folder.read("config.yaml") == b"name: new\n"
    assert names(folder) == {"plots", "config.yaml"}
    folder.remove()
    assert not folder.exists()


class KilledInMidWrite(pyarrow.fs.LocalFileSystem):
    """The process is gone once half of a file is on the disk."""

    def open_output_stream(self, path: str, *_: Any, **__: Any) -> Any:
        class Stream:
            def __enter__(self) -> "Stream":
                return self

            def write(self, content: bytes) -> None:
                Path(path).write_bytes(content[: len(content) // 2])
                os.kill(os.getpid(), signal.SIGKILL)

            def __exit__(self, *_: object) -> None:
                pass

        return Stream()


def test_a_process_killed_in_mid_write_leaves_the_old_file(local: RunFolder) -> None:
    local.write("metrics.csv", "old")
    child = os.fork()
    if child == 0:
        try:
            local.fs = KilledInMidWrite()
            local.write("metrics.csv", "new and longer")
        finally:
            os._exit(3)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert len(names(local)) == 2  # it did write, aside
    assert local.read("metrics.csv") == b"old"
    local.write("metrics.csv", "newest")
    assert local.read("metrics.csv") == b"newest"


@pytest.mark.parametrize("storage_path", ["nosuch://bucket/runs", "http://host/runs", "file://relative/path"])
def test_a_storage_path_that_nothing_can_write_to_is_refused(storage_path: str) -> None:
    with pytest.raises(RequestError) as error:
        RunFolder(storage_path, "run")
    assert str(error.value).startswith(f"--storage-path {storage_path} cannot be used: ")
    assert "\n" not in str(error.value)


def test_a_storage_path_is_a_path_as_a_person_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    places = {
        "runs": tmp_path / "runs",
        "my runs/50%20ü#1": tmp_path / "my runs/50%20ü#1",
        "~/runs": tmp_path / "home/runs",
        f"file://{tmp_path}/uri": tmp_path / "uri",
    }
    for storage_path, place in places.items():
        folder = RunFolder(storage_path, "run")
        folder.write("file", "content")
        assert folder.is_local
        assert (place / "run/file").read_text() == "content"
    assert str(RunFolder("runs", "run")) == "runs/run"
    assert str(RunFolder("/elsewhere", "run")) == "/elsewhere/run"


# Checkpoints


def test_checkpoints_are_listed_newest_first(folder: RunFolder, saved: Callable[[float], Path]) -> None:
    assert folder.checkpoints() == []
    for step in (900, 1000, 99, 1_000_000):
        folder.add_checkpoint(saved(step), checkpoint_name(step))
    folder.write("metrics.csv", "")
    assert folder.checkpoints() == [checkpoint_name(step) for step in (1_000_000, 1000, 900, 99)]
    assert weight(folder, checkpoint_name(900)) == 900
    with folder.local_checkpoint(None) as path:
        assert path is None


@pytest.mark.parametrize("keep", [0, 100, -1000, -20, -1])
def test_a_checkpoint_cut_off_anywhere_does_not_count(
    folder: RunFolder, saved: Callable[[float], Path], keep: int
) -> None:
    folder.add_checkpoint(saved(1), checkpoint_name(1))
    folder.add_checkpoint(saved(2), checkpoint_name(2))
    whole = folder.read(f"{checkpoint_name(2)}/{CHECKPOINT}")
    folder.write(f"{checkpoint_name(2)}/{CHECKPOINT}", whole[:keep])
    assert folder.checkpoints() == [checkpoint_name(1)]


def sound(folder: RunFolder) -> tuple[str | None, list[str]]:
    """The newest sound checkpoint, and what is said of those that are passed over."""
    said: list[str] = []
    return folder.newest_sound_checkpoint(lambda location, why: said.append(f"{location} {why}")), said


@every_damage
def test_a_damaged_newest_checkpoint_is_passed_over_and_named(
    folder: RunFolder, saved: Callable[[float], Path], damage: Callable[[bytes], bytes], why: str
) -> None:
    assert sound(folder) == (None, [])
    for step in (1, 2):
        folder.add_checkpoint(saved(step), checkpoint_name(step))
    folder.write("checkpoint_manager.json", "")
    assert sound(folder) == (checkpoint_name(2), [])
    file = f"{checkpoint_name(2)}/{CHECKPOINT}"
    folder.write(file, damage(folder.read(file)))
    assert sound(folder) == (checkpoint_name(1), [f"{folder.location(checkpoint_name(2))} {why}"])
    folder.fs.delete_file(folder.at(f"{checkpoint_name(1)}/{CHECKSUM}"))
    assert sound(folder)[0] == checkpoint_name(1)  # as older runs wrote them


def test_sha256sum_checks_a_checkpoint(local: RunFolder, saved: Callable[[float], Path]) -> None:
    local.add_checkpoint(saved(1), checkpoint_name(1))
    check = ["sha256sum", "--check", CHECKSUM]
    done = subprocess.run(check, cwd=local.at(checkpoint_name(1)), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{CHECKPOINT}: OK\n")


def test_a_checkpoint_in_place_of_another_is_never_measured_by_the_others_checksum(
    saved: Callable[[float], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = in_memory()
    folder.add_checkpoint(saved(1), checkpoint_name(1))

    def killed(*_: object) -> bytes:
        raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr("ray_mnist.run.folder.checksum_line", killed)
        with pytest.raises(OSError, match="killed"):
            folder.add_checkpoint(saved(2), checkpoint_name(1))
    assert sound(folder) == (checkpoint_name(1), [])
    folder.add_checkpoint(saved(3), checkpoint_name(1))
    assert sound(folder) == (checkpoint_name(1), [])
    assert weight(folder, checkpoint_name(1)) == 3


def test_a_folder_without_its_checkpoint_does_not_count(folder: RunFolder, saved: Callable[[float], Path]) -> None:
    folder.add_checkpoint(saved(1), checkpoint_name(1))
    folder.write(f"{checkpoint_name(2)}/something-else", "content")
    folder.fs.create_dir(folder.at(checkpoint_name(3)))
    assert folder.checkpoints() == [checkpoint_name(1)]


def test_a_checkpoint_takes_the_place_of_one_of_its_name(folder: RunFolder, saved: Callable[[float], Path]) -> None:
    folder.write(f"{checkpoint_name(5)}/{CHECKPOINT}", "cut off")
    folder.add_checkpoint(saved(5), checkpoint_name(5))
    assert names(folder) == {checkpoint_name(5)}
    folder.add_checkpoint(saved(6), checkpoint_name(5))
    assert weight(folder, checkpoint_name(5)) == 6


def test_a_copy_that_breaks_off_leaves_no_checkpoint_and_is_cleared_away(
    local: RunFolder, saved: Callable[[float], Path]
) -> None:
    local.add_checkpoint(saved(1), checkpoint_name(1))

    def broken() -> None:
        raise OSError("disk gone")

    for step in (1, 2):
        with pytest.raises(OSError, match="disk gone"):
            local.add_checkpoint(saved(step + 10), checkpoint_name(step), broken)
    assert len(names(local)) == 3
    assert local.checkpoints() == [checkpoint_name(1)]
    assert weight(local, checkpoint_name(1)) == 1
    local.keep_only(checkpoint_name(1))
    assert names(local) == {checkpoint_name(1)}


def test_a_new_checkpoint_is_written_where_it_can_be_moved_from(folder: RunFolder) -> None:
    with folder.new_checkpoint(checkpoint_name(1)) as place:
        place.mkdir(parents=True, exist_ok=True)
        torch.save({"weight": torch.ones(1000)}, place / CHECKPOINT)
        inode = (place / CHECKPOINT).stat().st_ino
        assert folder.checkpoints() == []
        folder.add_checkpoint(place, checkpoint_name(1))
    assert not place.exists()
    assert names(folder) == {checkpoint_name(1)}
    assert weight(folder, checkpoint_name(1)) == 1
    if folder.is_local:
        assert Path(folder.at(f"{checkpoint_name(1)}/{CHECKPOINT}")).stat().st_ino == inode
    with suppress(OSError), folder.new_checkpoint(checkpoint_name(2)) as place:
        place.mkdir(parents=True, exist_ok=True)
        raise OSError("disk gone")
    assert not place.exists()


def test_the_temporary_folders_of_killed_processes_go_and_those_of_living_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "ray_mnist-notes").mkdir()
    others = {path.name for path in tmp_path.iterdir()}
    child = os.fork()
    if child == 0:
        try:
            with scratch_folder() as folder:
                Path(folder, CHECKPOINT).touch()
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(3)
    os.waitpid(child, 0)
    assert len(list(tmp_path.glob(f"ray_mnist-scratch-*/{CHECKPOINT}"))) == 1
    with scratch_folder() as mine, scratch_folder() as mine_too:
        assert {path.name for path in tmp_path.iterdir()} == others | {Path(mine).name, Path(mine_too).name}
    assert {path.name for path in tmp_path.iterdir()} == others


def test_only_the_named_checkpoints_are_kept(folder: RunFolder, saved: Callable[[float], Path]) -> None:
    folder.keep_only("nothing is there yet")
    for step in (1, 2, 3, 4):
        folder.add_checkpoint(saved(step), checkpoint_name(step))
    folder.write("checkpoint_notes.txt", "mine")
    folder.write("plots/loss.png", b"")
    folder.keep_only(checkpoint_name(4), checkpoint_name(2))
    assert folder.checkpoints() == [checkpoint_name(4), checkpoint_name(2)]
    folder.keep_only(checkpoint_name(4), None)
    assert names(folder) == {checkpoint_name(4), "checkpoint_notes.txt", "plots"}


def test_a_checkpoint_that_is_being_written_is_not_taken_for_what_a_kill_left(
    local: RunFolder, saved: Callable[[float], Path]
) -> None:
    with local.new_checkpoint(checkpoint_name(2)) as place:
        place.mkdir(parents=True)
        local.add_checkpoint(saved(1), checkpoint_name(1))
        local.keep_only(checkpoint_name(1))
        assert names(local) == {checkpoint_name(1), place.name}
    place.mkdir()  # what a kill leaves
    local.keep_only(checkpoint_name(1))
    assert names(local) == {checkpoint_name(1)}


def test_a_checkpoint_in_many_files_is_copied_part_by_part(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray_mnist.run.folder.READ_BYTES", 10)
    files = {".metadata": b"m", f"{CHECKPOINT}/0.distcp": bytes(range(25)), f"{CHECKPOINT}/1.distcp": b""}
    for name, content in files.items():
        (tmp_path / "saved" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "saved" / name).write_bytes(content)
    parts: list[None] = []
    folder.add_checkpoint(tmp_path / "saved", checkpoint_name(1), lambda: parts.append(None))
    assert {name: folder.read(f"{checkpoint_name(1)}/{name}") for name in files} == files
    assert len(parts) == 4


def killed_with_a_copy_at_hand(folder: RunFolder, name: str) -> None:
    child = os.fork()
    if child == 0:
        try:
            with folder.local_checkpoint(name):
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(3)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL


def test_a_copy_is_gone_with_its_use_and_one_of_a_killed_process_with_the_next(
    saved: Callable[[float], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = in_memory()
    folder.add_checkpoint(saved(1), checkpoint_name(1))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    copies = (tmp_path / "temporary").iterdir
    assert weight(folder, checkpoint_name(1)) == 1
    assert not list(copies())
    killed_with_a_copy_at_hand(folder, checkpoint_name(1))
    assert len(list(copies())) == 1
    with folder.local_checkpoint(checkpoint_name(1)) as path:
        assert path is not None
        assert [copy.name for copy in copies()] == [Path(path).parent.name]
        assert weight(folder, checkpoint_name(1)) == 1  # what is in use is not cleared away
        assert Path(path).is_file()
    assert not list(copies())


# Tables

ROWS = [
    {"epoch": 1, "step": 17, "train_loss": 0.1 + 0.2, "lr": 1e-3, "samples_per_second": 100.5, "seconds": 0.25},
    {"epoch": 2, "step": 34, "val_accuracy": 2 / 3, "val_loss": 1e-30, "samples_per_second": 50.0, "seconds": 1 / 3},
]


def test_metrics_come_back_to_the_last_digit(folder: RunFolder) -> None:
    assert read_metrics(folder) == []
    folder.write("metrics.csv", metrics_csv(ROWS))
    assert read_metrics(folder) == ROWS
    folder.write("metrics.csv", metrics_csv([]))
    assert read_metrics(folder) == []


def test_the_columns_are_the_contracts_with_the_users_own_in_between() -> None:
    contract = ["epoch", "step", "train_loss", "val_loss", "val_accuracy", "samples_per_second", "seconds"]
    assert next(csv.reader([metrics_csv([])])) == contract
    lines = metrics_csv(ROWS).splitlines()
    assert lines[0] == ",".join([*contract[:5], "lr", *contract[5:]])
    assert lines[1:] == [
        "1,17,0.30000000000000004,,,0.001,100.5,0.25",
        "2,34,,1e-30,0.6666666666666666,,50.0,0.3333333333333333",
    ]


def test_throughput_is_samples_over_time_not_the_mean_of_rates() -> None:
    # 1,000 samples in 10 s, 1,000 in 20 s.
    assert throughput([{"samples_per_second": 100.0}, {"samples_per_second": 50.0}]) == pytest.approx(2000 / 30)
    assert throughput([]) is None
    assert throughput([{"epoch": 1}]) is None


def test_json_has_no_word_of_its_own_for_what_is_not_finite() -> None:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    result = {
        "loss": math.nan,
        "seconds": {"fit": math.inf, "test": -math.inf, "total": 0.1 + 0.2},
        "name": "ü",
        "n": 3,
    }
    text = to_json(result)
    assert json.loads(text, parse_constant=refuse) == {
        "loss": None,
        "seconds": {"fit": None, "test": None, "total": 0.1 + 0.2},
        "name": "ü",
        "n": 3,
    }
    assert list(json.loads(text)) == list(result)
    assert text.endswith("}\n")


@pytest.mark.parametrize(
    ("error", "line"), [(OSError("no\n  space \t left\n"), "no space left"), (ValueError(), "ValueError")]
)
def test_an_error_fits_on_one_line(error: Exception, line: str) -> None:
    assert one_line(error) == line
