"""Where the images of each data set come from: found on disk, downloaded, checked, read.

`prepare` makes sure that the files are there, `load` reads them. Whatever is wrong with either is a
`RequestError`. torchvision takes seconds to import, so it is imported where it is needed and no earlier.
"""

from __future__ import annotations

import gzip
import logging
import math
import os
import shutil
import socket
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from http.client import HTTPException
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import urlopen

import numpy as np
import torch
from filelock import BaseFileLock, FileLock, Timeout

from ray_mnist.errors import RequestError

MIRROR_SECONDS = 5.0  # the longest silence of a mirror, before its first answer and during a transfer
LOCK_SECONDS = 900.0  # the longest wait for another process that is fetching the same data set
LOCK_NOTICE_SECONDS = 5.0  # a wait for it that is longer than this is announced

MNIST_FILES = tuple(
    f"{part}-ubyte" for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
)
CIFAR10_FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")

logger = logging.getLogger(__name__)


class Images(NamedTuple):
    """A data set: images are uint8 tensors (N, C, H, W) of 0..255, labels int64 tensors (N,)."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


@dataclass(frozen=True)
class Source:
    """What is known of a data set before any of it is loaded, and how to read it.

    `files` are the names `read` needs, all of them in one of `folders` under `data_dir`; downloads go to
    the first of these. `torchvision_name` is the class that publishes the mirrors and md5 sums.
    """

    class_names: tuple[str, ...]
    read: Callable[[Path], Images]
    folders: tuple[str, ...] = (".",)
    files: tuple[str, ...] = ()
    torchvision_name: str = ""
    input_shape: tuple[int, int, int] = (1, 28, 28)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def find(self, data_dir: Path) -> Path | None:
        """The folder that holds all of `files`, raw or gzipped; None if there is none."""
        folders = (data_dir / folder for folder in self.folders)
        return next((f for f in folders if all(_stored(f, name) for name in self.files)), None)


def source_of(dataset: str) -> Source:
    """The source of that name. Raises RequestError for a name that is not in `SOURCES`."""
    if dataset not in SOURCES:
        raise RequestError(f"--dataset {dataset} is not known: use one of {', '.join(SOURCES)}.")
    return SOURCES[dataset]


def prepare(dataset: str, data_dir: Path, mirror: str | None = None) -> None:
    """Make sure that the files of `dataset` are in `data_dir`, downloading them if they are not.

    Files already there are used as they are, without network or write permission. Any number of
    processes, on any number of nodes that share `data_dir`, may call this at once: one of them fetches.

    `mirror` is a base URL that takes the place of torchvision's own mirrors. Raises RequestError if it is
    not an http(s) URL, if no mirror delivers, or if `data_dir` cannot be written.
    """
    source = source_of(dataset)
    mirrors = None if mirror is None else [_base_url(mirror)]
    if source.find(data_dir):
        return
    try:
        with _alone(dataset, data_dir):
            if not source.find(data_dir):
                _fetch(dataset, data_dir, mirrors)
    except OSError as error:
        raise RequestError(
            f"{dataset} is not in {data_dir} and cannot be put there ({error.strerror or error}): make that "
            "folder writable or name another one with --data.data_dir DIR."
        ) from error


def load(dataset: str, data_dir: Path) -> Images:
    """Read what `prepare` made sure of. Raises RequestError for a missing or damaged file."""
    source = source_of(dataset)
    folder = source.find(data_dir)
    if folder is None:
        raise RequestError(
            f"{dataset} is not in {data_dir / source.folders[0]}: let it be downloaded, or name the folder "
            "it is in with --data.data_dir DIR."
        )
    return source.read(folder)


# Downloading


def _base_url(mirror: str) -> str:
    """`mirror` with exactly one slash at its end. Raises RequestError if it is not an http(s) URL."""
    try:
        parts = urlsplit(mirror)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is not a number, or brackets that are no IPv6 address
        usable = False
    if not usable or parts.query or parts.fragment or any(c.isspace() for c in mirror):
        raise RequestError(
            f"The mirror {mirror!r} is not an http:// or https:// URL of a folder: write --data.mirror "
            "http://HOST/FOLDER/, or name a folder of this machine with --data.data_dir DIR."
        )
    return mirror.rstrip("/") + "/"


@contextmanager
def _alone(dataset: str, data_dir: Path) -> Iterator[None]:
    """Hold the lock of `dataset` in `data_dir`; the system frees it when its holder dies.

    Raises RequestError after LOCK_SECONDS, OSError if `data_dir` cannot be written.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(data_dir / f".{dataset}.lock")
    _acquire(lock, f"another process that is fetching {dataset} (it holds {lock.lock_file})")
    try:
        yield
    finally:
        lock.release()


