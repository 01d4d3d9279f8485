"""What Ray Train's controller does about a failure. It imports neither torch nor Lightning, which takes seconds."""

import json
import re
from typing import Any

import ray.train
from ray.exceptions import RayError

from ray_mnist.checks.preflight import WAIT_FOR_NODES_S
from ray_mnist.errors import RequestError, TrainingError, one_line
from ray_mnist.launch.channel import Send
from ray_mnist.run.events import WorkersFailed
from ray_mnist.run.folder import RunFolder
from ray_mnist.run.records import FAILURES, one_failure


class Failures(ray.train.UserCallback):
    """Runs in Ray Train's controller: tells and writes down each failure, and ends the run where trying is no use."""

    def __init__(self, folder: RunFolder, max_failures: int, send: Send) -> None:
        self.storage_path, self.name = folder.storage_path, folder.name
        self.tries_left, self.send = max_failures, send

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Adds a line to the run folder's list of failures, unless the request was wrong: that leaves no folder."""
        for error in worker_exceptions.values():
            if isinstance(error, RequestError):
                raise RequestError(str(error))  # without the note, which is no news
        folder = RunFolder(self.storage_path, self.name)
        failures = [describe(rank, error).message for rank, error in sorted(worker_exceptions.items())]
        bug = any(is_bug(error) for error in worker_exceptions.values())
        again = self.tries_left > 0 and not bug
        self.tries_left -= 1
        then = (
            f"starting again, once all workers have room (waiting up to {WAIT_FOR_NODES_S} s)" if again else "giving up"
        )
        failure = {"workers": failures, "then": then}
        self.send([WorkersFailed(sorted(worker_exceptions), one_failure(failure))])
        before = folder.read(FAILURES).decode() if folder.has(FAILURES) else ""
        folder.write(FAILURES, before + json.dumps(failure) + "\n")
        if bug:
            raise describe_all(worker_exceptions)


def raised_by_training(error: Exception) -> bool:
    """Whether it came out of `train_function`, which adds a note; a worker that died could not add one."""
    return bool(getattr(error, "__notes__", None))


def is_bug(error: Exception) -> bool:
    """Whether the error would come back on the next try.

    A worker that loses its peers raises one of Ray's errors, an OSError, or what a torch collective raises: a
    DistError, or a RuntimeError that names gloo or NCCL.
    """
    from_torch = any(kind.__name__ == "DistError" for kind in type(error).__mro__)
    named = isinstance(error, RuntimeError) and re.search("gloo|nccl|process group", str(error), re.IGNORECASE)
    lost_peer = isinstance(error, RayError | OSError) or from_torch or named
    return isinstance(error, RequestError) or (raised_by_training(error) and not lost_peer)


def describe(rank: int, error: Exception) -> TrainingError:
    """The failure of one worker."""
    if not raised_by_training(error):
        return TrainingError(f"worker {rank} died: killed, out of memory, or its machine is gone", str(error))
    message = f"worker {rank}: {type(error).__name__}: {one_line(error)[:300]}"
    return TrainingError(message, "\n".join(error.__notes__))


def describe_all(worker_exceptions: dict[int, Exception]) -> TrainingError:
    """The failure of a group: a bug says most, then a death; what the others raised is often for want of a peer."""

    def rank_of(item: tuple[int, Exception]) -> tuple[bool, bool, int]:
        rank, error = item
        return not is_bug(error), raised_by_training(error), rank

    return describe(*min(worker_exceptions.items(), key=rank_of))
