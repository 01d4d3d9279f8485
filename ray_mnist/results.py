"""The run folder: checkpoints, metrics and result, in a local folder or in an object store."""

import csv
import io
import json
import os
import posixpath
import shutil
import tempfile
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.fs

from ray_mnist.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor  # slow to import

CHECKPOINT = "checkpoint.ckpt"
FAILURES = "failures.jsonl"
Row = dict[str, float]


def checkpoint_name(step: int) -> str:
    """The folder of the checkpoint taken after `step` optimizer steps; names sort as steps do."""
    return f"checkpoint_{step:09d}"


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
        with self.fs.open_output_stream(aside) as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
        if self.is_local:
            os.replace(aside, self.at(file))

    def remove(self) -> None:
        """Deletes the whole folder."""
        self.fs.delete_dir(self.path)

    def checkpoints(self) -> list[str]:
        """The names of the complete checkpoints, newest first."""
        selector = pyarrow.fs.FileSelector(self.path, allow_not_found=True)
        names = [posixpath.basename(info.path) for info in self.fs.get_file_info(selector)]
        return [name for name in sorted(names, reverse=True) if name.startswith("checkpoint_") and self._whole(name)]

    def _whole(self, name: str) -> bool:
        file = f"{name}/{CHECKPOINT}"
        if not self.has(file):
            return False
        # torch writes a zip, whose directory comes last: an upload that was cut off has none.
        with self.fs.open_input_file(self.at(file)) as stream, suppress(ValueError):  # too short for a directory
            return zipfile.is_zipfile(stream)
        return False

    def add_checkpoint(self, source: str | Path, name: str) -> str:
        """Copies the folder `source` in as checkpoint `name`, whole or not at all; returns its path on `self.fs`."""
        target = self.at(name)
        aside = self.at(f".{name}-{uuid.uuid4().hex}") if self.is_local else target
        self.fs.create_dir(aside)
        pyarrow.fs.copy_files(str(source), aside, destination_filesystem=self.fs)
        if self.is_local:
            shutil.rmtree(target, ignore_errors=True)
            os.rename(aside, target)
        return target

    def keep_only(self, *names: str | None) -> None:
        """Deletes every checkpoint but these, and what a kill left half-written."""
        selector = pyarrow.fs.FileSelector(self.path, allow_not_found=True)
        for info in self.fs.get_file_info(selector):
            name = posixpath.basename(info.path)
            if name.startswith((".checkpoint_", "checkpoint_")) and info.is_file is False and name not in names:
                self.fs.delete_dir(info.path)

    def location(self, checkpoint: str) -> str:
        """The path or URI of the checkpoint's file, good wherever the storage path is."""
        return posixpath.join(self.storage_path, self.name, checkpoint, CHECKPOINT)

    @contextmanager
    def local_checkpoint(self, name: str | None) -> Iterator[str | None]:
        """The checkpoint's file as a local path, for the time of the `with`."""
        if name is None:
            yield None
        elif self.is_local:
            yield self.at(f"{name}/{CHECKPOINT}")
        else:
            with fetched(self.fs, self.at(f"{name}/{CHECKPOINT}")) as path:
                yield path


@contextmanager
def fetched(fs: Any, path: str) -> Iterator[str]:
    """A local copy of a file, for the time of the `with`."""
    with tempfile.TemporaryDirectory(prefix="ray_mnist-") as folder:
        local = os.path.join(folder, posixpath.basename(path))
        pyarrow.fs.copy_files(path, local, source_filesystem=fs)
        yield local


@contextmanager
def local_file(location: str | None) -> Iterator[str | None]:
    """The file at a path or URI as a local path, for the time of the `with`."""
    if location is None or "://" not in location:
        yield location
    else:
        with fetched(*pyarrow.fs.FileSystem.from_uri(location)) as path:
            yield path


@dataclass
class Afterwards:
    """What Lightning's Trainer shows once it is done, as rank 0 brings it home from the workers."""

    callback_metrics: dict[str, "Tensor"]
    logged_metrics: dict[str, "Tensor"]
    progress_bar_metrics: dict[str, float]
    current_epoch: int
    global_step: int
    # The attributes of the callbacks and loggers, in their order, and those of the model that changed.
    helpers: list[dict[str, Any]] = field(default_factory=list)
    model: dict[str, Any] = field(default_factory=dict)


@dataclass
class Evaluation:
    """What came of `validate` or `test` (`metrics`, one dictionary a loader) or of `predict`."""

    after: Afterwards
    metrics: list[dict[str, float]] = field(default_factory=list)
    predictions: list[Any] | None = None


@dataclass
class Outcome:
    """What came of `fit`, and of the test that ends it."""

    after: Afterwards
    device: str
    history: list[Row]
    steps: int
    train_samples: int
    val_samples: int
    best_checkpoint: str | None
    started: float
    fit_seconds: float
    test_seconds: float = 0.0
    test_samples: int = 0
    test_metrics: list[dict[str, float]] = field(default_factory=list)  # one dictionary a loader
    confusion: list[list[int]] | None = None
    mistakes: list[dict[str, Any]] = field(default_factory=list)


FIRST_COLUMNS = ("epoch", "step", "train_loss", "val_loss", "val_accuracy")
LAST_COLUMNS = ("samples_per_second", "seconds")


def metrics_csv(history: list[Row]) -> str:
    """One row an epoch; metrics of the user's own come between ours."""
    names = dict.fromkeys(name for row in history for name in row)
    own = [name for name in names if name not in FIRST_COLUMNS + LAST_COLUMNS]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*FIRST_COLUMNS, *own, *LAST_COLUMNS], lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue()


def read_metrics(folder: RunFolder) -> list[Row]:
    """The rows of `metrics.csv` so far, none if there is no such file yet."""
    try:
        text = folder.read("metrics.csv").decode()
    except FileNotFoundError:
        return []
    return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(io.StringIO(text))]


def read_failures(folder: RunFolder) -> list[str]:
    """What went wrong with the workers, and what came of it: a line for each time that some failed."""
    try:
        text = folder.read(FAILURES).decode()
    except FileNotFoundError:
        return []
    failures = [json.loads(line) for line in text.splitlines()]
    return ["; ".join([*failure["workers"], failure["then"]]) for failure in failures]


def throughput(history: list[Row]) -> float | None:
    """Training samples a second over all epochs: each epoch counts by the samples that it saw."""
    rates = [row["samples_per_second"] for row in history if row.get("samples_per_second")]
    return len(rates) / sum(1 / rate for rate in rates) if rates else None


def to_json(result: dict[str, Any]) -> str:
    """Indented JSON; a number that is not finite becomes null, since JSON has no word for it."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        return None if isinstance(value, float) and value - value != 0 else value

    return json.dumps(finite(result), indent=2) + "\n"


def one_line(error: BaseException) -> str:
    """The error's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__
