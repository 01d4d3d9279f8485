"""What is tried again: everything but what is known to be the user's own."""

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayActorError, RayTaskError, WorkerCrashedError
from ray.train import ControllerError
from ray.train.v2._internal.exceptions import (
    InsufficientClusterResourcesError,
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from ray_mnist.errors import RequestError, Stopped, TrainingError
from ray_mnist.launch.failures import Failures, cause_of, describe_all, describe_start, is_bug, may_start_next_time
from ray_mnist.run.events import WorkersChanged
from ray_mnist.run.folder import RunFolder
from ray_mnist.run.records import read_failures


def raised(error: Exception) -> Exception:
    """As it comes out of `train_function`."""
    error.add_note("Traceback")
    return error


def error_of(call: Callable[[], Any]) -> Exception:
    try:
        call()
    except Exception as error:
        return raised(error)
    raise AssertionError("there was no error")


class Broken(Dataset[int]):
    """Its samples cannot be had; `how` says why."""

    def __init__(self, how: Callable[[], Any]) -> None:
        self.how = how

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return self.how()


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def misfit() -> torch.Tensor:
    return torch.ones(2, 3) @ torch.ones(2, 3)


def loaded(how: Callable[[], Any]) -> Any:
    return next(iter(DataLoader(Broken(how), num_workers=1)))


BUGS: dict[str, Callable[[], Any]] = {
    "type": lambda: len(3),  # type: ignore[arg-type]
    "key": lambda: {}["batch"],
    "attribute": lambda: nn.ReLU().width,
    "value": lambda: int("x"),
    "name": lambda: eval("unknown"),
    "import": lambda: __import__("no_such_module"),
    "division": lambda: 1 / 0,
    "not implemented": lambda: torch.tensor([1, 2]).mean(),
    "shapes": misfit,
    "shapes, in the loader": lambda: loaded(misfit),
    "sizes": lambda: torch.ones(3) + torch.ones(2),
    "view": lambda: torch.ones(6).view(4),
    "dtypes": lambda: nn.Linear(2, 2)(torch.ones(2, 2, dtype=torch.long)),
    "devices": lambda: nn.Linear(2, 2)(torch.ones(2, 2, device="meta")),
    "channels": lambda: nn.Conv2d(1, 1, 3)(torch.ones(2, 2)),
    "samples of unequal sizes": lambda: torch.utils.data.default_collate([torch.ones(2), torch.ones(3)]),
    "labels": lambda: F.nll_loss(torch.ones(2, 3), torch.ones(2)),
    "label out of range": lambda: F.cross_entropy(torch.ones(2, 3), torch.tensor([5, 1])),
    "no gradient": lambda: torch.ones(3).sum().backward(),
    "in place": lambda: torch.ones(2, requires_grad=True).add_(1),
    "weights": lambda: nn.Linear(2, 2).load_state_dict({}),
}


@pytest.mark.parametrize("call", BUGS.values(), ids=BUGS)
def test_what_is_the_users_own_is_not_tried_again(call: Callable[[], Any]) -> None:
    assert is_bug(error_of(call))


@pytest.mark.parametrize(
    "error",
    [
        RequestError("too few samples"),
        MisconfigurationException("no training_step"),
        AssertionError(),
        RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"),
    ],
)
def test_other_errors_of_the_users_own(error: Exception) -> None:
    assert is_bug(raised(error))


NCCL_TIMEOUT = (
    "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=17, OpType=ALLREDUCE, NumelIn=101770, "
    "Timeout(ms)=1800000) ran for 1800042 milliseconds before timing out, tensor sizes [101770]."
)
CUDNN = "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR\nYou can try to repro this: torch.randn([64, 1], dtype=torch.float)"
ECC = "CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be asynchronously reported"
HARDWARE = [
    RuntimeError(ECC),
    RuntimeError("CUDA error: unspecified launch failure"),
    RuntimeError(CUDNN),
    RuntimeError(NCCL_TIMEOUT),
    RuntimeError("[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv"),
    RuntimeError("DataLoader worker (pid(s) 4711) exited unexpectedly"),
    RuntimeError("Pin memory thread exited unexpectedly"),
    torch.distributed.DistNetworkError("The client socket has timed out after 600000ms"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB"),
    MemoryError(),
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.ENOSPC, "No space left on device"),
    OSError("When completing multiple part upload for key 'run' in bucket 'b': AWS Error SLOW_DOWN"),
    type("ClientError", (Exception,), {})("An error occurred (SlowDown) when calling the PutObject operation"),
    OutOfMemoryError("Task was killed due to the node running low on memory."),
    RayTaskError("broadcast", "Traceback", ValueError("its owner died")).as_instanceof_cause(),
]


@pytest.mark.parametrize("error", HARDWARE, ids=lambda error: f"{type(error).__name__}: {str(error)[:40]}")
def test_what_may_be_the_machines_is_tried_again(error: Exception) -> None:
    assert not is_bug(raised(error))


def test_a_data_loaders_worker_that_is_killed_is_tried_again() -> None:
    error = error_of(lambda: loaded(killed))
    assert "DataLoader worker" in str(error)
    assert not is_bug(error)


def test_a_checkpoint_that_does_not_fit_on_the_disk_is_tried_again() -> None:
    assert not is_bug(error_of(lambda: torch.save(torch.ones(1000), "/dev/full")))


def test_a_worker_that_died_without_a_word_is_tried_again() -> None:
    assert not is_bug(WorkerCrashedError())


def test_of_several_failures_the_one_that_caused_the_others_is_named() -> None:
    closed = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer")
    ecc = RuntimeError("CUDA error: uncorrectable ECC error encountered")
    bug = error_of(BUGS["key"])
    failures = {0: raised(closed), 1: raised(ecc)}
    assert str(describe_all(failures)).startswith("worker 1: RuntimeError: CUDA error: uncorrectable ECC")
    assert str(describe_all(failures | {2: WorkerCrashedError()})).startswith("worker 2 died")
    assert str(describe_all(failures | {2: WorkerCrashedError(), 3: bug})).startswith("worker 3: KeyError")


def test_a_failure_is_written_down_and_only_a_bug_ends_the_run(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), "run")
    failures, before = Failures(folder, max_failures=1, send=list), time.time()
    failures.after_exception(None, {0: raised(RuntimeError(ECC))})
    with pytest.raises(TrainingError, match=r"worker 1: KeyError: 'batch'"):
        failures.after_exception(None, {1: error_of(BUGS["key"])})
    first, second = read_failures(folder)
    times = [json.loads(line)["time"] for line in (tmp_path / "run/failures.jsonl").read_text().splitlines()]
    assert before <= times[0] <= times[1] <= time.time()
    assert "uncorrectable ECC" in first
    assert "; starting again" in first
    assert second == "worker 1: KeyError: 'batch'; giving up"