def _acquire(lock: BaseFileLock, holder: str) -> None:
    with suppress(Timeout):
        lock.acquire(timeout=LOCK_NOTICE_SECONDS)
        return
    logger.warning("Waiting up to %g s for %s.", LOCK_SECONDS, holder)
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout as error:
        raise RequestError(
            f"Waited {LOCK_SECONDS:g} s in vain for {holder}: end it, or name another folder with --data.data_dir DIR."
        ) from error


def _fetch(dataset: str, data_dir: Path, mirrors: Sequence[str] | None) -> None:
    """Download `dataset` from the first mirror that delivers all of it intact.

    The files take their places complete and one at a time, so a process killed in between leaves fewer
    files than `Source.find` asks for, and never half of one. Needs the lock: it removes what killed
    processes left. Raises RequestError if no mirror delivers, OSError if `data_dir` cannot be written.
    """
    source = SOURCES[dataset]
    home = data_dir / source.folders[0]
    published_mirrors, archives = _published(source)
    failures = []
    for leftover in data_dir.glob(f".{dataset}-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for mirror in mirrors or published_mirrors:
        with TemporaryDirectory(dir=data_dir, prefix=f".{dataset}-") as temporary:
            logger.info("Downloading %s from %s into %s.", dataset, mirror, home)
            try:
                _download(mirror, archives, temporary)
            except (OSError, HTTPException, RuntimeError, ValueError) as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                failures.append(f"{mirror} ({reason.rstrip('.')})")
                continue
            home.mkdir(parents=True, exist_ok=True)
            for name in source.files:
                os.replace(next(Path(temporary).rglob(name)), home / name)
            return
    raise RequestError(
        f"{dataset} could not be downloaded from {' or '.join(failures)}: name a mirror with --data.mirror "
        f"URL, put the files in {home} or name the folder they are in with --data.data_dir DIR, or take "
        "--dataset digits, which needs no network."
    )


def _published(source: Source) -> tuple[Sequence[str], Sequence[tuple[str, str]]]:
    """The base URLs torchvision knows for `source`, and the (name, md5) of each archive there."""
    from torchvision import datasets

    publisher = getattr(datasets, source.torchvision_name)
    if issubclass(publisher, datasets.MNIST):
        return publisher.mirrors, publisher.resources
    return [publisher.url.removesuffix(publisher.filename)], [(publisher.filename, publisher.tgz_md5)]


def _download(mirror: str, archives: Sequence[tuple[str, str]], folder: str) -> None:
    """Download, check and extract `archives` into `folder`, quietly.

    Raises OSError, HTTPException, RuntimeError or ValueError, as urllib and torchvision do.
    """
    from torchvision.datasets.utils import download_and_extract_archive

    _await_answer(mirror + archives[0][0])
    with _bounded_sockets(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        for name, md5 in archives:
            download_and_extract_archive(mirror + name, folder, filename=name, md5=md5, remove_finished=True)


def _await_answer(url: str) -> None:
    """Raise TimeoutError unless the server answers, be it with an error, within MIRROR_SECONDS.

    A socket's own time-out does not cover the look-up of the name, and starts anew for each address.
    """
    answered = Event()

    def ask() -> None:
        # What goes wrong here at once goes wrong again in the download, which reports it. The socket gets
        # more time than the wait below, so that silence is reported by that, and only once.
        with suppress(Exception):
            urlopen(url, timeout=2 * MIRROR_SECONDS).close()
        answered.set()

    Thread(target=ask, daemon=True).start()
    if not answered.wait(MIRROR_SECONDS):
        raise TimeoutError(f"no answer within {MIRROR_SECONDS:g} s")


@contextmanager
def _bounded_sockets() -> Iterator[None]:
    """Give new sockets a time-out of MIRROR_SECONDS: torchvision calls urllib without one."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(MIRROR_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


# Reading


def _stored(folder: Path, name: str) -> Path | None:
    """The file `name` in `folder`, raw or gzipped; None if it is neither."""
    return next((p for p in (folder / name, folder / f"{name}.gz") if os.path.isfile(p)), None)


def _damaged(path: Path, what: str) -> RequestError:
    return RequestError(f"{path} {what}: delete it to fetch it anew, or put an intact one in its place.")


def _read_mnist_like(folder: Path) -> Images:
    """The four files of LeCun, Cortes and Burges. Raises RequestError if one of them is damaged."""
    return Images(*_read_pair(folder, MNIST_FILES[:2]), *_read_pair(folder, MNIST_FILES[2:]))


def _read_pair(folder: Path, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, uint8 (N, 1, 28, 28), and labels, int64 (N,), that belong to each other."""
    image_path, label_path = (_stored(folder, name) or folder / name for name in names)
    images, labels = _read_idx(image_path, 3), _read_idx(label_path, 1)
    if images.shape[1:] != (28, 28):
        raise _damaged(image_path, f"holds images of {images.shape[1]}x{images.shape[2]} pixels, not 28x28")
    if len(images) != len(labels):
        raise _damaged(label_path, f"holds {len(labels):,} labels for the {len(images):,} images of {image_path.name}")
    if labels.max() > 9:
        raise _damaged(label_path, f"holds the label {labels.max()}, and the classes are 0 to 9")
    return torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels).long()


def _read_idx(path: Path, dimensions: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """A file of unsigned bytes in the IDX format (LeCun et al., http://yann.lecun.com/exdb/mnist/).

    Two zeros, 8 for unsigned bytes, the number of dimensions; each dimension as a big-endian uint32; then
    the data, last dimension fastest. Raises RequestError if the file is anything else, or holds nothing.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, f"cannot be read ({error})") from error
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes([0, 0, 8, dimensions]):
        raise _damaged(path, f"is not an IDX file of unsigned bytes in {dimensions} dimension(s)")
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    if len(content) - header != math.prod(shape):
        raise _damaged(path, f"holds {len(content) - header:,} bytes where its header announces {math.prod(shape):,}")
    if shape[0] == 0:
        raise _damaged(path, "holds no samples")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()


def _read_cifar10(folder: Path) -> Images:
    """Krizhevsky's five training batches and one test batch, each checked against its md5 sum."""
    from torchvision.datasets import CIFAR10

    try:
        parts = [CIFAR10(folder.parent, train=train) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        raise _damaged(folder, "does not hold the files of CIFAR-10 as published") from error
    train, test = (
        (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)) for part in parts
    )
    return Images(*train, *test)


def _read_digits(_: Path) -> Images:
    """The 1,797 digits of scikit-learn (Alpaydin and Kaynak, UCI 1998): 8x8 of 0..16, shown at 28x28.

    The test set is every fifth sample of each class, 359 in all. The end of the file would be another
    task: its order is by writer, and the last writers, whom training would never see, are the hardest.
    Taking turns gives both sets the same writers and classes, without a draw that a seed could favour.
    """
    from sklearn.datasets import load_digits

    bundled = load_digits()
    grey = torch.from_numpy(bundled.images).float().mul(255 / 16).unsqueeze(1)
    images = torch.nn.functional.interpolate(grey, size=(28, 28), mode="bilinear").round().to(torch.uint8)
    labels = torch.from_numpy(bundled.target).long()
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    is_test[labels.argsort(stable=True)[::5][: len(labels) // 5]] = True
    return Images(images[~is_test], labels[~is_test], images[is_test], labels[is_test])


def _mnist_like(torchvision_name: str, class_names: Sequence[str], *other_folders: str) -> Source:
    folders = (f"{torchvision_name}/raw", *other_folders)
    return Source(tuple(class_names), _read_mnist_like, folders, MNIST_FILES, torchvision_name)


FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
KUZUSHIJI = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
OBJECTS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# The three MNIST-likes name their files alike, so files that lie in `data_dir` itself, outside a folder
# that says which of them they are, count as MNIST and nothing else.
SOURCES: dict[str, Source] = {
    "mnist": _mnist_like("MNIST", "0123456789", "."),
    "fashion-mnist": _mnist_like("FashionMNIST", FASHION),
    "kmnist": _mnist_like("KMNIST", KUZUSHIJI),
    "cifar10": Source(OBJECTS, _read_cifar10, ("cifar-10-batches-py",), CIFAR10_FILES, "CIFAR10", (3, 32, 32)),
    "digits": Source(tuple("0123456789"), _read_digits),
}
