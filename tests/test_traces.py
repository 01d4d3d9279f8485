"""No run leaves anything in its worker's process that the next one there could notice; where one does, it is found."""

import gc
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytorch_lightning as pl
import ray.train
import torch
from processes import processes
from ranks import on_ranks
from ray import cloudpickle
from ray.train.torch import TorchTrainer

from ray_mnist import ConvModel, MNISTDataModule, SimpleModel, Trainer
from ray_mnist.launch import ray as launch
from ray_mnist.launch.connection import this_folder
from ray_mnist.launch.output import root_logger
from ray_mnist.launch.select import check_serializable_job
from ray_mnist.launch.traces import TRACES, Traces, switches

CALLS, KINDS = 20, 4


def before_a_run() -> Traces:
    """Not a fixture: pytest has another variable in the environment while it makes those."""
    traces = Traces()
    traces.begin()
    traces.loaded()
    return traces


def test_what_lightning_and_ray_set_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    traces = before_a_run()
    before = switches(), dict(os.environ)
    monkeypatch.setenv("RANK", "3")
    pl.seed_everything(3, workers=True, verbose=False)
    pl.Trainer(deterministic=True, benchmark=True, accelerator="cpu", logger=False)
    warnings.simplefilter("ignore")
    assert before != (switches(), dict(os.environ))
    assert traces.left() == []
    assert before == (switches(), dict(os.environ))


def test_all_that_a_run_leaves_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, for to look takes a second."""
    traces = before_a_run()
    monkeypatch.setenv("SEEN", "1")
    monkeypatch.syspath_prepend("somewhere")
    monkeypatch.chdir("/")
    monkeypatch.setattr(torch, "relu", abs)
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: x)
    monkeypatch.setattr(sys, "stdout", sys.__stderr__)
    monkeypatch.setattr(warnings, "showwarning", print)
    handler = logging.NullHandler()
    logging.getLogger("theirs").addHandler(handler)
    answer = signal.signal(signal.SIGTERM, signal.default_int_handler)
    torch.set_default_dtype(torch.float64)
    try:
        found = traces.left()
    finally:
        torch.set_default_dtype(torch.float32)
        signal.signal(signal.SIGTERM, answer)
        logging.getLogger("theirs").removeHandler(handler)
    assert {
        "SEEN",
        "path",
        "folder",
        "torch.relu",
        "torch.nn.modules.linear.Linear.forward",
        "output",
        "warnings",
        "log theirs",
        "signals",
        "dtype",
    } <= {*found}


def test_threads_and_processes_that_go_on_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    traces = before_a_run()
    monkeypatch.setattr("ray_mnist.launch.traces.ENDING_S", 0.1)
    end = threading.Event()
    threading.Thread(target=end.wait, name="theirs").start()
    process = processes.Process(target=time.sleep, args=[100], name="their process", daemon=True)
    process.start()
    try:
        assert traces.left() == ["theirs", "their process"]
    finally:
        end.set()
        process.kill()
        process.join()
    monkeypatch.undo()
    assert traces.left() == []


def test_what_the_run_s_code_does_as_it_is_imported_is_not_set_back_in_silence() -> None:
    """The next run would find it imported already."""
    traces = Traces()
    traces.begin()
    torch.backends.cudnn.benchmark = True
    traces.loaded()
    assert traces.left() == ["imports"]


class Deaf:
    """In place of `launch.channel.Sender`, where nobody listens."""

    def __call__(self, events: list[Any]) -> None:
        pass

    def call_on_stop(self, stop: Callable[[], None]) -> None:
        pass


def jobs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What `CALLS` calls send to their workers, of some kinds in turn, each in a run folder of its own."""
    sent: list[bytes] = []

    def take(job: Any, config: Any, keep_s: float) -> Iterator[Any]:
        check_serializable_job(job)
        sent.append(BytesIO(cloudpickle.dumps(job)))
        raise InterruptedError
        yield

    monkeypatch.setattr("ray_mnist.launch.select.on_ray", take)
    data = MNISTDataModule("digits")
    for number in range(CALLS):
        make = partial(Trainer, storage_path=str(folder), name=str(number), num_workers=2, max_epochs=1)
        calls: list[Callable[..., Any]] = [
            lambda make: make(deterministic=True).fit(SimpleModel(), data),
            lambda make: make().predict(SimpleModel(), datamodule=data),
            lambda make: make(limit_train_batches=2).fit(ConvModel(), data),
            lambda make: make().test(SimpleModel(), datamodule=data),
        ]
        pl.seed_everything(0, verbose=False)
        with pytest.raises(InterruptedError):
            calls[number % KINDS](make)
    return sent


def call(rank: int, port: int, settings: dict[str, Any]) -> tuple[Any, ...]:
    """Runs a job in a thread, as Ray does; what it left, what came of it, and what this process has in memory then."""
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    meet |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ.update(meet | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    no_workers = ray.train.ScalingConfig(num_workers=0)
    trainer = TorchTrainer(launch.train_function, train_loop_config=settings, scaling_config=no_workers)
    with ThreadPoolExecutor(1) as threads:
        outcome = cloudpickle.loads(threads.submit(trainer.fit).result().return_value)
    metrics = outcome and {name: value.item() for name, value in outcome.trainer_state.callback_metrics.items()}
    del trainer, outcome
    left = TRACES.left()
    tensors = sum(isinstance(each, torch.Tensor) for each in gc.get_objects())
    return left, metrics, tensors, psutil.Process().memory_info().rss / 1e6


@pytest.mark.slow
def test_twenty_calls_in_one_process_are_as_twenty_in_processes_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = [torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(CALLS)]
    settings = {"use_gpu": False, "threads": 1, "folder": this_folder(), "root_logger": root_logger(), "keep": True}
    ports = [store.port for store in stores]
    sent = jobs(tmp_path, monkeypatch)

    def call_all(rank: int) -> list[Any]:
        torch.distributed.destroy_process_group()
        return [
            call(rank, port, settings | {"job": job, "send": Deaf()}) for port, job in zip(ports, sent, strict=True)
        ]

    for called in on_ranks(call_all):
        left, metrics, tensors, megabytes = zip(*called, strict=True)
        assert left == ([],) * CALLS
        assert metrics == metrics[:KINDS] * (CALLS // KINDS)
        assert {*tensors[KINDS:]} == {tensors[KINDS]}
        # Once each kind of call was there twice, the process has all that it will have, but for what malloc gives back
        # at times, some 7 MB; a dozen models and their optimizers have twice that.
        assert max(megabytes[-KINDS:]) < max(megabytes[KINDS : 2 * KINDS]) + 10
