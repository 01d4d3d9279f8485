"""Trains on a TPU with Lightning's XLA strategies: on one core in this process, or on all of a host's in one each."""

import ctypes
import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.distributed.xla_multiprocessing as xmp
from pytorch_lightning.strategies import DDPStrategy, Strategy
from pytorch_lightning.strategies.single_xla import SingleDeviceXLAStrategy
from pytorch_lightning.strategies.xla import XLAStrategy
from ray import cloudpickle
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch_xla import runtime
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from ray_mnist.errors import RequestError, TrainingError, one_line
from ray_mnist.launch import local
from ray_mnist.launch.channel import Send, over_pipe
from ray_mnist.launch.output import root_logger, worker_output
from ray_mnist.run.events import Event, Tell
from ray_mnist.run.outcome import Evaluation, Outcome
from ray_mnist.run.scratch import scratch_folder
from ray_mnist.worker import Job, run_and_collect

Address = tuple[str, int]  # where the processes find each other
OUTCOME, ERROR = "outcome", "error"
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class SyncSteps(Strategy):
    """What Lightning's strategies for one core and for all of them both lack."""

    def batch_to_device(self, batch: Any, device: Any = None, dataloader_idx: int = 0) -> Any:
        """Has the device run what was computed so far: the graph of an evaluation would have all its batches in it."""
        torch_xla.sync()
        return super().batch_to_device(batch, device, dataloader_idx)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seeds the device as this process was seeded for the step: torch.manual_seed does not reach it."""
        xm.set_rng_state(torch.initial_seed())


class OneCoreStrategy(SyncSteps, SingleDeviceXLAStrategy):
    """Lightning's for one core."""


class EachCoreStrategy(SyncSteps, XLAStrategy):
    """Lightning's for all cores, inside a process that was started for one of them.

    Lightning itself would start one for each fit and each test, and bring home little of what happened there; it has
    no public way to be told that it need not. What the processes tell each other, other than gradients, goes over
    their process group: nothing is compiled for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._launched = True

    def _configure_launcher(self) -> None:
        self._launcher = None

    def setup(self, trainer: Any) -> None:
        """Has the model's metrics meet over the process group."""
        super().setup(trainer)
        for part in trainer.lightning_module.modules():
            if isinstance(part, Metric):
                part.dist_sync_fn = gather_on_host

    def process_dataloader(self, dataloader: Any) -> Any:
        """Leaves it: MpDeviceLoader would fetch ahead in a thread, and samples would be drawn out of turn."""
        return dataloader

    def reduce(self, output: Any, group: Any = None, reduce_op: Any = "mean") -> Tensor:
        """Over the process group; any of its operations, where Lightning's has sum and mean."""
        value = torch.as_tensor(output)
        reduced: Tensor = DDPStrategy.reduce(self, value.to("cpu", copy=True), group, reduce_op)
        return reduced.to(value.device)

    broadcast = DDPStrategy.broadcast
    barrier = DDPStrategy.barrier

    def teardown(self) -> None:
        """Stays launched: the test comes after the fit, in the same process."""
        super().teardown()
        self._launched = True


def gather_on_host(value: Tensor, group: Any = None) -> list[Tensor]:
    """Every process's `value`, on its device."""
    return [each.to(value.device) for each in gather_all_tensors(value.cpu(), group)]


class XLAContext(local.LocalContext):
    """A `WorkerContext`: one of `cores` of this host, and perhaps of other hosts."""

    def __init__(self, job: Job, cores: int, tell: Tell) -> None:
        super().__init__(job, use_gpu=False, tell=tell)
        self.cores = cores

    def trainer_arguments(self) -> dict[str, Any]:
        """Lightning's XLA accelerator, precision and checkpoints come with the strategy."""
        strategy = OneCoreStrategy(0) if self.cores == 1 else EachCoreStrategy()
        return {"accelerator": "tpu", "devices": self.cores, "strategy": strategy}


def launch(job: Job, cores: int, tell: Tell) -> Outcome | Evaluation:
    """Does the job on one core of this host, or on all, and tells of it.

    Raises:
        RequestError: a core found that the request cannot be met.
        TrainingError: training failed.
    """
    if cores == 1:
        outcomes: list[Outcome | Evaluation] = []
        xmp.spawn(lambda _: outcomes.append(local.launch(job, XLAContext(job, cores, tell))), nprocs=1)
        return outcomes[0]
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    outcome = launch_host(job, cores, ("127.0.0.1", store.port), tell)
    assert outcome is not None
    return outcome


def launch_host(job: Job, cores: int, address: Address, tell: Tell) -> Outcome | Evaluation | None:
    """Does a host's part of the job, on all its cores; the outcome comes home on the host that has rank 0.

    Args:
        job: the same on all hosts.
        cores: of this host.
        address: of the store that all processes of all hosts meet at.
        tell: takes what the process with rank 0 tells.
    """
    logs = tempfile.mkdtemp(prefix="tpu-logs-")
    sys.stdout.flush()  # or the forks would, too
    with scratch_folder() as folder, over_pipe(tell) as send:
        try:
            arguments = (cloudpickle.dumps(job), cores, address, folder, logs, send)
            xmp.spawn(run_on_core, args=arguments, start_method="fork")
        except BrokenProcessPool:
            errors = sorted(Path(folder).glob(f"{ERROR}*"), key=lambda file: file.stat().st_mtime)
            where = f"What the cores printed is in {logs} on {socket.gethostname()}."
            if not errors:
                raise TrainingError("a process of the TPU's cores died: killed or out of memory", where) from None
            error = pickle.loads(errors[0].read_bytes())
            if isinstance(error, TrainingError):
                error = TrainingError(error.message, f"{error.details}\n{where}")
            else:
                shutil.rmtree(logs)
            raise error from None
        shutil.rmtree(logs)
        outcome = Path(folder, OUTCOME)
        return cloudpickle.loads(outcome.read_bytes()) if outcome.exists() else None


def not_told(events: list[Event]) -> None:
    """Where rank 0 does the telling."""


def run_on_core(rank: int, packed: bytes, cores: int, address: Address, folder: str, logs: str, send: Send) -> None:
    """What the process of each core runs. One that fails ends the others: they would wait for it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nothing stays behind a process that is killed
    torch.set_num_threads(1)  # a fork has none of its parent's other threads, and OpenMP would wait for them
    root = root_logger()
    log = Path(logs, f"core-{rank}.log")
    sys.stdout = sys.stderr = log.open("w", buffering=1)
    for descriptor in (1, 2):
        os.dup2(sys.stdout.fileno(), descriptor)
    try:
        if runtime.addressable_device_count() > 1:
            raise RequestError("--tpu-cores: chips of two cores each (TPU v2, v3) train on one core only: use 1.")
        store = TCPStore(*address, is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=runtime.world_size())
        with worker_output(send if rank == 0 else not_told, rank, str(log), root) as tell:
            job: Job = cloudpickle.loads(packed)
            outcome = run_and_collect(job, XLAContext(job, cores, tell))
        if rank == 0:
            Path(folder, OUTCOME).write_bytes(cloudpickle.dumps(outcome))
        dist.barrier()
    except BaseException as error:
        if not isinstance(error, RequestError | TrainingError):
            message = f"core {rank}: {type(error).__name__}: {one_line(error)[:300]}"
            error = TrainingError(message, traceback.format_exc())
        Path(folder, f"{ERROR}-{rank}").write_bytes(pickle.dumps(error))
        os._exit(1)
