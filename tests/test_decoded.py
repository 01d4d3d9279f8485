"""Decoded data sets: held once by all processes of a node, made once, and never taken for what they are not."""

import logging
import multiprocessing
import multiprocessing.util
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from conftest import altered, wait_until
from processes import processes

from ray_mnist import MNISTDataModule
from ray_mnist.data import decoded, sources
from ray_mnist.data.sources import MNIST_FILES
from ray_mnist.distributed.orders import EpochOrder

CIFAR10_BYTES = 60_000 * 3 * 32 * 32


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder of the test's own, for the processes that it starts too."""
    multiprocessing.util.get_temp_dir()  # multiprocessing's own stays where it is: its sockets' paths have to be short
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return write(tmp_path / "data", 50, 10)


@pytest.fixture(scope="module")
def large_data_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """As many bytes as CIFAR-10 has."""
    images = CIFAR10_BYTES // 28**2
    yield write(folder := tmp_path_factory.mktemp("large"), images * 5 // 6, images // 6)
    shutil.rmtree(folder)


def write(folder: Path, train: int, test: int) -> Path:
    """The files of an MNIST of so many made-up images."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for name, n in zip(MNIST_FILES, (train, train, test, test), strict=True):
        values = rng.integers(0, 10, (n, 28, 28) if "images" in name else (n,), dtype=np.uint8)
        header = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
        (folder / name).write_bytes(header + values.tobytes())
    return folder


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were decoded so far."""
    done: list[Path] = []
    load = sources.load

    def count(dataset: str, data_dir: Path) -> sources.Images:
        done.append(data_dir)
        return load(dataset, data_dir)

    monkeypatch.setattr(sources, "load", count)
    return done


def made(temporary: Path) -> list[Path]:
    """The decoded files."""
    return list(temporary.glob("ray_mnist_data-*/*.pt"))


def equal(one: sources.Images, other: sources.Images) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def unique_bytes() -> int:
    """The memory that this process has for itself."""
    return psutil.Process().memory_full_info().uss


def train(data_dir: Path, temporary: Path, parent: Connection) -> None:
    """What a process does: an epoch; then it tells, when asked, by how much its own memory has grown."""
    tempfile.tempdir = str(temporary)
    before = unique_bytes()
    module = MNISTDataModule(data_dir=str(data_dir), batch_size=1024)
    module.setup("fit")
    for loader in (module.train_dataloader(), module.val_dataloader(), module.test_dataloader()):
        for _ in loader:
            pass
    parent.send("done")
    parent.recv()
    parent.send(unique_bytes() - before)
    parent.recv()  # it stays until all have measured


def check(data_dir: Path, temporary: Path, parent: Connection) -> None:
    """What a process does that is to start a run; then it tells by how much its own memory has grown."""
    tempfile.tempdir = str(temporary)
    module = MNISTDataModule(data_dir=str(data_dir))
    before = unique_bytes()
    module.check(world_size=4)
    parent.send(unique_bytes() - before)


def test_processes_hold_the_data_once_together(large_data_dir: Path, temporary: Path) -> None:
    pipes = [processes.Pipe() for _ in range(3)]
    children = [processes.Process(target=train, args=(large_data_dir, temporary, there)) for _, there in pipes]
    try:
        for child in children:
            child.start()
        assert [here.recv() for here, _ in pipes] == ["done"] * 3
        growths = []
        for here, _ in pipes:
            here.send("measure")
            growths.append(here.recv())
    finally:
        for child in children:
            child.kill()
            child.join()
    assert len(made(temporary)) == 1
    assert max(growths) < CIFAR10_BYTES / 4, growths


def has_imported_sklearn(temporary: Path, parent: Connection) -> None:
    tempfile.tempdir = str(temporary)
    MNISTDataModule("digits").setup("fit")
    parent.send("sklearn" in sys.modules)


def test_the_first_process_alone_imports_what_brings_the_digits(temporary: Path) -> None:
    here, there = processes.Pipe()
    for first in (True, False):
        child = processes.Process(target=has_imported_sklearn, args=(temporary, there))
        child.start()
        assert here.recv() == first
        child.join()


def test_the_check_keeps_none_of_the_data(large_data_dir: Path, temporary: Path) -> None:
    here, there = processes.Pipe()
    child = processes.Process(target=check, args=(large_data_dir, temporary, there))
    child.start()
    grown = here.recv()
    child.join()
    assert grown < CIFAR10_BYTES / 4


def test_the_check_and_the_training_decode_once_together(data_dir: Path, decodings: list[Path]) -> None:
    module = MNISTDataModule(data_dir=str(data_dir), batch_size=8)
    module.check(world_size=1)
    module.setup("fit")
    assert decodings == [data_dir]


def test_of_two_at_once_one_decodes(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrived, go, decodings, found = [], threading.Event(), [], []
    load = sources.load

    class Lock(decoded.FileLock):  # type: ignore[misc, valid-type]
        def acquire(self, *arguments: Any, **options: Any) -> Any:
            arrived.append(1)
            return super().acquire(*arguments, **options)

    def slowly(dataset: str, data_dir: Path) -> sources.Images:
        decodings.append(1)
        assert go.wait(240)
        return load(dataset, data_dir)

    monkeypatch.setattr(decoded, "FileLock", Lock)
    monkeypatch.setattr(sources, "load", slowly)
    threads = [threading.Thread(target=lambda: found.append(decoded.load("mnist", data_dir))) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: len(arrived) == 2 and decodings != [], 600, "both to want to decode")
    finally:
        go.set()
        for thread in threads:
            thread.join()
    assert len(decodings) == 1
    assert equal(*found)


def test_one_that_is_never_done_keeps_nobody_waiting(
    data_dir: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = decoded.load("mnist", data_dir)
    [path] = made(temporary)
    path.unlink()
    monkeypatch.setattr(decoded, "LOCK_SECONDS", 0.1)
    with decoded.FileLock(f"{path}.lock"), caplog.at_level(logging.WARNING):
        assert equal(decoded.load("mnist", data_dir), whole)
    assert "Each process of this machine holds mnist by itself: The file lock" in caplog.text


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-100],
        lambda content: content[: len(content) // 2],
        altered,
        lambda content: content[:-50] + altered(content[-50:]),
        lambda content: altered(content[:2000]) + content[2000:],
    ],
    ids=["empty", "cut off", "half", "altered", "altered end", "altered beginning"],
)
def test_a_damaged_file_is_made_anew(
    data_dir: Path, temporary: Path, decodings: list[Path], damage: Callable[[bytes], bytes]
) -> None:
    whole = sources.Images(*(each.clone() for each in decoded.load("mnist", data_dir)))
    [path] = made(temporary)
    damaged = path.with_name("damaged")
    damaged.write_bytes(damage(path.read_bytes()))
    os.replace(damaged, path)
    decodings.clear()
    assert equal(decoded.load("mnist", data_dir), whole)
    assert equal(decoded.load("mnist", data_dir), whole)
    assert decodings == [data_dir]


def test_other_data_in_the_same_place_is_decoded_anew(data_dir: Path, decodings: list[Path]) -> None:
    decoded.load("mnist", data_dir)
    images = data_dir / MNIST_FILES[0]
    images.write_bytes(images.read_bytes()[:-1] + b"\xff")
    assert decoded.load("mnist", data_dir).train_images[-1, 0, -1, -1] == 255
    assert len(decodings) == 2


def test_the_data_folder_is_only_read(data_dir: Path, temporary: Path, decodings: list[Path]) -> None:
    before = sorted(data_dir.iterdir())
    for _ in range(2):
        decoded.load("mnist", data_dir)
    assert sorted(data_dir.iterdir()) == before
    assert decodings == [data_dir]
    assert [path.stat().st_mode & 0o077 for path in temporary.iterdir()] == [0]


def test_what_a_process_writes_to_its_samples_is_its_own(data_dir: Path, decodings: list[Path]) -> None:
    mine = decoded.load("mnist", data_dir)
    whole = mine.train_images.clone()
    mine.train_images.zero_()
    assert torch.equal(decoded.load("mnist", data_dir).train_images, whole)
    assert decodings == [data_dir]


def assert_held_by_itself(data_dir: Path, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert equal(decoded.load("mnist", data_dir), sources.load("mnist", data_dir))
    [text] = caplog.messages
    assert text.startswith("Each process of this machine holds mnist by itself: ")
    assert reason in text


def test_a_full_disk_is_no_hindrance(
    tmp_path: Path, full_disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(full_disk))
    assert_held_by_itself(write(tmp_path / "data", 500, 10), ".pt cannot be written", caplog)
    assert [path.suffix for path in full_disk.rglob("*") if path.is_file()] == [".lock"]


def test_another_users_folder_is_not_trusted(
    data_dir: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    decoded.load("mnist", data_dir)
    [folder] = temporary.iterdir()
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    folder.rename(temporary / f"ray_mnist_data-{owner + 1}")
    assert_held_by_itself(data_dir, "is another user's", caplog)


def test_batches_are_bit_for_bit_those_of_a_split_in_memory(data_dir: Path) -> None:
    module = MNISTDataModule(data_dir=str(data_dir), batch_size=8, seed=3)
    module.setup("fit")
    data = sources.load("mnist", data_dir)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(3))
    images, labels = data.train_images[order], data.train_labels[order]
    epoch = torch.tensor(list(EpochOrder(40, 3)))
    trained = list(module.train_dataloader())
    assert len(trained) == 5
    for rows, batch in zip(epoch.split(8), trained, strict=True):
        assert torch.equal(batch[0], images[10:][rows])
        assert torch.equal(batch[1], labels[10:][rows])
    [val], [test] = module.val_dataloader(), module.test_dataloader()
    assert torch.equal(val[0], images[:10])
    assert torch.equal(val[1], labels[:10])
    assert torch.equal(test[0], data.test_images)
    assert torch.equal(test[1], data.test_labels)
