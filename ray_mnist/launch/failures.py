"""What Ray Train's controller does about a failure. It imports neither torch nor Lightning, which takes seconds."""

import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray.train
from ray.exceptions import RayActorError, RayError, RayTaskError

from ray_mnist.checks.preflight import WAIT_FOR_NODES_S
from ray_mnist.errors import RequestError, Stalled, Stopped, TrainingError, one_line, out_of_memory
from ray_mnist.launch.channel import PATIENCE_S, Send
from ray_mnist.run.events import WorkersChanged, WorkersFailed
from ray_mnist.run.folder import RunFolder
from ray_mnist.run.records import FAILURES, add_line, one_failure

# The user's own errors: Python's, Lightning's, and what torch says of tensors that do not fit.
PYTHONS = (
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    NameError,
    AssertionError,
    ArithmeticError,
    ImportError,
    SyntaxError,
    NotImplementedError,
    RecursionError,
)
LIGHTNINGS = "MisconfigurationException"
TENSORS = re.compile(r"\b(tensors?|shapes?|sizes?|dtypes?|expected|grad|state_dict)\b", re.IGNORECASE)
ASSERT = "device-side assert"  # such as a label that is out of range
# The others: their messages may have numbers and code about tensors in them.
DEVICES = re.compile(r"(CUDA|cuDNN) error|CUBLAS_STATUS")
PEERS = re.compile("gloo|nccl|process group", re.IGNORECASE)
# Ray Train's for workers that died, and for workers that it found no room for in all the time that it waits.
NOT_STARTED = "WorkerGroupStartupFailedError"
NO_ROOM = {"WorkerGroupStartupTimeoutError", "InsufficientClusterResourcesError"}
DIED = "died: killed, out of memory, or its machine is gone"


class Failures(ray.train.UserCallback):
    """Runs in Ray Train's controller: tells and writes down each failure, and ends the run where trying is no use."""

    def __init__(self, folder: RunFolder, max_failures: int, send: Send, least: int | None = None) -> None:
        self.storage_path, self.name = folder.storage_path, folder.name
        self.tries_left, self.send, self.least = max_failures, send, least

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Adds a line to the run folder's list of failures.

        Not so where the request was wrong, which leaves no folder, or the run was told to stop, or a machine was taken
        away with notice, which are no failures.
        """
        for error in worker_exceptions.values():
            if isinstance(error, RequestError | Stopped):
                raise type(error)(*error.args)  # without the note, which is no news
        folder = RunFolder(self.storage_path, self.name)
        failures = [describe(rank, error).message for rank, error in sorted(worker_exceptions.items())]
        bug = any(is_bug(error) for error in worker_exceptions.values())
        if not bug and any(taken_away(error) for error in worker_exceptions.values()):
            self.send([WorkersChanged(f"{'; '.join(failures)}; starting again from the newest checkpoint")])
            return
        again = self.tries_left > 0 and not bug
        self.tries_left -= 1
        self.send([WorkersFailed(sorted(worker_exceptions), write_down(folder, failures, again, self.least))])
        if bug:
            raise describe_all(worker_exceptions)


def in_time(write: Callable[[], None]) -> None:
    """Writes to the storage, and leaves that where it fails or takes long: what is to be recovered from may be that."""

    def try_to() -> None:
        with suppress(OSError):
            write()

    thread = threading.Thread(target=try_to, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)


def write_down(folder: RunFolder, failures: list[str], again: bool, least: int | None = None) -> str:
    """Adds a line to the run folder's list of failures; returns it in words.

    It says what comes of it: whether the workers are started again, all of them, or `least` and as many as there are.
    """
    enough = f"at least {least}" if least else "all"
    waiting = f"starting again, once {enough} workers have room (waiting up to {WAIT_FOR_NODES_S} s)"
    then = waiting if again else "giving up"
    failure = {"time": time.time(), "workers": failures, "then": then}
    in_time(lambda: add_line(folder, FAILURES, failure))
    return one_failure(failure)


def raised_by_training(error: Exception) -> bool:
    """Whether it came out of `train_function`, which adds a note; a worker that died could not add one."""
    return bool(getattr(error, "__notes__", None))


def is_bug(error: Exception) -> bool:
    """Whether the error is known to be the user's own, and would come back on the next try.

    Whatever is not known may be a machine's: a GPU's memory, a data loader's worker that was killed, a network, a disk.
    torch has no other error for those than for tensors that do not fit: a RuntimeError, whose message tells.
    """
    if isinstance(error, RequestError | TrainingError):
        return True
    if not raised_by_training(error) or isinstance(error, RayError | OSError):
        return False
    if isinstance(error, PYTHONS) or LIGHTNINGS in names(error):
        return True
    message = str(error)
    about_tensors = TENSORS.search(message) and not DEVICES.search(message)
    return isinstance(error, RuntimeError) and not lost_peer(error) and bool(about_tensors or ASSERT in message)


def taken_away(error: Exception) -> bool:
    """Whether the worker died with a machine of which that was known before, and there was not time enough to leave."""
    return bool(getattr(getattr(error, "health_check_failure", None), "preempted", False))


def lost_peer(error: Exception) -> bool:
    """Whether the worker says no more than that another one is gone or too slow."""
    named = isinstance(error, RuntimeError) and PEERS.search(str(error))
    return isinstance(error, RayError | ConnectionError) or "DistError" in names(error) or bool(named)


def names(error: Exception) -> list[str]:
    """The names of the error's classes: to import those of torch and Lightning takes seconds."""
    return [kind.__name__ for kind in type(error).__mro__]


