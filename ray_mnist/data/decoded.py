"""The data sets decoded, in a file that all processes of a machine map: together they hold the images once."""

import errno
import hashlib
import logging
import os
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path

import torch
from filelock import FileLock

from ray_mnist.data import sources
from ray_mnist.errors import one_line

LOCK_SECONDS = 120.0  # the longest wait for another process that is decoding the same data set

logger = logging.getLogger(__name__)


def load(dataset: str, data_dir: Path) -> sources.Images:
    """As `sources.load`, in memory that this process shares with all others of the machine.

    Where that cannot be, such as on a full disk, a warning says so, and the process has memory of its own.
    """
    files = sources.files_of(dataset, data_dir)
    if not files:
        return sources.load(dataset, data_dir)
    try:
        path = _place(dataset, files)
        if not _is_intact(path):
            with FileLock(f"{path}.lock", timeout=LOCK_SECONDS):
                if not _is_intact(path):
                    _write(sources.load(dataset, data_dir), path)
        return sources.Images(*torch.load(path, mmap=True, weights_only=True))
    except OSError as error:
        images = sources.load(dataset, data_dir)
        logger.warning("Each process of this machine holds %s by itself: %s.", dataset, one_line(error).rstrip("."))
        return images


def _place(dataset: str, files: list[Path]) -> Path:
    """The file for what these hold, as our code reads it: another content has another name.

    Raises OSError if they cannot be read, or the folder is not this user's: what is in it is trained on.
    """
    folder = Path(tempfile.gettempdir(), f"ray_mnist_data-{os.geteuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.lstat().st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, "is another user's", str(folder))
    digest = hashlib.sha256()
    for file in (Path(sources.__file__), *files):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return folder / f"{dataset}-{digest.hexdigest()[:32]}.pt"


def _is_intact(path: Path) -> bool:
    """Whether the file is there, whole, and as it was written: torch's files are zip files, with checksums."""
    # zipfile has an error of its own for almost every byte that can be wrong.
    with suppress(Exception), zipfile.ZipFile(path) as file:
        return file.testzip() is None
    return False


def _write(images: sources.Images, path: Path) -> None:
    """Puts the file into its place in one go. Needs the lock. Raises OSError if there is no room for it."""
    unfinished = path.with_suffix(".unfinished")
    try:
        torch.save(tuple(images), unfinished)
        os.replace(unfinished, path)
    except RuntimeError as error:  # which is all that torch says of a full disk
        raise OSError(f"{path} cannot be written") from error
    finally:
        unfinished.unlink(missing_ok=True)
