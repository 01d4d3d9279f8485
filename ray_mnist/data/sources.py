"""The data sets: what is known of each, and their files found, checked and read.

torchvision publishes them. IDX files are read here: torchvision reads none that is gzipped, and names neither a damaged
file nor what is wrong with it. Whatever is wrong with a file is a `RequestError`.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torchvision.datasets import CIFAR10, KMNIST, MNIST, FashionMNIST  # no cost: Lightning has imported torchvision

from ray_mnist.errors import RequestError

MNIST_FILES = tuple(name.removesuffix(".gz") for name, _ in MNIST.resources)
MAX_BYTES = 4_000_000_000  # of one file: what it announces is held in memory
# It says which scikit-learn it is, and so which digits. To import that takes half a second.
SKLEARN = Path(find_spec("sklearn").origin)  # type: ignore[union-attr, arg-type]
CIFAR10_FILES = (*(name for name, _ in CIFAR10.train_list + CIFAR10.test_list), CIFAR10.meta["filename"])


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
    the first of these. `published` is torchvision's class, which knows the mirrors and md5 sums. `box` is how many
    pixels the longer side of what an image shows has.
    """

    class_names: tuple[str, ...]
    read: Callable[[Path], Images]
    folders: tuple[str, ...] = (".",)
    files: tuple[str, ...] = ()
    published: Any = None
    input_shape: tuple[int, int, int] = (1, 28, 28)
    box: int = 28

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


def files_of(dataset: str, data_dir: Path) -> list[Path]:
    """The files that `load` reads; none where there is nothing to read, or not all of it."""
    source = source_of(dataset)
    folder = source.find(data_dir)
    return [path for name in source.files if folder and (path := _stored(folder, name))]


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
    the data, last dimension fastest. Raises RequestError if the file is anything else, or holds nothing. No more of
    it is read, or decompressed, than its header announces, and one byte.
    """
    header = 4 + 4 * dimensions
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            head = stream.read(header)
            if len(head) < header or head[:4] != bytes([0, 0, 8, dimensions]):
                raise _damaged(path, f"is not an IDX file of unsigned bytes in {dimensions} dimension(s)")
            shape = struct.unpack_from(f">{dimensions}I", head, 4)
            announced = math.prod(shape)
            if announced > MAX_BYTES:
                raise _damaged(path, f"announces {announced:,} bytes in its header, and {MAX_BYTES:,} is the most")
            content = stream.read(announced + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, f"cannot be read ({error})") from error
    if len(content) > announced:
        raise _damaged(path, f"holds more than the {announced:,} bytes that its header announces")
    if len(content) < announced:
        raise _damaged(path, f"holds {len(content):,} bytes where its header announces {announced:,}")
    if shape[0] == 0:
        raise _damaged(path, "holds no samples")
    return np.frombuffer(content, np.uint8).reshape(shape).copy()


def _read_cifar10(folder: Path) -> Images:
    """Krizhevsky's five training batches and one test batch, each checked against its md5 sum."""
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
    Every fifth gives both sets the same writers and classes, without a draw that a seed could favour.
    """
    from sklearn.datasets import load_digits

    bundled = load_digits()
    grey = torch.from_numpy(bundled.images).float().mul(255 / 16).unsqueeze(1)
    images = torch.nn.functional.interpolate(grey, size=(28, 28), mode="bilinear").round().to(torch.uint8)
    labels = torch.from_numpy(bundled.target).long()
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    is_test[labels.argsort(stable=True)[::5][: len(labels) // 5]] = True
    return Images(images[~is_test], labels[~is_test], images[is_test], labels[is_test])


def _mnist_like(published: type[MNIST], *other_folders: str) -> Source:
    class_names = tuple(name.partition(" - ")[0] for name in published.classes)
    return Source(class_names, _read_mnist_like, (f"{published.__name__}/raw", *other_folders), MNIST_FILES, published)


OBJECTS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# The three MNIST-likes name their files alike, so files that lie in `data_dir` itself, outside a folder
# that says which of them they are, count as MNIST and nothing else.
SOURCES: dict[str, Source] = {
    "mnist": replace(_mnist_like(MNIST, "."), box=20),
    "fashion-mnist": _mnist_like(FashionMNIST),
    "kmnist": _mnist_like(KMNIST),
    "cifar10": Source(OBJECTS, _read_cifar10, (CIFAR10.base_folder,), CIFAR10_FILES, CIFAR10, (3, 32, 32)),
    "digits": Source(tuple("0123456789"), _read_digits, (str(SKLEARN.parent),), (SKLEARN.name,)),
}
