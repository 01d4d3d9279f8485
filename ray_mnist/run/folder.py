"""The run folder: checkpoints, metrics and result, in a local folder or in an object store."""

import hashlib
import os
import posixpath
import shutil
import uuid
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs

from ray_mnist.errors import RequestError, one_line
from ray_mnist.run.scratch import fetched, scratch_folder

CHECKPOINT = "checkpoint.ckpt"
CHECKSUM = f"{CHECKPOINT}.sha256"  # as sha256sum writes it, and checks it with -c
READ_BYTES = 8 << 20  # at a time: an object store is asked anew for each


def checkpoint_name(step: int) -> str:
    """The folder of the checkpoint taken after `step` optimizer steps; names sort as steps do."""
    return f"checkpoint_{step:09d}"


def step_of(checkpoint: str) -> int:
    """How many optimizer steps the checkpoint of this name was taken after."""
    return int(checkpoint.rpartition("_")[2])


def checksum_line(file: Any, name: str = CHECKPOINT) -> bytes:
    """What `CHECKSUM` holds for a file of a checkpoint that is open, read to its end."""
    return f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n".encode()


def checksum_lines(source: Path) -> bytes:
    """What `CHECKSUM` holds for a checkpoint in the local folder `source`: one file, or in shards a folder of them."""
    lines = []
    for path in [source / CHECKPOINT, *sorted((source / CHECKPOINT).rglob("*"))]:
        if path.is_file():
            with path.open("rb") as file:
                lines.append(checksum_line(file, path.relative_to(source).as_posix()))
    return b"".join(lines)


@dataclass(frozen=True)
class Part:
    """What a rank has of a checkpoint in shards, of which each rank writes its own to an object store.

    `saved` tells this checkpoint from others of its name, as of a run that was resumed.
    """

    saved: str
    rank: int
    world_size: int

    def checksums(self, rank: int) -> str:
        """The name of the file with the checksums of a rank's part, which says that the part is there."""
        return f"part-{rank}-{self.saved}.sha256"


