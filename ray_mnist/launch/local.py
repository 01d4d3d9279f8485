"""Trains in this process, without Ray."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from ray_mnist.errors import RequestError, TrainingError, out_of_memory
from ray_mnist.launch.termination import on_sigterm
from ray_mnist.run.events import Tell
from ray_mnist.run.outcome import Evaluation, Outcome
from ray_mnist.worker import Job, WorkerContext, run


class LocalContext:
    """A `WorkerContext` with one rank."""

    def __init__(self, job: Job, use_gpu: bool, tell: Tell) -> None:
        self.job, self.use_gpu, self.tell, self.stop = job, use_gpu, tell, threading.Event()

    def trainer_arguments(self) -> dict[str, Any]:
        """One device."""
        return {"accelerator": "gpu" if self.use_gpu else "cpu", "devices": 1, "strategy": "auto"}


def launch(job: Job, context: WorkerContext) -> Outcome | Evaluation:
    """Does the job here.

    Raises:
        Stopped: SIGTERM came.
        TrainingError: the GPU's memory is full, or the loss is not finite any more.
    """
    with on_sigterm(context.stop.set) if job.task == "fit" else nullcontext():
        return run_here(job, context)


def run_here(job: Job, context: WorkerContext) -> Outcome | Evaluation:
    """Does the job, and leaves this process as it was."""
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        with seed_left_alone():
            return run(job, context)
    except torch.OutOfMemoryError as error:
        raise TrainingError(out_of_memory(error)) from error
    except SystemExit as end:
        # Lightning answers Ctrl-C by leaving the process, and is deaf to it from then on.
        if not isinstance(end.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, on_interrupt)
        raise KeyboardInterrupt from None


@contextmanager
def seed_left_alone() -> Iterator[None]:
    """Lightning keeps its seed in the environment, where the script's next Trainer would take it for the user's."""
    before = {name: os.environ.pop(name, None) for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def check(use_gpu: bool) -> None:
    """Raises RequestError if there is no GPU here and one was asked for."""
    if use_gpu and not torch.cuda.is_available():
        raise RequestError("--use-gpu: torch finds no GPU on this machine, drop --use-gpu.")
