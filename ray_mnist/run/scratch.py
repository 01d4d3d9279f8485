"""Temporary folders, which go when a process was killed, and local copies in them of what is in an object store."""

import fcntl
import os
import posixpath
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow.fs

SCRATCH = "ray_mnist-scratch-"  # what the names of temporary folders begin with


@contextmanager
def local_file(location: str | None) -> Iterator[str | None]:
    """The file or folder at a path or URI as a local path, for the time of the `with`."""
    if location is None or "://" not in location:
        yield location
    else:
        with fetched(*pyarrow.fs.FileSystem.from_uri(location)) as path:
            yield path


@contextmanager
def fetched(fs: Any, path: str, folder: str | None = None) -> Iterator[str]:
    """A local copy of a file or a folder, in a scratch folder that is there for the time of the `with`."""
    with scratch_folder(folder) as here:
        local = os.path.join(here, posixpath.basename(path))
        aside = f"{local}.{uuid.uuid4().hex}"
        if fs.get_file_info(path).type == pyarrow.fs.FileType.Directory:
            os.mkdir(aside)
        pyarrow.fs.copy_files(path, aside, source_filesystem=fs)
        os.replace(aside, local)
        yield local


def scratch_path() -> str:
    """A path for a scratch folder that no other process will hit on."""
    return os.path.join(tempfile.gettempdir(), f"{SCRATCH}{uuid.uuid4().hex}")


@contextmanager
def scratch_folder(path: str | None = None) -> Iterator[str]:
    """A temporary folder, for the time of the `with`; those that killed processes left in the same place go.

    A process holds a lock on its folder for as long as it lives.
    """
    path = path or scratch_path()
    for left in Path(path).parent.glob(f"{SCRATCH}*"):
        # It is in use, or somebody else's, or gone by now.
        with suppress(OSError), locked(left, fcntl.LOCK_EX | fcntl.LOCK_NB):
            shutil.rmtree(left)
    with ExitStack() as held:
        locked_in_time = False  # before another process took it for one that was left
        while not locked_in_time:
            os.makedirs(path, mode=0o700, exist_ok=True)
            with suppress(FileNotFoundError):
                held.enter_context(locked(path, fcntl.LOCK_SH))
            locked_in_time = os.path.isdir(path)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def locked(folder: str | Path, how: int) -> Iterator[None]:
    """A lock on a folder, for the time of the `with`, of one of the kinds of `fcntl.flock`."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, how)
        yield
    finally:
        os.close(handle)
