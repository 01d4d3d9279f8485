"""Data sets are found, fetched once, checked and read; whatever is wrong is one sentence."""

import gzip
import hashlib
import io
import logging
import os
import pickle
import socket
import tarfile
import tempfile
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import wait_until
from processes import processes
from torchvision import datasets

from ray_mnist.data import download, sources
from ray_mnist.data.download import prepare
from ray_mnist.data.sources import MNIST_FILES, SOURCES, load
from ray_mnist.errors import RequestError


class Mirror(ThreadingHTTPServer):
    """Serves the files of a folder, and counts the requests.

    While `gate` is closed, the body of a large file stops half-way. `damage` is applied to each body.
    """

    daemon_threads = True

    def __init__(self, folder: Path, damage: Callable[[bytes], bytes] = bytes) -> None:
        super().__init__(("127.0.0.1", 0), MirrorHandler)
        self.folder, self.damage = folder, damage
        self.gate = threading.Event()
        self.gate.set()
        self.requests: Counter[str] = Counter()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/files"


class MirrorHandler(BaseHTTPRequestHandler):
    server: Mirror

    def do_GET(self) -> None:
        file = self.server.folder / Path(self.path).name
        self.server.requests[self.path] += 1
        if not self.path.startswith("/files/") or not file.is_file():
            return self.send_error(404)
        body = self.server.damage(file.read_bytes())
        half = len(body) // 2 if len(body) > 1_000_000 else len(body)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with suppress(ConnectionError):  # the client was killed, gave up, or wanted no more than the headers
            self.wfile.write(body[:half])
            self.server.gate.wait()
            self.wfile.write(body[half:])

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(folder: Path, damage: Callable[[bytes], bytes] = bytes) -> Iterator[Mirror]:
    with Mirror(folder, damage) as mirror:
        threading.Thread(target=mirror.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield mirror
        mirror.gate.set()
        mirror.shutdown()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def mirror(mnist_files: Path) -> Iterator[Mirror]:
    with serving(mnist_files) as server:
        yield server


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A folder that `lock_up` makes read-only, for root too; pytest's own cannot be entered by others."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            yield folder
        finally:
            if os.geteuid() != os.getuid():
                os.seteuid(os.getuid())
            folder.chmod(0o755)


def lock_up(folder: Path) -> None:
    """Take away this process's permission to write to `folder`."""
    folder.chmod(0o555)
    if os.geteuid() == 0:
        os.seteuid(65534)  # nobody: permissions mean nothing to root


def fetch(data_dir: Path, url: str, log: Path) -> None:
    """What a child process does."""
    download.LOCK_NOTICE_SECONDS = 0.1
    download.MIRROR_SECONDS = 600
    logging.basicConfig(filename=log, level=logging.WARNING)
    prepare("mnist", data_dir, url)


@contextmanager
def fetching(data_dir: Path, mirror: Mirror) -> Iterator[tuple[BaseProcess, Path]]:
    log = data_dir.with_name(f"{time.monotonic_ns()}.log")
    child = processes.Process(target=fetch, args=(data_dir, mirror.url, log))
    child.start()
    try:
        yield child, log
    finally:
        child.kill()
        child.join()


def is_half_way(data_dir: Path) -> bool:
    return any(f.stat().st_size > 1_000_000 for f in data_dir.glob(".mnist-*/train-images*"))


def is_waiting(log: Path) -> bool:
    return log.exists() and "Waiting up to 900 s for another process" in log.read_text()


@contextmanager
def fetching_and_waiting(data_dir: Path, mirror: Mirror) -> Iterator[tuple[BaseProcess, BaseProcess]]:
    """Two processes that ask for the same data set: the first is half-way, the second waits for it."""
    with fetching_half(data_dir, mirror) as first, fetching(data_dir, mirror) as (second, log):
        wait_until(lambda: is_waiting(log), 600, "the second process to wait")
        yield first, second


@contextmanager
def fetching_half(data_dir: Path, mirror: Mirror) -> Iterator[BaseProcess]:
    """A process that has fetched half of a file, and no more while the mirror's gate is closed."""
    mirror.gate.clear()
    with fetching(data_dir, mirror) as (child, _):
        wait_until(lambda: is_half_way(data_dir), 600, "half of a file")
        yield child


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


FETCHED = {".mnist.lock", *(f"MNIST/raw/{name}" for name in MNIST_FILES)}


def assert_intact(data_dir: Path, published: Path) -> None:
    """The published bytes are there, and nothing else."""
    assert contents(data_dir) == FETCHED
    assert {p.name for p in data_dir.iterdir()} == {".mnist.lock", "MNIST"}
    for name in MNIST_FILES:
        assert (data_dir / "MNIST/raw" / name).read_bytes() == gzip.decompress((published / f"{name}.gz").read_bytes())


def sentence(call: Callable[[], object]) -> str:
    """The one line that a call fails with."""
    with pytest.raises(RequestError) as failure:
        call()
    text = str(failure.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape) + values.tobytes()


def small_set(train: int = 5, test: int = 3) -> dict[str, bytes]:
    """A well-formed data set of a few made-up images."""
    rng = np.random.default_rng(0)
    return {
        name: idx(rng.integers(0, 10, (n, 28, 28) if "images" in name else (n,), dtype=np.uint8))
        for name, n in zip(MNIST_FILES, (train, train, test, test), strict=True)
    }


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def zipped(files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{name}.gz": gzip.compress(content) for name, content in files.items()}


# What is known, and what is already there


def test_the_published_mnist_is_read(mnist_files: Path) -> None:
    data = load("mnist", mnist_files)
    assert [tuple(t.shape) for t in data] == [(60000, 1, 28, 28), (60000,), (10000, 1, 28, 28), (10000,)]
    assert [t.dtype for t in data] == [torch.uint8, torch.int64] * 2
    assert data.train_labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert data.train_images.float().mean().div(255).item() == pytest.approx(0.1307, abs=1e-4)
    assert data.test_labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def test_what_is_known_of_each_data_set() -> None:
    assert list(SOURCES) == ["mnist", "fashion-mnist", "kmnist", "cifar10", "digits"]
    assert {source.num_classes for source in SOURCES.values()} == {10}
    assert SOURCES["mnist"].class_names == SOURCES["digits"].class_names == tuple("0123456789")
    assert [SOURCES[name].class_names[9] for name in ("fashion-mnist", "kmnist")] == ["Ankle boot", "wo"]
    assert SOURCES["fashion-mnist"].folders == ("FashionMNIST/raw",)
    assert (
        tuple(
            f"{part}-ubyte"
            for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
        )
        == MNIST_FILES
    )
    assert (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta") == sources.CIFAR10_FILES


@pytest.mark.parametrize("layout", [".", "MNIST/raw"])
@pytest.mark.parametrize("pack", [dict, zipped], ids=["raw", "gz"])
def test_files_there_need_neither_network_nor_permission(
    read_only: Path, no_network: None, layout: str, pack: Callable[..., dict[str, bytes]]
) -> None:
    files = small_set()
    write(read_only / layout, pack(files))
    before = contents(read_only)
    lock_up(read_only)
    prepare("mnist", read_only, None)
    data = load("mnist", read_only)
    assert contents(read_only) == before
    assert data.train_images.numpy().tobytes() == files[MNIST_FILES[0]][16:]
    assert data.test_labels.numpy().astype(np.uint8).tobytes() == files[MNIST_FILES[3]][8:]


@pytest.mark.parametrize("dataset", ["fashion-mnist", "kmnist"])
def test_loose_files_are_never_taken_for_another_data_set(tmp_path: Path, mirror: Mirror, dataset: str) -> None:
    write(tmp_path, small_set())
    write(tmp_path / "MNIST/raw", small_set())
    assert f"{dataset} is not in" in sentence(lambda: load(dataset, tmp_path))
    before = contents(tmp_path)
    # The mirror has MNIST under the very names that were asked for: its md5 sums give it away.
    text = sentence(lambda: prepare(dataset, tmp_path, mirror.url))
    assert f"{dataset} could not be downloaded from {mirror.url}/ (File not found or corrupted)" in text
    assert contents(tmp_path) == before | {f".{dataset}.lock"}


def test_digits_need_no_network_and_no_files(tmp_path: Path, no_network: None) -> None:
    prepare("digits", tmp_path / "none", None)
    data = load("digits", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert [tuple(t.shape) for t in data] == [(1438, 1, 28, 28), (1438,), (359, 1, 28, 28), (359,)]
    assert [t.dtype for t in data] == [torch.uint8, torch.int64] * 2
    assert data.train_images.max() == 255
    assert data.train_images.min() == 0
    assert data.test_labels.bincount().min() >= 35
    assert all(torch.equal(a, b) for a, b in zip(data, load("digits", tmp_path), strict=True))


def test_digits_can_be_learnt(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = load("digits", tmp_path)
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(784, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)
    )
    images = data.train_images / 255
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(10):
        for batch in torch.randperm(1150).split(64):
            loss = torch.nn.functional.cross_entropy(model(images[batch]), data.train_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    correct = model(data.test_images / 255).argmax(1) == data.test_labels
    assert correct.float().mean() >= 0.94


# Downloading


@pytest.mark.parametrize("slash", ["", "/", "//"])
def test_mnist_is_downloaded_quietly_and_only_once(
    tmp_path: Path, mirror: Mirror, mnist_files: Path, slash: str, capfd: pytest.CaptureFixture[str]
) -> None:
    prepare("mnist", tmp_path, mirror.url + slash)
    requests = mirror.requests.copy()
    prepare("mnist", tmp_path, mirror.url + slash)
    assert capfd.readouterr() == ("", "")
    assert set(requests) == {f"/files/{name}.gz" for name in MNIST_FILES}
    assert mirror.requests == requests
    assert_intact(tmp_path, mnist_files)
    assert socket.getdefaulttimeout() is None


def test_an_incomplete_set_is_completed(tmp_path: Path, mirror: Mirror, mnist_files: Path) -> None:
    write(tmp_path / "MNIST/raw", {MNIST_FILES[0]: b"half of it"})
    prepare("mnist", tmp_path, mirror.url)
    assert_intact(tmp_path, mnist_files)


def test_the_second_mirror_is_asked_if_the_first_fails(
    tmp_path: Path, mirror: Mirror, mnist_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(mnist_files, damage=lambda body: body[:-1] + b"?") as bad:
        monkeypatch.setattr(datasets.MNIST, "mirrors", [f"{bad.url}/", f"{mirror.url}/"])
        prepare("mnist", tmp_path, None)
        assert bad.requests
    assert_intact(tmp_path, mnist_files)


def test_two_processes_fetch_once(tmp_path: Path, mirror: Mirror, mnist_files: Path) -> None:
    prepare("mnist", tmp_path / "alone", mirror.url)
    alone = mirror.requests.copy()
    mirror.requests.clear()
    shared = tmp_path / "shared"
    with fetching_and_waiting(shared, mirror) as (first, second):
        mirror.gate.set()
        first.join()
        second.join()
    assert (first.exitcode, second.exitcode) == (0, 0)
    assert mirror.requests == alone
    assert_intact(shared, mnist_files)


def test_the_one_that_waits_takes_over_from_one_that_is_killed(
    tmp_path: Path, mirror: Mirror, mnist_files: Path
) -> None:
    shared = tmp_path / "shared"
    with fetching_and_waiting(shared, mirror) as (first, second):
        first.kill()
        first.join()
        mirror.gate.set()
        second.join()
    assert second.exitcode == 0
    assert_intact(shared, mnist_files)


def test_a_killed_download_is_never_taken_for_data(tmp_path: Path, mirror: Mirror, mnist_files: Path) -> None:
    data_dir = tmp_path / "data"
    with fetching_half(data_dir, mirror) as child:
        child.kill()
        child.join()
    assert is_half_way(data_dir)
    assert "mnist is not in" in sentence(lambda: load("mnist", data_dir))
    mirror.gate.set()
    prepare("mnist", data_dir, mirror.url)
    assert_intact(data_dir, mnist_files)


def test_a_lock_that_is_never_freed_is_an_error(
    tmp_path: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "LOCK_NOTICE_SECONDS", 0.1)
    monkeypatch.setattr(download, "LOCK_SECONDS", 0.2)
    with fetching_half(tmp_path / "data", mirror):
        text = sentence(lambda: prepare("mnist", tmp_path / "data", mirror.url))
    assert "Waited 0.2 s in vain for another process that is fetching mnist" in text


# Mirrors that fail


def test_a_mirror_that_never_answers_fails_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "MIRROR_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the system accepts, and nobody answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        text = sentence(lambda: prepare("mnist", tmp_path, url))
    assert f"mnist could not be downloaded from {url} (no answer within 0.3 s)" in text
    assert all(way_out in text for way_out in ("--data.mirror URL", "--data.data_dir DIR", "--dataset digits"))


def test_a_name_that_never_resolves_fails_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    def no_answer(*_: object, **__: object) -> None:
        over.wait(600)
        raise OSError("no such host")

    monkeypatch.setattr(download, "MIRROR_SECONDS", 0.3)
    monkeypatch.setattr(socket, "getaddrinfo", no_answer)
    text = sentence(lambda: prepare("mnist", tmp_path, "http://mirror.invalid/"))
    over.set()
    assert "no answer within 0.3 s" in text


def test_a_transfer_that_stalls_fails_in_time(tmp_path: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "MIRROR_SECONDS", 3)  # in which its thread answers
    mirror.gate.clear()
    text = sentence(lambda: prepare("mnist", tmp_path, mirror.url))
    assert "timed out" in text
    assert contents(tmp_path) == {".mnist.lock"}


@pytest.mark.parametrize("damage", [lambda body: body[:-1], lambda body: body[:-1] + b"?"], ids=["short", "changed"])
def test_a_damaged_file_is_not_accepted(tmp_path: Path, mnist_files: Path, damage: Callable[[bytes], bytes]) -> None:
    with serving(mnist_files, damage) as mirror:
        text = sentence(lambda: prepare("mnist", tmp_path, mirror.url))
    assert f"{mirror.url}/ (File not found or corrupted)" in text
    assert contents(tmp_path) == {".mnist.lock"}


def test_all_mirrors_and_their_reasons_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path) as empty, socket.create_server(("127.0.0.1", 0)) as closed:
        dead = f"http://127.0.0.1:{closed.getsockname()[1]}/"
        closed.close()
        monkeypatch.setattr(datasets.KMNIST, "mirrors", [dead, f"{empty.url}/"])
        text = sentence(lambda: prepare("kmnist", tmp_path / "data", None))
    assert f"kmnist could not be downloaded from {dead} (" in text
    assert "refused" in text
    assert f"or {empty.url}/ (HTTP Error 404: Not Found)" in text
    assert str(tmp_path / "data/KMNIST/raw") in text


@pytest.mark.parametrize(
    "url",
    [
        "",
        "mirror",
        "/data/mnist",
        "ftp://host/x",
        "file:///data",
        "http://",
        "http://host:port/",
        "http://a b/",
    ],
)
def test_a_mirror_that_is_no_url_is_refused(tmp_path: Path, no_network: None, url: str) -> None:
    text = sentence(lambda: prepare("mnist", tmp_path / "data", url))
    assert text.startswith(f"The mirror {url!r} is not an http:// or https:// URL")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("below", [".", "new/folder"])
def test_a_folder_that_cannot_be_written(read_only: Path, no_network: None, below: str) -> None:
    lock_up(read_only)
    text = sentence(lambda: prepare("mnist", read_only / below, None))
    assert f"mnist is not in {read_only / below} and cannot be put there (Permission denied)" in text


def test_a_data_dir_that_is_a_file(tmp_path: Path, no_network: None) -> None:
    (tmp_path / "file").touch()
    assert "cannot be put there" in sentence(lambda: prepare("mnist", tmp_path / "file", None))


@pytest.mark.parametrize("call", [lambda d: prepare("minst", d, None), lambda d: load("minst", d)])
def test_an_unknown_data_set(tmp_path: Path, call: Callable[[Path], object]) -> None:
    text = sentence(lambda: call(tmp_path))
    assert "--dataset minst" in text
    assert "mnist, fashion-mnist, kmnist, cifar10, digits" in text


def test_the_error_survives_pickling() -> None:
    copy = pickle.loads(pickle.dumps(RequestError("No.")))
    assert type(copy) is RequestError
    assert str(copy) == "No."


# Files that are there, and damaged

IMAGES, LABELS = MNIST_FILES[:2]
GOOD = small_set()


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        (IMAGES, GOOD[IMAGES][:-1], "holds 3,919 bytes where its header announces 3,920"),
        (IMAGES, GOOD[IMAGES] + b"\0", "holds more than the 3,920 bytes that its header announces"),
        (IMAGES, GOOD[IMAGES][:10], "is not an IDX file of unsigned bytes in 3 dimension(s)"),
        (IMAGES, GOOD[LABELS], "is not an IDX file of unsigned bytes in 3 dimension(s)"),
        (IMAGES, b"\0\0\x0d" + GOOD[IMAGES][3:], "is not an IDX file of unsigned bytes in 3 dimension(s)"),
        (IMAGES, b"", "is not an IDX file of unsigned bytes in 3 dimension(s)"),
        (IMAGES, idx(np.zeros((5, 32, 32), np.uint8)), "holds images of 32x32 pixels, not 28x28"),
        (LABELS, idx(np.zeros(0, np.uint8)), "holds no samples"),
        (LABELS, idx(np.zeros(4, np.uint8)), f"holds 4 labels for the 5 images of {IMAGES}"),
        (LABELS, idx(np.array([0, 1, 2, 3, 10], np.uint8)), "holds the label 10, and the classes are 0 to 9"),
        (f"{LABELS}.gz", b"garbage", "cannot be read (Not a gzipped file"),
        (f"{LABELS}.gz", gzip.compress(GOOD[LABELS])[:-9], "cannot be read (Compressed file ended"),
        (f"{LABELS}.gz", gzip.compress(GOOD[LABELS])[:10] + b"\xff" * 30, "cannot be read (Error -3"),
    ],
    ids="short long header ndim dtype empty 32x32 none fewer label garbage cut broken".split(),  # noqa: SIM905
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    write(tmp_path, GOOD)
    (tmp_path / name.removesuffix(".gz")).unlink()
    write(tmp_path, {name: content})
    text = sentence(lambda: load("mnist", tmp_path))
    assert text.startswith(f"{tmp_path / name} {complaint}")
    assert "delete it to fetch it anew" in text


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["raw", "gz"])
def test_sizes_that_overflow_are_refused_and_a_gzip_bomb_is_left_packed(
    tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    bomb = GOOD[IMAGES] + bytes(50_000_000)
    overflowing = bytes([0, 0, 8, 3]) + b"\xff" * 12 + bytes(50_000_000)
    for content, complaint in (
        (bomb, "holds more than the 3,920 bytes that its header announces"),
        (
            overflowing,
            "announces 79,228,162,458,924,105,385,300,197,375 bytes in its header",
        ),
    ):
        write(tmp_path, GOOD)
        (tmp_path / IMAGES).unlink()
        name = IMAGES if pack is bytes else f"{IMAGES}.gz"
        write(tmp_path, {name: pack(content)})
        tracemalloc.start()
        text = sentence(lambda: load("mnist", tmp_path))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert text.startswith(f"{tmp_path / name} {complaint}")
        assert peak < 5_000_000


@pytest.mark.parametrize("name", MNIST_FILES)
def test_a_missing_file(tmp_path: Path, name: str) -> None:
    write(tmp_path, GOOD)
    (tmp_path / name).unlink()
    assert f"mnist is not in {tmp_path / 'MNIST/raw'}" in sentence(lambda: load("mnist", tmp_path))


# CIFAR-10


@pytest.fixture
def cifar_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The archive of a made-up CIFAR-10 of two images a batch, in place of the published 170 MB."""
    rng = np.random.default_rng(0)
    batches = {
        name: {"data": rng.integers(0, 256, (2, 3072), dtype=np.uint8), "labels": [i, 9]}
        for i, name in enumerate(sources.CIFAR10_FILES[:-1])
    }
    packed = {name: pickle.dumps(batch) for name, batch in batches.items()}
    packed["batches.meta"] = pickle.dumps({"label_names": list(SOURCES["cifar10"].class_names)})
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in packed.items()}
    folder = tmp_path / "cifar"
    folder.mkdir()
    with tarfile.open(folder / datasets.CIFAR10.filename, "w:gz") as archive:
        for name, content in packed.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    published = (folder / datasets.CIFAR10.filename).read_bytes()
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(published).hexdigest())
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [[n, md5[n]] for n in sources.CIFAR10_FILES[:5]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(datasets.CIFAR10, "meta", datasets.CIFAR10.meta | {"md5": md5["batches.meta"]})
    return folder


def test_cifar10_from_the_mirror_to_tensors(tmp_path: Path, cifar_files: Path) -> None:
    data_dir = tmp_path / "data"
    with serving(cifar_files) as mirror:
        prepare("cifar10", data_dir, mirror.url)
        requests = mirror.requests.copy()
        prepare("cifar10", data_dir, mirror.url)
        assert mirror.requests == requests
    data = load("cifar10", data_dir)
    assert [tuple(t.shape) for t in data] == [(10, 3, 32, 32), (10,), (2, 3, 32, 32), (2,)]
    assert [t.dtype for t in data] == [torch.uint8, torch.int64] * 2
    assert data.train_labels.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    first = pickle.loads((data_dir / "cifar-10-batches-py/data_batch_1").read_bytes())["data"][0]
    assert np.array_equal(data.train_images[0].flatten(), first)
    assert contents(data_dir) == {
        ".cifar10.lock",
        *(f"cifar-10-batches-py/{name}" for name in sources.CIFAR10_FILES),
    }


def test_a_damaged_cifar10_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "cifar-10-batches-py", dict.fromkeys(sources.CIFAR10_FILES, b"?"))
    assert str(folder) in sentence(lambda: load("cifar10", tmp_path))