def test_a_run_that_was_told_to_stop_has_not_failed(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), "run")
    lost = raised(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"))
    with pytest.raises(Stopped):
        Failures(folder, max_failures=1, send=list).after_exception(None, {0: lost, 1: raised(Stopped())})
    assert read_failures(folder) == []


def test_storage_that_fails_when_a_failure_is_to_be_written_down_is_no_reason_to_end_the_run() -> None:
    failures = Failures(RunFolder("/proc/runs", "run"), max_failures=1, send=list)
    failures.after_exception(None, {0: raised(OSError(errno.ENOSPC, "No space left on device"))})


MISSING = RayTaskError("run_train_fn", "Traceback", ImportError("no module named nets")).as_instanceof_cause()
LOST = RayTaskError("setup", "Traceback", torch.distributed.DistNetworkError("timed out")).as_instanceof_cause()


@pytest.mark.parametrize(
    ("error", "said", "again"),
    [
        (ActorDiedError(), "the run's controller died: killed, out of memory, or its machine is gone", True),
        (ControllerError(ActorDiedError()), "a worker that was starting died: killed", True),
        (ControllerError(WorkerGroupStartupFailedError("…")), "a worker that was starting died: killed", True),
        (ControllerError(LOST), "timed out", True),
        (ControllerError(MISSING), "no module named nets", False),
        (ControllerError(WorkerGroupStartupTimeoutError(2)), "worker group startup timed out", False),
        (ControllerError(InsufficientClusterResourcesError("no room")), "no room", False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_what_keeps_workers_from_starting_is_tried_again_if_that_may_help(
    error: Exception, said: str, again: bool
) -> None:
    assert said in str(describe_start(error))
    assert may_start_next_time(cause_of(error)) is again


def test_a_machine_that_was_taken_away_with_notice_is_no_failure(tmp_path: Path) -> None:
    folder, sent = RunFolder(str(tmp_path), "run"), list[Any]()
    failures = Failures(folder, max_failures=0, send=sent.extend)
    lost = raised(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"))
    with_notice = WorkerHealthCheckFailedError("…", RayActorError(preempted=True))
    failures.after_exception(None, {0: lost, 1: with_notice})
    (told,) = sent
    assert isinstance(told, WorkersChanged)
    assert "worker 1 had not left its machine when that was taken away; starting again" in told.message
    assert (read_failures(folder), failures.tries_left) == ([], 0)
    with pytest.raises(TrainingError, match="KeyError"):
        failures.after_exception(None, {0: error_of(BUGS["key"]), 1: with_notice})
    failures.after_exception(None, {1: WorkerHealthCheckFailedError("…", RayActorError())})
    assert len(read_failures(folder)) == 2