def describe(rank: int, error: Exception) -> TrainingError:
    """The failure of one worker."""
    if isinstance(error, Stalled):
        return TrainingError(f"worker {rank} {error}", error.details)
    if not raised_by_training(error):
        how = "had not left its machine when that was taken away" if taken_away(error) else DIED
        return TrainingError(f"worker {rank} {how}", str(error))
    if isinstance(error, TrainingError):
        return error
    if "OutOfMemoryError" in names(error):
        return TrainingError(f"worker {rank}: {out_of_memory(error)}", "\n".join(error.__notes__))
    message = f"worker {rank}: {type(error).__name__}: {one_line(error)[:300]}"
    return TrainingError(message, "\n".join(error.__notes__))


def may_start_next_time(error: Exception) -> bool:
    """Whether what kept all workers from starting, or ended the controller, may not come back on the next try."""
    return not isinstance(error, PYTHONS) and NO_ROOM.isdisjoint(names(error))


def cause_of(error: Exception) -> Exception:
    """What Ray Train's controller failed with, where that is what the error is about."""
    return error.controller_failure if isinstance(error, ray.train.ControllerError) else error


def describe_start(error: Exception) -> TrainingError:
    """The failure of a whole start: what Ray Train's `fit` raises, or what became of its controller."""
    if isinstance(error, RayActorError):
        return TrainingError(f"the run's controller {DIED}", str(error))
    cause = cause_of(error)
    if isinstance(cause, RayActorError) or NOT_STARTED in names(cause):
        return TrainingError(f"a worker that was starting {DIED}", str(error))
    reason = cause.cause if isinstance(cause, RayTaskError) else cause  # without the traceback, which is its message
    return TrainingError(f"the workers did not start: {one_line(reason)[:300]}", str(error))


def describe_all(worker_exceptions: dict[int, Exception]) -> TrainingError:
    """The failure of a group: a bug says most, then a death; what the others raised is often for want of a peer."""

    def rank_of(item: tuple[int, Exception]) -> tuple[bool, bool, bool, int]:
        rank, error = item
        return not is_bug(error), raised_by_training(error), lost_peer(error), rank

    return describe(*min(worker_exceptions.items(), key=rank_of))
