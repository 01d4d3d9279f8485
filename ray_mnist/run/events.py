"""What a run tells of itself while it goes on, from wherever it runs to the terminal that it was started from."""

from collections.abc import Callable
from dataclasses import dataclass

from ray_mnist.run.outcome import Row


@dataclass(frozen=True)
class EpochEnded:
    """Its metrics are `row`, and its checkpoint is in the run folder."""

    row: Row


@dataclass(frozen=True)
class WorkersFailed:
    """Some workers failed: how, and what comes of it."""

    message: str


Event = EpochEnded | WorkersFailed
Tell = Callable[[Event], None]  # never waits for long, and never fails: news must not harm a run