class RunFolder:
    """`<storage_path>/<name>/`, wherever pyarrow can write: a local path, s3://, gs://.

    Raises:
        RequestError: nothing here can write to such a storage path.
    """

    def __init__(self, storage_path: str, name: str) -> None:
        if "://" not in storage_path:
            storage_path = str(Path(storage_path).expanduser().absolute())
        self.storage_path, self.name = storage_path, name
        try:
            self.fs, root = pyarrow.fs.FileSystem.from_uri(storage_path)
        except (OSError, ValueError) as error:
            raise RequestError(f"--storage-path {storage_path} cannot be used: {one_line(error)}") from error
        self.path = posixpath.join(root, name)
        self._in_use: set[str] = set()  # folders aside

    def __str__(self) -> str:
        if "://" in self.storage_path:
            return posixpath.join(self.storage_path, self.name)
        short = os.path.relpath(self.path)
        return self.path if short.startswith("..") else short

    @property
    def is_local(self) -> bool:
        """Whether it is a path on this machine (which may be a shared mount)."""
        return isinstance(self.fs, pyarrow.fs.LocalFileSystem)

    def exists(self) -> bool:
        """Whether a run of this name was started."""
        return self.fs.get_file_info(self.path).type != pyarrow.fs.FileType.NotFound

    def has(self, file: str) -> bool:
        """Whether `file` is in the folder."""
        return self.fs.get_file_info(self.at(file)).type != pyarrow.fs.FileType.NotFound

    def at(self, file: str) -> str:
        """`file`'s path on `self.fs`."""
        return posixpath.join(self.path, file)

    def read(self, file: str) -> bytes:
        """The content of `file`; FileNotFoundError if it is not there."""
        with self.fs.open_input_stream(self.at(file)) as stream:
            content: bytes = stream.read()
        return content

    def write(self, file: str, content: bytes | str) -> None:
        """Writes `file` whole or not at all: a kill in between leaves what was there."""
        self.fs.create_dir(posixpath.dirname(self.at(file)))
        aside = self.at(f".{uuid.uuid4().hex}") if self.is_local else self.at(file)
        try:
            with self.fs.open_output_stream(aside) as stream:
                stream.write(content.encode() if isinstance(content, str) else content)
            if self.is_local:
                os.replace(aside, self.at(file))
        except OSError:
            if self.is_local:
                Path(aside).unlink(missing_ok=True)
            raise

    def remove(self) -> None:
        """Deletes the whole folder."""
        self.fs.delete_dir(self.path)

    @contextmanager
    def empty_ones_removed(self) -> Iterator[None]:
        """At the end of the `with`, the folder and those above it are gone again if they were not there and are empty.

        In an object store only the folder itself is: those above are no more than how names begin.
        """
        there = self.exists()
        places = [Path(self.path), *Path(self.path).parents] if self.is_local else []
        made = [path for path in places if not path.exists()]
        try:
            yield
        finally:
            for path in made:
                with suppress(OSError):  # it is not empty
                    path.rmdir()
            if not self.is_local and not there:
                with suppress(OSError):  # it has been removed
                    if not self.fs.get_file_info(pyarrow.fs.FileSelector(self.path)):
                        self.remove()

    def checkpoints(self) -> list[str]:
        """The names of the complete checkpoints, newest first."""
        return [name for name in self._checkpoint_folders() if self._whole(name)]

    def newest_sound_checkpoint(self, passed_over: Callable[[str, str], None]) -> str | None:
        """The newest checkpoint that is as it was written; None if there is none.

        Args:
            passed_over: takes the location of each newer one, and what is wrong with it.
        """
        for name in self._checkpoint_folders():
            if not (damage := self.damage(name)):
                return name
            passed_over(self.location(name), damage)
        return None

    def damage(self, name: str) -> str | None:
        """What is wrong with a checkpoint; None if it is as it was written.

        The file is read to its end. One that has no checksum, as of an older run, counts if it is complete.
        """
        if not self._whole(name):
            return "is not complete"
        if not self._as_written(name):
            return "has changed since it was written: its checksum is another"
        return None

    def _checkpoint_folders(self) -> list[str]:
        """The names of all checkpoints, whatever state they are in, newest first."""
        selector = pyarrow.fs.FileSelector(self.path, allow_not_found=True)
        found = [info for info in self.fs.get_file_info(selector) if info.type == pyarrow.fs.FileType.Directory]
        names = sorted((posixpath.basename(info.path) for info in found), reverse=True)
        return [name for name in names if name.startswith("checkpoint_")]

    def _as_written(self, name: str) -> bool:
        if (lines := self._checksums(name)) is None:
            return True
        for file, line in lines.items():
            if not self.has(f"{name}/{file}"):
                return False
            with self.fs.open_input_stream(self.at(f"{name}/{file}"), buffer_size=READ_BYTES) as stream:
                if checksum_line(stream, file) != f"{line}\n".encode():
                    return False
        return bool(lines)

    def _checksums(self, name: str) -> dict[str, str] | None:
        """The lines of `CHECKSUM`, by the files that they name; None if there is no such file."""
        if not self.has(f"{name}/{CHECKSUM}"):
            return None
        lines = self.read(f"{name}/{CHECKSUM}").decode(errors="replace").splitlines()
        return {line.partition("  ")[2] or "?": line for line in lines}

    def _whole(self, name: str) -> bool:
        info = self.fs.get_file_info(self.at(f"{name}/{CHECKPOINT}"))
        if info.type == pyarrow.fs.FileType.Directory:  # in shards, and the checksums come last
            files = self._checksums(name) or {}
            return bool(files) and all(self.has(f"{name}/{file}") for file in files)
        if info.type == pyarrow.fs.FileType.NotFound:
            return False
        # torch writes a zip, whose directory comes last: an upload that was cut off has none.
        with self.fs.open_input_file(info.path) as stream, suppress(ValueError):  # too short for a directory
            return zipfile.is_zipfile(stream)
        return False

    def add_checkpoint(
        self, source: str | Path, name: str, went_on: Callable[[], None] = lambda: None, part: Part | None = None
    ) -> None:
        """Takes the folder `source` in as checkpoint `name`, whole or not at all.

        One of `new_checkpoint` is moved where that can be, any other is copied, and `went_on` called for each 8 MiB.
        Its files get their checksums beside them. Of one in an object store the folder may be a `part`, and the
        checkpoint is whole once `join_parts` says so.
        """
        target = self.at(name)
        is_aside = self.is_local and Path(source).parent == Path(self.path)
        aside = str(source) if is_aside else self._aside(name) if self.is_local else target
        checksum = posixpath.join(aside, CHECKSUM if part is None else part.checksums(part.rank))
        if not is_aside:
            self.fs.create_dir(aside)
            # A kill leaves a new file without a checksum, and never one with that of the file it takes the place of.
            if not self.is_local and part is None and self.has(f"{name}/{CHECKSUM}"):
                self.fs.delete_file(checksum)
            self._copy(Path(source), aside, went_on)
        lines = checksum_lines(Path(source))
        with self.fs.open_output_stream(checksum) as stream:
            stream.write(lines)
        if self.is_local:
            shutil.rmtree(target, ignore_errors=True)
            os.rename(aside, target)

    def join_parts(self, name: str, part: Part) -> bool:
        """Makes a checkpoint whole, of which each rank adds a part: what was added, once all parts are there."""
        files = [f"{name}/{part.checksums(rank)}" for rank in range(part.world_size)]
        if not all(self.has(file) for file in files):
            return False
        self.write(f"{name}/{CHECKSUM}", b"".join(self.read(file) for file in files))
        return True

    def _copy(self, source: Path, target: str, went_on: Callable[[], None]) -> None:
        for path in sorted(source.rglob("*")):
            there = posixpath.join(target, path.relative_to(source).as_posix())
            if path.is_dir():
                self.fs.create_dir(there)
                continue
            with open(path, "rb") as file, self.fs.open_output_stream(there) as stream:
                while part := file.read(READ_BYTES):
                    stream.write(part)
                    went_on()

    @contextmanager
    def new_checkpoint(self, name: str) -> Iterator[Path]:
        """A local folder to write checkpoint `name` to, which may not be there yet, for the time of the `with`.

        Where the run folder is local, it is inside: what a kill leaves of it, `keep_only` deletes.
        """
        if self.is_local:
            aside = Path(self._aside(name))
            self._in_use.add(aside.name)
            try:
                yield aside
            finally:
                shutil.rmtree(aside, ignore_errors=True)
                self._in_use.discard(aside.name)
        else:
            with scratch_folder() as folder:
                yield Path(folder)

    def _aside(self, name: str) -> str:
        return self.at(f".{name}-{uuid.uuid4().hex}")

    def keep_only(self, *names: str | None, newer_than: str | None = None) -> None:
        """Deletes every checkpoint but these, and what a kill left half-written.

        Those that are `newer_than` a name stay: other ranks may be writing their parts of them.
        """
        selector = pyarrow.fs.FileSelector(self.path, allow_not_found=True)
        for info in self.fs.get_file_info(selector):
            name = posixpath.basename(info.path)
            kept = info.is_file is not False or name in names or name in self._in_use
            kept = kept or (newer_than is not None and name > newer_than)
            if name.startswith((".checkpoint_", "checkpoint_")) and not kept:
                self.fs.delete_dir(info.path)

    def location(self, checkpoint: str) -> str:
        """The path or URI of the checkpoint's file, or folder of shards, good wherever the storage path is."""
        file = posixpath.join(checkpoint, CHECKPOINT)
        return self.at(file) if self.is_local else posixpath.join(self.storage_path, self.name, file)

    @contextmanager
    def local_checkpoint(self, name: str | None) -> Iterator[str | None]:
        """The checkpoint's file, or folder of shards, as a local path, for the time of the `with`."""
        if name is None:
            yield None
        elif self.is_local:
            yield self.at(f"{name}/{CHECKPOINT}")
        else:
            with fetched(self.fs, self.at(f"{name}/{CHECKPOINT}")) as path:
                yield path
