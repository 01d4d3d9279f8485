"""What a run tells of itself while it goes on, from wherever it runs to the terminal that it was started from."""

from collections.abc import Callable
from dataclasses import dataclass

from ray_mnist.run.outcome import Row


@dataclass(frozen=True)
class EpochEnded:
    """Its metrics are `row`, and its checkpoint is in the run folder."""

    row: Row


@dataclass(frozen=True)
class Progress:
    """Rank 0 is done with `batch`, counted from 1, of the `batches` of a phase; None where they are a stream.

    `phase` is training, validation, test or prediction; `epoch` counts from 1. The samples are those of all workers,
    and `loss` is that of rank 0's part of the batch, in training only; `checkpoint` is the step of the run
    folder's newest. `step` counts optimizer steps. Of late, a batch took `step_seconds`, of which rank 0 waited
    `data_wait_seconds` for its data loader. In a sweep, `trial` is the one that it is about.
    """

    phase: str
    epoch: int
    batch: int
    batches: int | None
    samples_per_second: float | None  # of late
    seconds_left: float | None  # of the phase
    loss: float | None
    workers: int
    checkpoint: int | None
    step: int
    step_seconds: float | None
    data_wait_seconds: float | None
    trial: str | None = None


@dataclass(frozen=True)
class Printed:
    """Code of the user's wrote `text` to `stream`: stdout or stderr."""

    text: str
    stream: str


@dataclass(frozen=True)
class WorkerStarted:
    """All that it prints is in `log`, the words for files and their machine."""

    rank: int
    log: str


@dataclass(frozen=True)
class WorkersFailed:
    """These workers failed: how, and what comes of it."""

    ranks: list[int]
    message: str


@dataclass(frozen=True)
class CheckpointPassedOver:
    """The run does not go on from the checkpoint at this path or URI, which would be the newest: `why`, in words."""

    location: str
    why: str


@dataclass(frozen=True)
class WorkersChanged:
    """Other workers, or as many others, go on, or are to: `message` says how many and why."""

    message: str


@dataclass(frozen=True)
class StorageFails:
    """No checkpoint can be written to the run folder at `location`: `why`. It is tried again for `for_s` seconds."""

    location: str
    why: str
    for_s: float


Event = (
    EpochEnded
    | Progress
    | Printed
    | WorkerStarted
    | WorkersFailed
    | CheckpointPassedOver
    | WorkersChanged
    | StorageFails
)
Tell = Callable[[Event], None]  # never waits for long, and never fails: news must not harm a run
