"""Trains in this process, without Ray."""

import signal
from pathlib import Path
from typing import Any

import torch

from ray_mnist.errors import RequestError
from ray_mnist.results import Outcome, Row
from ray_mnist.worker import Job, run


class ThisProcess:
    """A `Place` with one rank; it looks after the run folder's checkpoints itself."""

    def __init__(self, job: Job, use_gpu: bool) -> None:
        self.job, self.use_gpu = job, use_gpu

    def lightning(self) -> dict[str, Any]:
        """One device."""
        return {"accelerator": "gpu" if self.use_gpu else "cpu", "devices": 1}

    def report(self, metrics: Row, name: str, checkpoint: Path | None) -> None:
        """Puts the checkpoint into the run folder."""
        assert checkpoint is not None
        self.job.folder.add_checkpoint(checkpoint, name)

    def agree(self, value: str | None) -> str | None:
        """There is nobody to disagree."""
        return value


def launch(job: Job, use_gpu: bool) -> Outcome:
    """Fits and tests here."""
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        return run(job, ThisProcess(job, use_gpu))
    except SystemExit as end:
        # Lightning answers Ctrl-C by leaving the process, and is deaf to it from then on.
        if not isinstance(end.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, on_interrupt)
        raise KeyboardInterrupt from None


def check(use_gpu: bool) -> None:
    """Raises RequestError if there is no GPU here and one was asked for."""
    if use_gpu and not torch.cuda.is_available():
        raise RequestError("--use-gpu: torch finds no GPU on this machine, drop --use-gpu.")
